//! Workers that fail, at every place where one can: the run ends with the stage, the step and the
//! action, and nothing hangs.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::mpsc;
use std::sync::{Arc, Once};
use std::time::Duration;

use mp_train::adapter::initial::initial_values;
use mp_train::adapter::{ParameterSpec, ParameterState};
use mp_train::backend::cpu::Cpu;
use mp_train::backend::{BackendError, Pulse};
use mp_train::checkpoint::TensorSource;
use mp_train::comm::in_process;
use mp_train::config::run::{
    AdapterSection, Device, LoraSection, LossNormalisation, LrSchedule, OptimizerSection,
    PrefixSection, ProductSums, Quantization, Recompute, ScheduleKind,
};
use mp_train::data::batch::MicroBatch;
use mp_train::data::rows::{RawRow, Rows};
use mp_train::model::rotary::RotaryPrecision;
use mp_train::model::trainables::Trainables;
use mp_train::pipeline::base::Base;
use mp_train::pipeline::failure::Failure;
use mp_train::pipeline::launch::{Blueprint, Engine, InitialValues, launch};
use mp_train::pipeline::messages::StepPlan;
use mp_train::pipeline::schedule::{Operation, Schedule};

#[path = "cuda_emulator/mod.rs"]
mod cuda_emulator;
#[path = "pipeline/faulty_backend.rs"]
mod faulty_backend;
#[path = "pipeline/faulty_transport.rs"]
mod faulty_transport;
#[path = "pipeline/hung.rs"]
mod hung;
#[path = "pipeline/killed.rs"]
mod killed;
#[path = "pipeline/loading.rs"]
mod loading;
#[path = "pipeline/profiled.rs"]
mod profiled;
#[path = "pipeline/spoiled.rs"]
mod spoiled;
#[path = "pipeline/steps.rs"]
mod steps;
#[path = "pipeline/transfers.rs"]
mod transfers;

const STAGES: usize = 3;
const MICRO_BATCHES: usize = 4;
/// Far beyond what any run here takes, so that only a hang reaches it.
const LIMIT: Duration = Duration::from_secs(120);
/// Silence that counts as a hang, in the tests that hang; far beyond what a step here takes.
const BOUND: Duration = Duration::from_secs(2);

/// Gives the result of `work`, or fails when it takes for ever. Workers that panic here do so quietly.
fn within_limit<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            if !thread.name().is_some_and(|name| name.starts_with("stage-")) {
                loud(info);
            }
        }));
    });
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(LIMIT).expect("hangs, or panicked")
}

fn base() -> Base {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b");
    Base::open(&golden.join("model"), Quantization::None).unwrap()
}

fn lora() -> AdapterSection {
    AdapterSection::Lora(LoraSection {
        r: 2,
        lora_alpha: 4.0,
        lora_dropout: 0.1,
        target_modules: vec!["query_key_value".to_owned(), "dense_4h_to_h".to_owned()],
        init_adapter: None,
    })
}

fn prefix(prefix_projection: bool) -> AdapterSection {
    AdapterSection::Prefix(PrefixSection {
        pre_seq_len: 3,
        prefix_projection,
        prefix_dropout: 0.1,
        init_adapter: None,
    })
}

/// Values by the seed, or of the base model.
fn initial(source: Arc<dyn TensorSource>) -> InitialValues {
    Box::new(move |spec: &ParameterSpec| {
        let values = match initial_values(spec, 1) {
            Some(values) => values,
            None => spec.cut(&source.read(&spec.name)?.to_f32()?),
        };
        Ok(ParameterState::fresh(values))
    })
}

fn blueprint(adapter: &AdapterSection, kind: ScheduleKind) -> Blueprint {
    let base = base();
    let tied = matches!(adapter, AdapterSection::Full(_));
    let mut head_source = base.head_source.clone();
    if tied {
        head_source.head = head_source.embedding;
        head_source.tied = true;
    }
    Blueprint {
        trainables: Trainables::new(&base.config, adapter, tied).unwrap(),
        stages: base.stages(&[Device::Cpu; STAGES], 1, None, 1.0).unwrap(),
        devices: vec![Device::Cpu; STAGES],
        schedule: Schedule::build(kind, STAGES, 1, MICRO_BATCHES).unwrap(),
        recompute: vec![Recompute::AttentionFree; STAGES],
        initial: initial(Arc::clone(&base.source)),
        max_rows: 24,
        max_sequences: 2,
        rotary: RotaryPrecision::F32,
        product_sums: ProductSums::F32,
        threads: 2,
        stall_timeout: LIMIT,
        config: base.config,
        source: base.source,
        head_source,
    }
}

/// A step of four micro-batches of two rows each.
fn step_plan(step: u64) -> StepPlan {
    let config = base().config;
    let context = config.context_ids.unwrap();
    let (mask, sop, eop) = (
        i64::from(context.gmask_token_id),
        i64::from(context.bos_token_id),
        i64::from(config.eos_token_ids[0]),
    );
    let micro_batches = (0..MICRO_BATCHES as i64).map(|index| {
        let mut rows = Rows::default();
        for row in 0..2 {
            let row = RawRow {
                input_ids: vec![10 + index, 20 + row, mask, sop, 30 + index, 40 + row, eop],
                labels: vec![-100, -100, -100, sop, 30 + index, 40 + row, eop],
                ..RawRow::default()
            };
            rows.push(&row, &config).unwrap();
        }
        MicroBatch::from_rows((0..2).map(|row| rows.get(row).unwrap()))
    });
    StepPlan {
        step,
        updates: step,
        learning_rate: 1e-3,
        loss_scale: 1.0,
        micro_batches: micro_batches.collect(),
        target_weights: vec![1.0 / 32.0; MICRO_BATCHES],
        optimizer: OptimizerSection {
            learning_rate: 1e-3,
            lr_schedule: LrSchedule::Constant,
            warmup_steps: 0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
            loss_normalisation: LossNormalisation::PerToken,
            initial_loss_scale: 65_536.0,
            max_skipped_steps: 1,
        },
        seed: 5,
    }
}

fn start(blueprint: Blueprint) -> Engine {
    let transports = in_process::connect(STAGES);
    launch(blueprint, transports, open).unwrap()
}

/// The backend of a stage.
fn open(_: usize, threads: usize, pulse: &Arc<Pulse>) -> Result<Cpu<f32>, BackendError> {
    Cpu::with_pulse(threads, pulse)
}

/// A call that never returns.
fn for_ever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3_600));
    }
}

/// What the operations of a stage's program are called in messages, and what comes after them.
fn names(schedule: &Schedule, rank: usize) -> Vec<String> {
    let mut last = None;
    let mut names = Vec::new();
    for operation in schedule.program(rank) {
        names.push(match (operation, &last) {
            (Operation::Run(action), _) => last.insert(action.to_string()).clone(),
            (Operation::Exchange { .. }, Some(last)) => format!("exchange after {last}"),
            (Operation::Exchange { .. }, None) => "first exchange".to_owned(),
        });
    }
    names.extend(["update".to_owned(), "update".to_owned()]);
    names
}

/// The failure of the first step.
fn fails_in_first_step(blueprint: Blueprint, plan: StepPlan) -> Failure {
    within_limit(move || {
        let mut engine = start(blueprint);
        let failure = engine.step(plan).unwrap_err();
        assert!(engine.step(step_plan(1)).is_err());
        failure
    })
}
