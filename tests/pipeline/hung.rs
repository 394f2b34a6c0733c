//! Stages that hang or fall silent: each ends the run within the bound and some seconds, with the name of
//! the one to blame.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mp_train::backend::Pulse;
use mp_train::backend::cpu::Cpu;
use mp_train::checkpoint::{CheckpointError, HostTensor, TensorInfo, TensorSource};
use mp_train::comm::in_process;
use mp_train::config::run::{AdapterSection, FullSection, ScheduleKind};
use mp_train::pipeline::failure::{Cause, Failure, Stall};
use mp_train::pipeline::launch::{Blueprint, Engine, launch};
use mp_train::pipeline::place::Place;
use mp_train::pipeline::schedule::{Action, Schedule};

use super::faulty_backend::{Hook, Moment, Then};
use super::faulty_transport::{Fault, How, connect};
use super::killed::{moments, start};
use super::transfers::transfers;
use super::{
    BOUND, MICRO_BATCHES, STAGES, blueprint, for_ever, lora, names, open, step_plan, within_limit,
};

/// What a hang may cost beside the bound.
const BESIDE: Duration = Duration::from_secs(10);

/// A blueprint that the stages of a hanging run are made from: a thread each, and little patience.
fn impatient(adapter: &AdapterSection, kind: ScheduleKind) -> Blueprint {
    Blueprint {
        threads: STAGES,
        stall_timeout: BOUND,
        ..blueprint(adapter, kind)
    }
}

/// What the watch saw of a failure.
#[track_caller]
fn stall(failure: &Failure) -> &Stall {
    match &failure.cause {
        Cause::Stalled { silent, stall } => {
            assert!(*silent >= BOUND, "{failure}");
            assert!(failure.is_machine(), "{failure}");
            stall
        }
        cause => panic!("{failure}: {cause:?}"),
    }
}

/// The failure of the second step of an engine, which then is of no use and is dropped, all in time.
fn hangs_in_second_step(
    engine: impl FnOnce() -> Result<Engine, Failure> + Send + 'static,
) -> Failure {
    within_limit(move || {
        let mut engine = engine().unwrap();
        assert!(engine.step(step_plan(0)).unwrap().applied);
        let began = Instant::now();
        let failure = engine.step(step_plan(1)).unwrap_err();
        assert!(matches!(
            engine.step(step_plan(2)).unwrap_err().cause,
            Cause::Over
        ));
        drop(engine);
        let took = began.elapsed();
        assert!(took < BOUND + BESIDE, "{took:?}: {failure}");
        failure
    })
}

/// Runs some tests at once: they do nothing but wait.
fn at_once<C: Send + Clone + 'static>(cases: &[C], test: impl Fn(C) + Send + Clone + 'static) {
    let running: Vec<_> = cases
        .iter()
        .map(|case| {
            let (case, test) = (case.clone(), test.clone());
            std::thread::spawn(move || test(case))
        })
        .collect();
    for test in running {
        test.join().unwrap();
    }
}

/// Some of many, the same in every run.
fn some<C: Clone>(all: Vec<C>, count: usize) -> Vec<C> {
    // Knuth's multiplicative hash of the counted numbers.
    let place = |index: usize| ((index * 2_654_435_761) >> 7) % all.len();
    (1..=count).map(|index| all[place(index)].clone()).collect()
}

#[test]
fn a_thread_may_hang_at_any_action() {
    let kind = ScheduleKind::OneForwardOneBackward;
    let all: Vec<(usize, Place)> = moments(&lora(), kind).into_iter().collect();
    let update = *all.iter().rev().find(|(rank, _)| *rank == 1).unwrap();
    let mut cases = some(all, 7);
    cases.push(update);
    at_once(&cases, move |(rank, place)| {
        let hook: Hook =
            Arc::new(
                move |moment: Moment| match (moment.rank, moment.place) == (rank, place) {
                    true => for_ever(),
                    false => Ok(Then::Compute),
                },
            );
        let blueprint = impatient(&lora(), kind);
        let name = names(&blueprint.schedule, rank)[place.operation].clone();
        let failure = hangs_in_second_step(move || start(blueprint, hook));
        let seen = (failure.rank, failure.step, failure.doing.clone());
        assert_eq!(seen, (rank, Some(2), name), "{failure}");
        assert!(matches!(stall(&failure), Stall::Thread { .. }), "{failure}");
        let text = failure.to_string();
        assert!(text.contains("does not come back from a call"), "{text}");
    });
}

