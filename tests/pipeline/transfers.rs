//! Transfers between stages that fail.

use mp_train::backend::cpu::Cpu;
use mp_train::comm::{CommError, Transport};
use mp_train::config::run::{AdapterSection, FullSection, ScheduleKind};
use mp_train::pipeline::failure::{Cause, Failure};
use mp_train::pipeline::launch::{Blueprint, launch};
use mp_train::pipeline::schedule::{Operation, Schedule};

use super::faulty_transport::{Fault, How, connect};
use super::{
    MICRO_BATCHES, STAGES, base, blueprint, lora, names, open, prefix, step_plan, within_limit,
};

/// During which action each transfer of a step takes place, on one stage.
pub fn transfers(schedule: &Schedule, rank: usize, at_the_end: usize) -> Vec<String> {
    let names = names(schedule, rank);
    let mut doing = Vec::new();
    for (operation, name) in schedule.program(rank).into_iter().zip(&names) {
        let calls = match operation {
            Operation::Exchange { .. } => 1,
            Operation::Run(action) => {
                let ends = [
                    schedule.source(rank, action),
                    schedule.destination(rank, action),
                ];
                ends.into_iter().flatten().count()
            }
        };
        doing.extend(std::iter::repeat_n(name.clone(), calls));
    }
    doing.extend(std::iter::repeat_n("update".to_owned(), at_the_end));
    doing
}

/// Runs two steps and gives the failure that must come in the second; then asks for a third, which
/// must fail as well instead of hanging.
fn fails_in_second_step<T>(blueprint: Blueprint, transports: Vec<T>) -> Failure
where
    T: Transport<Cpu<f32>> + Send + 'static,
{
    within_limit(move || {
        let mut engine = launch(blueprint, transports, open).unwrap();
        assert!(engine.step(step_plan(0)).unwrap().applied);
        let failure = engine.step(step_plan(1)).unwrap_err();
        assert!(engine.step(step_plan(2)).is_err());
        assert!(engine.snapshot().is_err());
        failure
    })
}

/// Fails every transfer of the second step on every stage in turn.
fn every_transfer_fails(adapter: &AdapterSection, kind: ScheduleKind, at_the_end: [usize; STAGES]) {
    let schedule = Schedule::build(kind, STAGES, 1, MICRO_BATCHES).unwrap();
    let mut seen = Vec::new();
    for (rank, at_the_end) in at_the_end.into_iter().enumerate() {
        let transfers = transfers(&schedule, rank, at_the_end);
        for (place, doing) in transfers.iter().enumerate() {
            for how in [How::Error, How::Panic, How::PanicLate] {
                if how == How::PanicLate && place % 5 != 2 {
                    continue;
                }
                // Behind `start` and the first step.
                let call = 1 + transfers.len() + place;
                let transports = connect(Fault { rank, call, how });
                let failure = fails_in_second_step(blueprint(adapter, kind), transports);
                let what = format!("{how:?} at transfer {place} of stage {rank}: {failure}");
                assert_eq!((failure.rank, failure.step), (rank, Some(2)), "{what}");
                assert_eq!(failure.doing, *doing, "{what}");
                let told = format!("stage {rank}, step 2, {doing} on cpu: ");
                assert!(failure.to_string().starts_with(&told), "{what}");
                assert!(failure.is_machine(), "{what}");
                match (how, failure.cause) {
                    (How::Error, Cause::Comm(CommError::OutOfStep { peer: 77, .. })) => {}
                    (How::Panic | How::PanicLate, Cause::Panic { message }) => {
                        assert!(message.starts_with("planted"), "{message}");
                    }
                    (_, cause) => panic!("{what}: {cause:?}"),
                }
            }
            seen.push((rank, doing.clone()));
        }
    }
    for rank in 0..STAGES {
        for action in ["F0", "F3", "B0", "B3", "update"] {
            assert!(seen.contains(&(rank, action.to_owned())), "{rank} {action}");
        }
    }
}

#[test]
fn any_transfer_of_1f1b_may_fail() {
    every_transfer_fails(&lora(), ScheduleKind::OneForwardOneBackward, [1; STAGES]);
}

#[test]
fn any_transfer_of_gpipe_may_fail() {
    every_transfer_fails(&lora(), ScheduleKind::Gpipe, [1; STAGES]);
}

#[test]
fn any_transfer_of_a_tied_matrix_may_fail() {
    // First and last stage send each other their half of its gradient.
    let full = AdapterSection::Full(FullSection {});
    every_transfer_fails(&full, ScheduleKind::OneForwardOneBackward, [2, 1, 2]);
}

#[test]
fn any_transfer_of_a_projected_prefix_may_fail() {
    // One sum for each block's share of the gradient of what all of them come from.
    let blocks = base().config.num_layers;
    let kind = ScheduleKind::OneForwardOneBackward;
    every_transfer_fails(&prefix(true), kind, [blocks + 1; STAGES]);
}
