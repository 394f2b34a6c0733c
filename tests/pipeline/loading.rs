//! Stages that cannot be loaded.

use std::sync::Arc;

use mp_train::adapter::AdapterError;
use mp_train::backend::cpu::Cpu;
use mp_train::backend::{BackendError, Pulse};
use mp_train::checkpoint::{CheckpointError, HostTensor, TensorInfo, TensorSource};
use mp_train::comm::in_process;
use mp_train::config::run::ScheduleKind;
use mp_train::pipeline::failure::{Cause, Failure};
use mp_train::pipeline::launch::{Blueprint, launch};

use super::{STAGES, blueprint, lora, open, start, within_limit};

/// A source that cannot read one of its tensors.
struct Unreadable {
    inner: Arc<dyn TensorSource>,
    name: String,
    panics: bool,
}

impl TensorSource for Unreadable {
    fn names(&self) -> Vec<String> {
        self.inner.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.inner.info(name)
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        if name != self.name {
            return self.inner.read(name);
        }
        assert!(!self.panics, "planted in {name}");
        Err(CheckpointError::NoSuchTensor {
            path: "planted".into(),
            tensor: name.to_owned(),
        })
    }
}

/// The failure of a launch.
fn fails_to_launch(
    blueprint: Blueprint,
    device: impl Fn(usize, usize, &Arc<Pulse>) -> Result<Cpu<f32>, BackendError> + Send + Sync + 'static,
) -> Failure {
    within_limit(move || {
        let transports = in_process::connect(STAGES);
        launch(blueprint, transports, device).err().unwrap()
    })
}

#[track_caller]
fn assert_failed_loading(failure: &Failure, rank: usize, word: &str) {
    assert_eq!((failure.rank, failure.step), (rank, None), "{failure}");
    assert_eq!(failure.doing, "loading", "{failure}");
    let text = failure.to_string();
    assert!(
        text.starts_with(&format!("stage {rank}, loading on cpu: ")),
        "{text}"
    );
    assert!(text.contains(word), "{text}");
}

#[test]
fn any_stage_may_fail_while_it_loads() {
    let kind = ScheduleKind::OneForwardOneBackward;
    for rank in 0..STAGES {
        for panics in [false, true] {
            let mut unreadable = blueprint(&lora(), kind);
            let block = unreadable.stages[rank].chunks[0].end - 1;
            let name = format!("transformer.layers.{block}.mlp.dense_h_to_4h.weight");
            unreadable.source = Arc::new(Unreadable {
                inner: unreadable.source,
                name: name.clone(),
                panics,
            });
            let failure = fails_to_launch(unreadable, open);
            assert_failed_loading(&failure, rank, &name);
            assert_eq!(matches!(failure.cause, Cause::Panic { .. }), panics);

            let mut without_values = blueprint(&lora(), kind);
            let first = format!(".layers.{block}.");
            let inner = without_values.initial;
            without_values.initial = Box::new(move |spec| {
                if !spec.name.contains(&first) {
                    return inner(spec);
                }
                assert!(!panics, "planted in {}", spec.name);
                Err(AdapterError::NotFinite {
                    file: "planted".into(),
                    name: spec.name.clone(),
                })
            });
            let failure = fails_to_launch(without_values, open);
            assert_failed_loading(&failure, rank, "planted");

            let without_device = blueprint(&lora(), kind);
            let failure = fails_to_launch(without_device, move |index, threads, pulse| {
                if index != rank {
                    return open(index, threads, pulse);
                }
                assert!(!panics, "planted on the device");
                Err(BackendError::OutOfMemory {
                    device: "planted".to_owned(),
                    bytes: 1,
                })
            });
            assert_failed_loading(&failure, rank, "planted");
        }
    }
}

#[test]
fn an_engine_that_is_given_up_ends_its_workers() {
    within_limit(|| {
        let blueprint = blueprint(&lora(), ScheduleKind::Gpipe);
        let source = Arc::downgrade(&blueprint.source);
        let engine = start(blueprint);
        assert!(source.upgrade().is_none(), "files close after loading");
        drop(engine);
    });
}
