//! A rehearsal leaves no trace: steps after it are those without it, to the bit.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mp_train::adapter::initial::initial_values;
use mp_train::adapter::{ParameterSpec, ParameterState};
use mp_train::config::run::{
    AdapterSection, Device, FullSection, LoraSection, LossNormalisation, LrSchedule,
    OptimizerSection, Precision, PrefixSection, ProductSums, Quantization, Recompute,
    RotaryPrecision, ScheduleKind, TransportKind,
};
use mp_train::data::batch::MicroBatch;
use mp_train::data::rows::{RawRow, Rows};
use mp_train::model::trainables::Trainables;
use mp_train::pipeline::base::Base;
use mp_train::pipeline::cost::TypicalBatch;
use mp_train::pipeline::fit::Demand;
use mp_train::pipeline::launch::Engine;
use mp_train::pipeline::messages::StepPlan;
use mp_train::pipeline::needs::DeviceMemory;
use mp_train::pipeline::rehearsal::Rehearsal;

use super::cuda_emulator::Emulator;

const MICRO_BATCHES: usize = 4;
/// Of the largest micro-batch: more than any of the steps has.
const LARGEST: (usize, usize) = (40, 3);

fn optimizer() -> OptimizerSection {
    OptimizerSection {
        learning_rate: 1e-3,
        lr_schedule: LrSchedule::Constant,
        warmup_steps: 0,
        weight_decay: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: 1.0,
        loss_normalisation: LossNormalisation::PerToken,
        initial_loss_scale: 1024.0,
        max_skipped_steps: 1,
    }
}

fn adapters() -> [AdapterSection; 3] {
    [
        AdapterSection::Lora(LoraSection {
            r: 2,
            lora_alpha: 4.0,
            lora_dropout: 0.1,
            target_modules: vec!["query_key_value".to_owned(), "dense_4h_to_h".to_owned()],
            init_adapter: None,
        }),
        AdapterSection::Prefix(PrefixSection {
            pre_seq_len: 3,
            prefix_projection: true,
            prefix_dropout: 0.1,
            init_adapter: None,
        }),
        AdapterSection::Full(FullSection {}),
    ]
}

/// A run of the golden model whose embedding and head are one matrix.
struct Run {
    devices: Vec<Device>,
    precision: Precision,
    schedule: ScheduleKind,
    recompute: Recompute,
}

impl Run {
    fn demand(&self) -> Demand {
        Demand {
            devices: self.devices.clone(),
            transport: TransportKind::P2p,
            balance: None,
            precision: self.precision,
            rotary_table: RotaryPrecision::F32,
            product_sums: ProductSums::F32,
            schedule: self.schedule,
            virtual_stages: match self.schedule {
                ScheduleKind::Interleaved => 2,
                _ => 1,
            },
            micro_batches: MICRO_BATCHES,
            recompute: self.recompute,
            threads: 1,
            stall_timeout: Duration::from_secs(120),
            max_rows: LARGEST.0,
            max_sequences: LARGEST.1,
            typical: TypicalBatch::new(2.0, 7.0, 0.5),
        }
    }

