//! The reference folders of all generations: what comes out of them holds the reference's numbers.

use std::path::{Path, PathBuf};

use mp_train::checkpoint::{LoraFiles, PrefixFiles, open_tensor_file, read_all};
use mp_train::config::run::Quantization;
use mp_train::export::{ExportOptions, TorchDtype};

use super::tiny::{answers, export, tensors};

fn golden(rest: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(rest)
}

fn options(model: &str, adapter: Option<&str>, output: &Path) -> ExportOptions {
    ExportOptions {
        model: golden(model),
        adapter: adapter.map(golden),
        output: output.to_owned(),
        format: None,
        dtype: Some(TorchDtype::Float32),
        quantization: Quantization::None,
        max_shard_size: 50_000,
    }
}

#[test]
fn every_folder_merged_answers_as_model_and_adapter() {
    let chatglm: Vec<u32> = vec![20, 35, 7, 110, 191, 194];
    let later: Vec<u32> = vec![20, 35, 7, 110, 64];
    for (model, adapter, prompt) in [
        ("chatglm-6b/model", "chatglm-6b/adapter_lora_all", &chatglm),
        (
            "chatglm-6b/model_bin",
            "chatglm-6b/adapter_lora_all",
            &chatglm,
        ),
        ("chatglm2-6b/model", "chatglm2-6b/adapters/lora_all", &later),
        (
            "chatglm2-6b/model_bin",
            "chatglm2-6b/adapters/lora_qkv_bin",
            &later,
        ),
        ("glm-4-9b/model", "glm-4-9b/adapters/lora_all", &later),
        ("glm-4-9b/model_bf16", "glm-4-9b/adapters/lora_attn", &later),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let options = options(model, Some(adapter), &folder.path().join("merged"));
        let exported = export(&options).unwrap();
        assert!(exported.files > 1 && exported.merged >= 4, "{model}");
        let prompts = [
            prompt.clone(),
            prompt.iter().rev().skip(2).chain(prompt).copied().collect(),
        ];
        let adapter = options.adapter.as_deref();
        let apart = answers(&options.model, adapter, &prompts);
        assert_eq!(answers(&options.output, None, &prompts), apart, "{model}");
    }
}

#[test]
fn both_layouts_of_glm_4_go_out_as_they_are() {
    for model in ["glm-4-9b/model_bf16", "glm-4-9b/model_chatglm_layout"] {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(model, None, &folder.path().join("same"));
        options.dtype = None;
        export(&options).unwrap();
        assert!(
            tensors(&options.output) == tensors(&options.model),
            "{model}"
        );
    }
}

#[test]
fn codes_and_scales_are_those_of_the_reference() {
    for (family, lead) in [("chatglm-6b", ""), ("chatglm2-6b", "quantized.")] {
        for (quantization, case) in [
            (Quantization::Int8, "quant_int8"),
            (Quantization::Int4, "quant_int4"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let mut options = options(
                &format!("{family}/model"),
                None,
                &folder.path().join("codes"),
            );
            options.dtype = None;
            options.quantization = quantization;
            export(&options).unwrap();
            let found = tensors(&options.output);
            let path = golden(&format!("{family}/cases/{case}.safetensors"));
            let expected = read_all(open_tensor_file(&path).unwrap().as_ref()).unwrap();
            let mut compared = 0;
            for (name, tensor) in &expected {
                let Some(name) = name.strip_prefix(lead) else {
                    continue;
                };
                if name.ends_with(".weight") && name.contains(".layers.")
                    || name.ends_with(".weight_scale")
                {
                    assert!(found[name] == *tensor, "{family} {case} {name}");
                    compared += 1;
                }
            }
            assert_eq!(compared, 32, "{family} {case}: 16 layers, codes and scales");
        }
    }
}

#[test]
fn adapters_of_other_programs_are_read_in_every_form() {
    let read = |rest: &str| LoraFiles::read(&golden(rest)).unwrap();
    let (bin, safe) = (
        read("chatglm2-6b/adapters/lora_qkv_bin"),
        read("chatglm2-6b/adapters/lora_qkv"),
    );
    assert!(bin == safe, "the .bin folder holds the same adapter");
    for prefix in [
        "chatglm-6b/ptuning_checkpoint",
        "chatglm-6b/ptuning_projection_checkpoint",
        "chatglm2-6b/prefix/plain",
        "chatglm2-6b/prefix/projection",
    ] {
        let family = prefix.split('/').next().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(
            &format!("{family}/model"),
            Some(prefix),
            &folder.path().join("thudm"),
        );
        options.dtype = None;
        export(&options).unwrap();
        std::fs::remove_file(options.output.join("prefix.safetensors")).unwrap();
        let (theirs, again) = (
            PrefixFiles::read(&golden(prefix)).unwrap(),
            PrefixFiles::read(&options.output).unwrap(),
        );
        assert!(theirs == again, "{prefix}");
    }
}