#[test]
fn stages_that_wait_for_their_turn_are_not_to_blame() {
    // One thread for all stages, and the one that has it hangs.
    at_once(&[1, 2], |rank| {
        let kind = ScheduleKind::Gpipe;
        let hook: Hook = Arc::new(move |moment: Moment| {
            let here = moment.rank == rank && moment.place.command == super::killed::SECOND_STEP;
            match here && moment.op == "attention" {
                true => for_ever(),
                false => Ok(Then::Compute),
            }
        });
        let blueprint = Blueprint {
            threads: 1,
            ..impatient(&lora(), kind)
        };
        let failure = hangs_in_second_step(move || start(blueprint, hook));
        let seen = (failure.rank, failure.doing.as_str());
        assert_eq!(seen, (rank, "F0"), "{failure}");
        stall(&failure);
    });
}

#[test]
fn a_transfer_may_hang() {
    let kind = ScheduleKind::OneForwardOneBackward;
    let full = AdapterSection::Full(FullSection {});
    let schedule = Schedule::build(kind, STAGES, 1, MICRO_BATCHES).unwrap();
    let mut all = Vec::new();
    for (rank, at_the_end) in [2, 1, 2].into_iter().enumerate() {
        let calls = transfers(&schedule, rank, at_the_end);
        for (place, doing) in calls.iter().enumerate() {
            let call = 1 + calls.len() + place;
            all.push((rank, call, doing.clone()));
        }
    }
    let (ends, transfers): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(_, _, doing)| doing == "update");
    let mut cases = Vec::new();
    for (rank, call, doing) in some(transfers, 8).into_iter().chain(some(ends, 3)) {
        cases.push((
            Fault {
                rank,
                call,
                how: How::Hang,
            },
            doing.clone(),
        ));
        cases.push((
            Fault {
                rank,
                call,
                how: How::Wait,
            },
            doing,
        ));
    }
    at_once(&cases, move |(fault, doing)| {
        let blueprint = impatient(&full, kind);
        let failure = hangs_in_second_step(move || launch(blueprint, connect(fault), open));
        let what = format!("{fault:?} in {doing}: {failure}");
        let stall = stall(&failure);
        // Stages that only wait at the end of a step look all alike.
        if (fault.how, doing.as_str()) == (How::Wait, "update") {
            assert_eq!(failure.doing, "update", "{what}");
            assert!(matches!(stall, Stall::Circle { .. }), "{what}");
            return;
        }
        let seen = (failure.rank, failure.step, &failure.doing);
        assert_eq!(seen, (fault.rank, Some(2), &doing), "{what}");
        assert_eq!(
            matches!(stall, Stall::Thread { .. }),
            fault.how == How::Hang,
            "{what}"
        );
    });
}

#[test]
fn what_was_sent_and_never_arrives_is_told_as_such() {
    let kind = ScheduleKind::OneForwardOneBackward;
    let schedule = Schedule::build(kind, STAGES, 1, MICRO_BATCHES).unwrap();
    let calls = transfers(&schedule, 1, 1);
    let place = calls.iter().position(|doing| doing == "F2").unwrap();
    let fault = Fault {
        rank: 1,
        call: 1 + calls.len() + place,
        how: How::Wait,
    };
    let blueprint = impatient(&lora(), kind);
    let failure = hangs_in_second_step(move || launch(blueprint, connect(fault), open));
    assert_eq!(
        *stall(&failure),
        Stall::Transfer { from: vec![0] },
        "{failure}"
    );
    let told = "stage 1, step 2, F2 on cpu: no sign of life for 2 s: nothing arrives from stage 0, which \
                has sent it";
    assert_eq!(failure.to_string(), told);
}

