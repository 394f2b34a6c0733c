//! The `config.json` of an exported model: that of the base, with what changed.

use serde_json::{Map, Value, json};

use crate::checkpoint::Dtype;
use crate::quant::Bits;

/// Says how the weights are stored, in the place where the base says it.
pub fn set(json: &mut Map<String, Value>, dtype: Dtype, bits: Option<Bits>) {
    let dtype = match dtype {
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    };
    // Later versions of transformers have the shorter name, and some files both.
    let names = ["torch_dtype", "dtype"];
    let there = names.into_iter().filter(|name| json.contains_key(*name));
    let mut there: Vec<&str> = there.collect();
    if there.is_empty() {
        there.push("torch_dtype");
    }
    for name in there {
        json.insert(name.to_owned(), json!(dtype));
    }
    match bits {
        // `shift_remove` and not `remove`, which would put the last key in its place.
        None => {
            json.shift_remove("quantization_bit");
            json.shift_remove("quantization_embeddings");
        }
        Some(bits) => {
            let bits = match bits {
                Bits::Eight => 8,
                Bits::Four => 4,
            };
            json.insert("quantization_bit".to_owned(), json!(bits));
            json.insert("quantization_embeddings".to_owned(), json!(false));
        }
    }
}
