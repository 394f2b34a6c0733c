//! Whole models: merged, in other types, in several files.

use std::fs;

use half::{bf16, f16};
use mp_train::checkpoint::Dtype;
use mp_train::export::TorchDtype;
use serde_json::{Map, Value, json};

use super::tiny::{ALL, Generation, Tiny, delta, export, json, stored, tensors};

/// The step from one value to the next near `value`.
fn step(dtype: Dtype, value: f64) -> f64 {
    let value = value.abs() as f32;
    match dtype {
        Dtype::F16 => {
            let half = f16::from_f32(value);
            f64::from(f16::from_bits(half.to_bits() + 1).to_f32() - half.to_f32())
        }
        Dtype::Bf16 => {
            let brain = bf16::from_f32(value);
            f64::from(bf16::from_bits(brain.to_bits() + 1).to_f32() - brain.to_f32())
        }
        _ => f64::from(f32::from_bits(value.to_bits() + 1) - value),
    }
}

#[test]
fn a_merged_weight_is_the_sum_rounded_once_and_others_stay() {
    for generation in ALL {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let tiny = Tiny::new(generation, dtype);
            let folder = tiny.lora_folder();
            let lora = tiny.lora(4, 8.0);
            let options = tiny.options(Some(&folder), "merged");
            let exported = export(&options).unwrap();
            assert_eq!(exported.merged, 6);
            let (before, after) = (tensors(&tiny.model), tensors(&options.output));
            assert!(before.keys().eq(after.keys()));
            let mut changed = 0;
            for (name, before) in &before {
                let after = &after[name];
                assert_eq!((after.dtype, &after.shape), (dtype, &before.shape));
                let module = name.strip_suffix(".weight").unwrap_or("");
                let Some(delta) = delta(&lora, module) else {
                    assert!(before == after, "{name}");
                    continue;
                };
                changed += 1;
                let values = before.to_f32().unwrap().into_iter().zip(delta);
                for ((w, delta), found) in values.zip(after.to_f32().unwrap()) {
                    let exact = f64::from(w) + delta;
                    let off = (f64::from(found) - exact).abs();
                    // Half a step of the type, and the sum's own rounding in f32.
                    let allowed = 0.5 * step(dtype, exact) + 1e-6;
                    assert!(off <= allowed, "{name} {dtype}: {found} for {exact}");
                }
            }
            assert_eq!(changed, 6);
        }
    }
}

#[test]
fn a_merged_model_answers_as_model_and_adapter_do() {
    for generation in ALL {
        let tiny = Tiny::new(generation, Dtype::F32);
        let folder = tiny.lora_folder();
        let options = tiny.options(Some(&folder), "merged");
        export(&options).unwrap();
        let apart = tiny.answers(&tiny.model, Some(&folder));
        assert_eq!(tiny.answers(&options.output, None), apart, "{generation:?}");
        assert_ne!(
            tiny.answers(&tiny.model, None),
            apart,
            "the adapter changes nothing"
        );
    }
}