    /// Losses and norms of two steps, and what is trained after them.
    fn steps(&self, adapter: &AdapterSection, rehearsed: bool) -> (Vec<u32>, Vec<ParameterState>) {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b/model");
        let mut base = Base::open(&model, Quantization::None).unwrap();
        base.head_source.head = base.head_source.embedding;
        base.head_source.tied = true;
        let trainables = Trainables::new(&base.config, adapter, true).unwrap();
        let demand = self.demand();
        let memory = DeviceMemory::of(&demand.devices, None, demand.transport).unwrap();
        let fitted = demand.fit(&base.config, &trainables, &memory).unwrap();
        let source = Arc::clone(&base.source);
        let initial = move |spec: &ParameterSpec| {
            let values = match initial_values(spec, 1) {
                Some(values) => values,
                None => spec.cut(&source.read(&spec.name)?.to_f32()?),
            };
            Ok(ParameterState::fresh(values))
        };
        let mut engine: Engine = base
            .start(&fitted.layout, trainables, Box::new(initial))
            .unwrap();
        if rehearsed {
            let layout = &fitted.layout;
            let rehearsal = Rehearsal::of(layout, &base.config, &optimizer(), 1024.0).unwrap();
            let in_flight = |rank| {
                (
                    layout.schedule.in_flight(rank),
                    rehearsal.schedule.in_flight(rank),
                )
            };
            for rank in 0..self.devices.len() {
                let (full, tried) = in_flight(rank);
                assert_eq!(full, tried, "stage {rank}");
            }
            let largest = &rehearsal.step.micro_batches[0];
            assert_eq!((largest.tokens(), largest.sequences.len()), LARGEST);
            engine.rehearse(rehearsal).unwrap();
        }
        let mut numbers = Vec::new();
        for step in 0..2 {
            let outcome = engine.step(self.step_plan(&base, step)).unwrap();
            assert!(outcome.applied, "{adapter:?}");
            numbers.extend(outcome.loss_sums.iter().map(|loss| loss.to_bits()));
            numbers.push(outcome.grad_norm.to_bits());
        }
        (numbers, engine.snapshot().unwrap())
    }

    fn step_plan(&self, base: &Base, step: u64) -> StepPlan {
        let config = &base.config;
        let context = config.context_ids.unwrap();
        let [mask, sop, eop] = [
            context.gmask_token_id,
            context.bos_token_id,
            config.eos_token_ids[0],
        ]
        .map(i64::from);
        let micro_batches = (0..MICRO_BATCHES as i64).map(|index| {
            let mut rows = Rows::default();
            for row in 0..2 {
                let row = RawRow {
                    input_ids: vec![10 + index, 20 + row, mask, sop, 30 + index, 40 + row, eop],
                    labels: vec![-100, -100, -100, sop, 30 + index, 40 + row, eop],
                    ..RawRow::default()
                };
                rows.push(&row, config).unwrap();
            }
            MicroBatch::from_rows((0..2).map(|row| rows.get(row).unwrap()))
        });
        StepPlan {
            step,
            updates: step,
            learning_rate: 1e-3,
            loss_scale: match self.precision {
                Precision::F32 => 1.0,
                Precision::F16 => 16.0,
            },
            micro_batches: micro_batches.collect(),
            target_weights: vec![1.0 / 32.0; MICRO_BATCHES],
            optimizer: optimizer(),
            seed: 5,
        }
    }

    fn rehearsal_leaves_no_trace(&self) {
        for adapter in adapters() {
            let (numbers, states) = self.steps(&adapter, false);
            let (after, states_after) = self.steps(&adapter, true);
            let what = format!("{:?}, {:?}, {adapter:?}", self.devices, self.schedule);
            assert_eq!(numbers, after, "{what}");
            assert!(states == states_after, "{what}");
        }
    }
}

#[test]
fn a_rehearsal_on_the_cpu_leaves_no_trace() {
    use ScheduleKind::{Gpipe, Interleaved, OneForwardOneBackward};
    for (stages, schedule, recompute) in [
        (1, OneForwardOneBackward, Recompute::None),
        (3, OneForwardOneBackward, Recompute::AttentionFree),
        (2, Gpipe, Recompute::Block),
        (2, Interleaved, Recompute::None),
    ] {
        Run {
            devices: vec![Device::Cpu; stages],
            precision: Precision::F32,
            schedule,
            recompute,
        }
        .rehearsal_leaves_no_trace();
    }
}

#[test]
fn a_rehearsal_on_gpus_leaves_no_trace() {
    let Some(emulator) = Emulator::build() else {
        return;
    };
    let loaded = emulator.load_here();
    loaded.set("EMULATOR_DEVICES", "2");
    Run {
        devices: vec![Device::Cuda(0), Device::Cuda(1)],
        precision: Precision::F16,
        schedule: ScheduleKind::OneForwardOneBackward,
        recompute: Recompute::AttentionFree,
    }
    .rehearsal_leaves_no_trace();
}
