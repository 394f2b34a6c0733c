//! What the interoperability checks (`tests/interop/run.py`) ask of this program beside its commands:
//! logits at every position, and tensors as a PyTorch file.
//!
//! `interop logits MODEL ADAPTER|- ROWS.json OUT.safetensors`, `interop torch IN.safetensors OUT.bin`
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use mp_train::checkpoint::run_state::write_tensors;
use mp_train::checkpoint::torch_zip::write_torch;
use mp_train::checkpoint::{HostTensor, open_tensor_file, read_all};
use mp_train::config::generate::GenerateOptions;
use mp_train::config::run::{Device, Quantization};
use mp_train::data::rows::{PromptRow, RawRow};
use mp_train::generate::Generator;
use mp_train::pipeline::base::Base;

/// Tokens generated greedily behind each row.
const NEW_TOKENS: usize = 8;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["logits", model, adapter, rows, out] => logits(model, adapter, rows, out),
        ["torch", from, to] => {
            let tensors = read_all(open_tensor_file(Path::new(from)).unwrap().as_ref()).unwrap();
            write_torch(Path::new(to), &tensors).unwrap();
        }
        _ => panic!("unknown command {args:?}"),
    }
}

/// `I.logits` `[T, V]` of row I, each position from the tokens up to it, and `I.greedy`.
fn logits(model: &str, adapter: &str, rows: &str, out: &str) {
    let base = Base::open(Path::new(model), Quantization::None).unwrap();
    let rows: Vec<Vec<i64>> = serde_json::from_slice(&std::fs::read(rows).unwrap()).unwrap();
    let longest = rows.iter().map(Vec::len).max().unwrap();
    let options = GenerateOptions {
        adapter: (adapter != "-").then(|| adapter.into()),
        ..GenerateOptions::new(model.into(), vec![Device::Cpu, Device::Cpu])
    };
    let mut generator = Generator::start(&base, &options, longest).unwrap();
    let mut tensors = BTreeMap::new();
    for (index, row) in rows.iter().enumerate() {
        let prompt = |ids: &[i64]| {
            let raw = RawRow {
                input_ids: ids.to_vec(),
                ..RawRow::default()
            };
            PromptRow::new(&raw, &base.config).unwrap()
        };
        let mut values: Vec<f32> = Vec::new();
        for end in 1..=row.len() {
            let mut emit = |_, logits: &[f32]| values.extend(logits);
            generator
                .greedy(&prompt(&row[..end]), 1, &[], &mut emit)
                .unwrap();
        }
        let mut ids = Vec::new();
        let mut emit = |id, _: &[f32]| ids.push(i64::from(id));
        generator
            .greedy(&prompt(row), NEW_TOKENS, &[], &mut emit)
            .unwrap();
        let shape = [row.len(), values.len() / row.len()];
        let logits = HostTensor::from_f32(shape, &values).unwrap();
        tensors.insert(format!("{index}.logits"), logits);
        let greedy = HostTensor::from_i64([ids.len()], &ids).unwrap();
        tensors.insert(format!("{index}.greedy"), greedy);
    }
    write_tensors(Path::new(out), &tensors).unwrap();
}
