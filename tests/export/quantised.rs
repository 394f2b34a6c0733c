//! Folders of codes: written, read, and turned into weights again.

use half::f16;
use mp_train::checkpoint::Dtype;
use mp_train::config::run::Quantization;
use mp_train::quant::{Bits, QuantisedMatrix};

use super::tiny::{Generation, Tiny, export, json, stored, tensors};

const BOTH: [(Quantization, Bits, u32); 2] = [
    (Quantization::Int8, Bits::Eight, 8),
    (Quantization::Int4, Bits::Four, 4),
];

fn is_matrix(name: &str) -> bool {
    name.contains(".layers.") && name.ends_with("weight") && !name.contains("norm")
}

#[test]
fn codes_are_those_of_the_merged_weights_in_halves() {
    for generation in [Generation::ChatGlm, Generation::ChatGlm2] {
        let tiny = Tiny::new(generation, Dtype::F16);
        let adapter = tiny.lora_folder();
        let plain = tiny.options(Some(&adapter), "merged");
        export(&plain).unwrap();
        let merged = tensors(&plain.output);
        for (quantization, bits, number) in BOTH {
            let mut options = tiny.options(Some(&adapter), &format!("codes{number}"));
            options.quantization = quantization;
            let exported = export(&options).unwrap();
            assert!(exported.requantised);
            let found = tensors(&options.output);
            let mut matrices = 0;
            for (name, tensor) in &merged {
                if !is_matrix(name) {
                    assert!(&found[name] == tensor, "{name}");
                    continue;
                }
                matrices += 1;
                let [rows, cols] = tensor.shape[..] else {
                    panic!("{name} is no matrix");
                };
                let halves = tensor.to_f16().unwrap();
                let matrix = QuantisedMatrix::quantise(&halves, rows, cols, bits).unwrap();
                let codes = &found[name];
                assert_eq!(codes.dtype, Dtype::I8);
                assert_eq!(codes.shape, [rows, bits.row_bytes(cols)]);
                assert!(
                    codes.bytes == bytemuck::cast_slice::<i8, u8>(&matrix.codes),
                    "{name}"
                );
                let scales = &found[&format!("{name}_scale")];
                assert_eq!((scales.dtype, &scales.shape[..]), (Dtype::F16, &[rows][..]));
                assert!(scales.to_f16().unwrap() == matrix.scales, "{name}");
            }
            assert_eq!(matrices, 12);
            assert_eq!(found.len(), merged.len() + 12);
            let config = json(&options.output.join("config.json"));
            assert_eq!(config["quantization_bit"], number);
            assert_eq!(config["torch_dtype"], "float16");
        }
    }
}

#[test]
fn a_folder_of_codes_answers_as_the_model_that_is_quantised_while_it_is_read() {
    let tiny = Tiny::new(Generation::ChatGlm2, Dtype::F32);
    for (quantization, _, number) in BOTH {
        let mut options = tiny.options(None, &format!("codes{number}"));
        options.quantization = quantization;
        export(&options).unwrap();
        // The folder stores everything else as halves, so the model to compare with does too.
        let mut halves = tiny.options(None, &format!("halves{number}"));
        halves.dtype = Some(mp_train::export::TorchDtype::Float16);
        export(&halves).unwrap();
        let mut weights = halves.clone();
        weights.model = options.output.clone();
        weights.output = tiny.path(&format!("weights{number}"));
        weights.dtype = None;
        export(&weights).unwrap();
        let from_codes = tiny.answers(&options.output, None);
        assert_eq!(tiny.answers(&weights.output, None), from_codes, "{number}");
    }
}

#[test]
fn codes_become_weights_again_or_stay_what_they_are() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F16);
    let before = tensors(&tiny.model);
    for (quantization, bits, number) in BOTH {
        let mut options = tiny.options(None, &format!("codes{number}"));
        options.quantization = quantization;
        export(&options).unwrap();
        let codes = tensors(&options.output);

        let mut again = options.clone();
        again.model = options.output.clone();
        again.output = tiny.path(&format!("again{number}"));
        export(&again).unwrap();
        assert!(tensors(&again.output) == codes, "codes were made anew");

        let mut plain = again.clone();
        plain.output = tiny.path(&format!("plain{number}"));
        plain.quantization = Quantization::None;
        let adapter = tiny.lora_folder();
        let mut merged = plain.clone();
        merged.output = tiny.path(&format!("merged{number}"));
        merged.adapter = Some(adapter);
        export(&plain).unwrap();
        assert!(export(&merged).unwrap().requantised);
        let weights = tensors(&plain.output);
        for (name, weight) in &weights {
            let original = &before[name];
            let expected = match is_matrix(name) {
                true => {
                    let (rows, cols) = (original.shape[0], original.shape[1]);
                    let halves: Vec<f16> = original.to_f16().unwrap();
                    let matrix = QuantisedMatrix::quantise(&halves, rows, cols, bits).unwrap();
                    let values = matrix.dequantised();
                    let values: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
                    stored(Dtype::F16, &original.shape, &values)
                }
                false => original.clone(),
            };
            assert!(*weight == expected, "{name}");
        }
        assert_eq!(weights.len(), before.len());
        assert!(
            tensors(&merged.output) != weights,
            "the adapter changes nothing"
        );
        let config = json(&plain.output.join("config.json"));
        assert!(config.get("quantization_bit").is_none(), "{config}");
        assert!(config.get("quantization_embeddings").is_none(), "{config}");
    }
}
