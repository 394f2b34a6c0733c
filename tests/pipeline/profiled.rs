//! Measured steps: the same bits as others, and a record of everything that was done.

use std::sync::Arc;

use mp_train::adapter::ParameterState;
use mp_train::backend::cuda::{Cuda, nccl};
use mp_train::backend::{Backend, BackendError, Pulse};
use mp_train::comm::{Flow, Transport, in_process, nccl as nccl_transport, peer_copy};
use mp_train::config::run::{Device, Recompute, ScheduleKind};
use mp_train::pipeline::launch::{Blueprint, launch};
use mp_train::pipeline::messages::StepOutcome;
use mp_train::pipeline::profile::{ActionSpan, SpanKind, StageProfile, StepProfile};
use mp_train::pipeline::schedule::{Schedule, Transfers};

use super::cuda_emulator::{self, Emulator};
use super::{MICRO_BATCHES, base, blueprint, lora, open, step_plan};

/// Of which the first is never measured.
const STEPS: u64 = 2;

/// Three stages under each schedule that needs no chunks, and two with two chunks each.
fn blueprints() -> Vec<Blueprint> {
    let mut interleaved = blueprint(&lora(), ScheduleKind::Gpipe);
    interleaved.devices.truncate(2);
    interleaved.recompute = vec![Recompute::Block; 2];
    interleaved.stages = base().stages(&[Device::Cpu; 2], 2, None, 1.0).unwrap();
    interleaved.schedule = Schedule::interleaved(2, 2, MICRO_BATCHES).unwrap();
    vec![
        blueprint(&lora(), ScheduleKind::OneForwardOneBackward),
        blueprint(&lora(), ScheduleKind::Gpipe),
        interleaved,
    ]
}

/// What a run came to, and the profiles of those steps that were measured.
#[derive(Debug)]
struct Run {
    outcomes: Vec<StepOutcome>,
    states: Vec<ParameterState>,
    profiles: Vec<StepProfile>,
}

/// A few steps, of which those after the first are measured if asked for.
fn run<B, T>(
    blueprint: Blueprint,
    transports: Vec<T>,
    device: impl Fn(usize, usize, &Arc<Pulse>) -> Result<B, BackendError> + Send + Sync + 'static,
    measure: bool,
) -> Run
where
    B: Backend,
    T: Transport<B> + Send + 'static,
{
    let mut engine = launch(blueprint, transports, device).unwrap();
    let (mut outcomes, mut profiles) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        outcomes.push(match measure && step > 0 {
            false => engine.step(step_plan(step)).unwrap(),
            true => {
                let (outcome, profile) = engine.profile_step(step_plan(step)).unwrap();
                profiles.push(profile);
                outcome
            }
        });
    }
    Run {
        outcomes,
        states: engine.snapshot().unwrap(),
        profiles,
    }
}

/// Runs every schedule with and without measuring, and looks at the profiles.
fn same_bits<B, T>(
    what: &str,
    transfers: Transfers,
    transports: impl Fn(usize) -> Vec<T>,
    device: fn(usize, usize, &Arc<Pulse>) -> Result<B, BackendError>,
) where
    B: Backend,
    T: Transport<B> + Send + 'static,
{
    for (plain, measured) in blueprints().into_iter().zip(blueprints()) {
        let schedule = measured.schedule.clone();
        let (kind, stages) = (schedule.kind, schedule.stages.len());
        let plain = run(plain, transports(stages), device, false);
        let measured = run(measured, transports(stages), device, true);
        assert_eq!(plain.outcomes, measured.outcomes, "{what}, {kind:?}");
        assert_eq!(plain.states, measured.states, "{what}, {kind:?}");
        assert!(plain.profiles.is_empty());
        assert_eq!(measured.profiles.len() as u64, STEPS - 1);
        for profile in &measured.profiles {
            is_whole(profile, &schedule);
        }
        let times = schedule.action_times(&measured.profiles);
        let predicted = schedule.predict_measured(transfers, &times);
        let busiest = times.actions.iter().map(|times| times.iter().sum::<f64>());
        let busiest = busiest.fold(0.0, f64::max);
        assert!(busiest > 0.0, "{times:?}");
        assert!(predicted.step_seconds >= busiest, "{predicted:?} {times:?}");
        assert!(predicted.idle.iter().all(|idle| (0.0..1.0).contains(idle)));
    }
}