#[test]
fn stages_that_wait_for_each_other_are_named() {
    // Stage 0 wants the first gradient before it goes on, stage 1 all activations.
    let mut blueprint = impatient(&lora(), ScheduleKind::Gpipe);
    blueprint.schedule.stages[0] = (0..MICRO_BATCHES)
        .flat_map(|index| [Action::forward(index, 0), Action::backward(index, 0)])
        .collect();
    let failure = within_limit(move || {
        let transports = in_process::connect(STAGES);
        let mut engine = launch(blueprint, transports, open).unwrap();
        engine.step(step_plan(0)).unwrap_err()
    });
    let Stall::Circle { waits } = stall(&failure) else {
        panic!("{failure}");
    };
    let expected =
        "stage 0 at B0 for stage 1, stage 1 at F1 for stage 0, stage 2 at F1 for stage 1";
    assert_eq!(waits, expected);
}

/// The failure of a launch that hangs, which ends in time.
fn hangs_at_launch(engine: impl FnOnce() -> Result<Engine, Failure> + Send + 'static) -> Failure {
    within_limit(move || {
        let began = Instant::now();
        let failure = engine().err().unwrap();
        let took = began.elapsed();
        assert!(took < BOUND + BESIDE, "{took:?}: {failure}");
        failure
    })
}

#[test]
fn a_rank_may_be_missing_at_the_start() {
    let mut cases = Vec::new();
    for rank in 0..STAGES {
        for how in [How::Hang, How::Wait] {
            cases.push(Fault { rank, call: 0, how });
        }
    }
    at_once(&cases, |fault| {
        let blueprint = impatient(&lora(), ScheduleKind::Gpipe);
        let failure = hangs_at_launch(move || launch(blueprint, connect(fault), open));
        let seen = (failure.rank, failure.step, failure.doing.as_str());
        assert_eq!(seen, (fault.rank, None, "connecting"), "{failure}");
        stall(&failure);
    });
}

/// A source that hangs at one of its tensors.
struct Hanging {
    inner: Arc<dyn TensorSource>,
    name: String,
}

impl TensorSource for Hanging {
    fn names(&self) -> Vec<String> {
        self.inner.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.inner.info(name)
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        match name == self.name {
            true => for_ever(),
            false => self.inner.read(name),
        }
    }
}

#[test]
fn a_stage_may_hang_while_it_loads() {
    at_once(
        &[(0, true), (1, true), (2, true), (1, false)],
        |(rank, file)| {
            let mut blueprint = impatient(&lora(), ScheduleKind::Gpipe);
            let block = blueprint.stages[rank].chunks[0].end - 1;
            if file {
                blueprint.source = Arc::new(Hanging {
                    inner: blueprint.source,
                    name: format!("transformer.layers.{block}.mlp.dense_h_to_4h.weight"),
                });
            }
            let device = move |index: usize, threads: usize, pulse: &Arc<Pulse>| match index == rank
                && !file
            {
                true => for_ever(),
                false => Cpu::<f32>::with_pulse(threads, pulse),
            };
            let failure =
                hangs_at_launch(move || launch(blueprint, in_process::connect(STAGES), device));
            let seen = (failure.rank, failure.step, failure.doing.as_str());
            assert_eq!(seen, (rank, None, "loading"), "{failure}");
            assert!(matches!(stall(&failure), Stall::Thread { .. }), "{failure}");
        },
    );
}

#[test]
fn a_slow_stage_is_no_hung_one() {
    // Each of its four forwards is within the bound, what the others wait for them is far beyond it.
    for threads in [1, STAGES] {
        let hook: Hook = Arc::new(move |moment: Moment| {
            if moment.rank == 1 && moment.op == "attention" {
                std::thread::sleep(BOUND / 3);
            }
            Ok(Then::Compute)
        });
        let blueprint = Blueprint {
            threads,
            ..impatient(&lora(), ScheduleKind::Gpipe)
        };
        let took = within_limit(move || {
            let mut engine = start(blueprint, hook).unwrap();
            let began = Instant::now();
            assert!(engine.step(step_plan(0)).unwrap().applied);
            began.elapsed()
        });
        assert!(took > BOUND, "too fast to show anything");
    }
}