#[test]
fn files_are_as_large_as_asked_and_the_index_finds_everything() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F16);
    let mut options = tiny.options(None, "sharded");
    options.max_shard_size = 12_000;
    let exported = export(&options).unwrap();
    let index = json(&options.output.join("model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    let (before, after) = (tensors(&tiny.model), tensors(&options.output));
    assert!(before == after, "other tensors than before");
    assert!(map.keys().eq(before.keys()), "sorted, and all of them");
    let total: usize = before.values().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(exported.bytes, total as u64);
    assert!(exported.files > 3);
    for file in 1..=exported.files {
        let name = format!("model-{file:05}-of-{:05}.safetensors", exported.files);
        let inside = map.iter().filter(|(_, place)| **place == name);
        let sizes: Vec<usize> = inside.map(|(name, _)| before[name].bytes.len()).collect();
        assert!(!sizes.is_empty(), "{name}");
        assert!(
            sizes.len() == 1 || sizes.iter().sum::<usize>() <= 12_000,
            "{name}"
        );
        assert!(options.output.join(name).is_file());
    }
    assert!(!options.output.join("model.safetensors").exists());
}

#[test]
fn types_are_converted_and_said() {
    let tiny = Tiny::new(Generation::Glm, Dtype::Bf16);
    for (asked, dtype, said) in [
        (None, Dtype::Bf16, "bfloat16"),
        (Some(TorchDtype::Float16), Dtype::F16, "float16"),
        (Some(TorchDtype::Float32), Dtype::F32, "float32"),
    ] {
        let mut options = tiny.options(None, said);
        options.dtype = asked;
        export(&options).unwrap();
        for (name, tensor) in tensors(&options.output) {
            let before = &tensors(&tiny.model)[&name];
            let expected = stored(dtype, &before.shape, &before.to_f32().unwrap());
            assert!(tensor == expected, "{name}");
        }
        let config: Map<String, Value> =
            serde_json::from_value(json(&options.output.join("config.json"))).unwrap();
        let mut expected = tiny.generation.config();
        expected["torch_dtype"] = json!(said);
        let expected = expected.as_object().unwrap();
        assert_eq!(&config, expected);
        assert!(config.keys().eq(expected.keys()), "keys in another order");
    }
}

#[test]
fn values_beyond_a_type_are_refused() {
    let tiny = Tiny::new(Generation::Glm, Dtype::F32);
    let mut all = tensors(&tiny.model);
    let tensor = all.get_mut("model.layers.1.mlp.down_proj.weight").unwrap();
    let mut values = tensor.to_f32().unwrap();
    values[44 * 5 + 3] = 70_000.0;
    *tensor = stored(Dtype::F32, &tensor.shape, &values);
    mp_train::checkpoint::run_state::write_tensors(&tiny.model.join("model.safetensors"), &all)
        .unwrap();
    let mut options = tiny.options(None, "halves");
    options.dtype = Some(TorchDtype::Float16);
    let error = export(&options).unwrap_err().to_string();
    assert!(
        error.contains("model.layers.1.mlp.down_proj.weight") && error.contains("70000 in row 5"),
        "{error}"
    );
    assert!(!options.output.exists());
    options.dtype = Some(TorchDtype::Bfloat16);
    export(&options).unwrap();
}

#[test]
fn what_belongs_to_the_model_goes_with_it() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F16);
    let copied = [
        "generation_config.json",
        "tokenizer_config.json",
        "ice_text.model",
        "modeling_chatglm.py",
        "MODEL_LICENSE",
    ];
    for name in copied {
        fs::write(tiny.model.join(name), name).unwrap();
    }
    for name in ["README.md", "old.bin", ".hidden.py", "optimizer.pt"] {
        fs::write(tiny.model.join(name), name).unwrap();
    }
    // As in Hugging Face's cache.
    let blob = tiny.path("blob");
    fs::write(&blob, "of the cache").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(&blob, tiny.model.join("tokenizer.model")).unwrap();
    fs::create_dir(tiny.model.join("folder.py")).unwrap();
    let adapter = tiny.lora_folder();
    fs::write(adapter.join("template.toml"), "source_prefix = \"\"\n").unwrap();
    let options = tiny.options(Some(&adapter), "merged");
    export(&options).unwrap();
    let mut expected: Vec<String> = copied.map(str::to_owned).to_vec();
    expected.extend(["config.json", "model.safetensors", "template.toml"].map(str::to_owned));
    #[cfg(unix)]
    expected.push("tokenizer.model".to_owned());
    expected.sort();
    assert_eq!(names(&options.output), expected);
    #[cfg(unix)]
    {
        let copy = options.output.join("tokenizer.model");
        assert!(!copy.symlink_metadata().unwrap().is_symlink());
        assert_eq!(fs::read_to_string(copy).unwrap(), "of the cache");
    }
}

fn names(folder: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
    let mut names: Vec<String> = entries.map(|entry| name(entry).unwrap()).collect();
    names.sort();
    names
}

#[test]
fn buffers_that_nobody_reads_stay_as_they_are() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F16);
    let mut all = tensors(&tiny.model);
    let name = "transformer.layers.2.attention.rotary_emb.inv_freq";
    all.insert(
        name.to_owned(),
        stored(Dtype::F32, &[4], &[1.0, 0.1, 0.01, 1e-3]),
    );
    mp_train::checkpoint::run_state::write_tensors(&tiny.model.join("model.safetensors"), &all)
        .unwrap();
    let mut options = tiny.options(None, "same");
    options.dtype = Some(TorchDtype::Float16);
    export(&options).unwrap();
    assert!(tensors(&options.output) == all);
}
