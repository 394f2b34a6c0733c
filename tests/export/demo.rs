//! The newcomer's way to the end: the demo's tuned model, merged.

use std::fs;
use std::sync::atomic::AtomicBool;

use mp_train::config::run::{Device, Quantization};
use mp_train::demo::exam::{self, Questions, Verdict};
use mp_train::demo::{self, DemoOptions, Event};
use mp_train::export::ExportOptions;

use super::tiny::export;

/// Half a minute in release.
#[test]
#[ignore = "trains the demo's base and LoRA adapter"]
fn the_demos_tuned_model_merged_answers_as_base_and_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let options = DemoOptions {
        output: folder.path().join("demo"),
        seed: 1,
        threads: 2,
    };
    // Base and LoRA are all that is needed of it.
    let stop = AtomicBool::new(false);
    let mut show = |event: Event| {
        if matches!(&event, Event::Part(part) if part.starts_with("4/4")) {
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    };
    demo::run(&options, &mut show, &stop).unwrap();
    let (model, adapter) = (
        options.output.join("base/model"),
        options.output.join("lora/adapter"),
    );
    let merged = ExportOptions {
        model: model.clone(),
        adapter: Some(adapter.clone()),
        output: folder.path().join("merged"),
        format: None,
        dtype: None,
        quantization: Quantization::None,
        max_shard_size: 200_000,
    };
    let exported = export(&merged).unwrap();
    assert!(exported.files > 1 && exported.merged > 0);
    let questions = Questions::new();
    let ask =
        |model, adapter| exam::ask(model, adapter, &[Device::Cpu], &questions, &options).unwrap();
    let apart = ask(&model, Some(&adapter));
    assert_eq!(ask(&merged.output, None), apart);
    assert!(Verdict::of_tuned(&questions, &apart).passed());
    assert_ne!(ask(&model, None), apart);
    assert!(fs::exists(merged.output.join("ice_text.model")).unwrap());
}