/// Every action of every stage in order, nothing twice at once, and no time that is not accounted for.
fn is_whole(profile: &StepProfile, schedule: &Schedule) {
    assert_eq!(profile.stages.len(), schedule.stages.len());
    let begins = profile.stages.iter().map(|stage| stage.spans[0].begin);
    // GPUs begin when they have told the host so, and the host counts.
    assert!(begins.fold(f64::MAX, f64::min) < 0.5 * profile.seconds);
    let mut end = 0.0f64;
    for (rank, stage) in profile.stages.iter().enumerate() {
        let StageProfile { spans, work } = stage;
        let runs = spans.iter().filter_map(|span| match span.what {
            SpanKind::Run(action) => Some(action),
            _ => None,
        });
        assert_eq!(runs.collect::<Vec<_>>(), schedule.stages[rank]);
        let count = |kind| spans.iter().filter(|span| span.what == kind).count();
        assert_eq!(count(SpanKind::Agree), 1);
        assert_eq!(count(SpanKind::Update), 2);
        let waits = count(SpanKind::Wait(Flow::Forward)) + count(SpanKind::Wait(Flow::Backward));
        assert_eq!(waits, schedule.stages[rank].len());
        assert!(spans[0].begin >= 0.0);
        for pair in spans.windows(2) {
            assert!(pair[0].begin <= pair[0].end && pair[0].end <= pair[1].begin + 1e-12);
            assert!(pair[1].begin - pair[0].end < 2e-6, "{pair:?}");
        }
        let seconds: f64 = spans.iter().map(ActionSpan::seconds).sum();
        // What is gone into ops cannot be more than the time that passed.
        assert!(work.total() <= 1.001 * seconds + 1e-4, "{work:?} {seconds}");
        assert!(work.total() >= 0.999 * seconds, "{work:?} {seconds}");
        let parts = [
            work.products,
            work.attention,
            work.elementwise,
            work.optimizer,
        ];
        assert!(parts.iter().all(|&seconds| seconds > 0.0), "{work:?}");
        assert_eq!(
            work.loss > 0.0,
            rank + 1 == schedule.stages.len(),
            "{work:?}"
        );
        assert!((0.0..1.0).contains(&profile.idle(rank)));
        end = end.max(spans.last().unwrap().end);
    }
    assert_eq!(profile.seconds, end);
    assert!((0.0..1.0).contains(&profile.bubble()));
}

#[test]
fn a_measured_step_on_the_cpu() {
    same_bits("cpu", Transfers::Buffered, in_process::connect, open);
}

#[test]
fn a_measured_step_on_pretend_gpus() {
    if cuda_emulator::on_this_gpu() {
        return;
    }
    let Some(emulator) = Emulator::build() else {
        return;
    };
    let loaded = emulator.load_here();
    loaded.set("EMULATOR_DEVICES", "2");
    let gpu = |rank: usize, _: usize, pulse: &Arc<Pulse>| Cuda::with_pulse(rank as u32 % 2, pulse);
    for streams in ["late", "early"] {
        loaded.set("EMULATOR_STREAMS", streams);
        let what = format!("peer copies, {streams}");
        same_bits(&what, Transfers::Mailbox, peer_copy::connect, gpu);
    }
    let nccl = nccl().unwrap();
    // NCCL wants a GPU of its own for every rank.
    loaded.set("EMULATOR_DEVICES", "3");
    let gpu = |rank: usize, _: usize, pulse: &Arc<Pulse>| Cuda::with_pulse(rank as u32, pulse);
    let connect = |stages| nccl_transport::connect(nccl, stages).unwrap();
    same_bits("nccl", Transfers::Grouped, connect, gpu);
}
