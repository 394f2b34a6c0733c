//! Transfers between stages that fail.

use std::time::Duration;

use mp_train::backend::cpu::Cpu;
use mp_train::backend::{Backend, Plain};
use mp_train::comm::in_process::{self, InProcess};
use mp_train::comm::{CommError, Transport};
use mp_train::config::run::{AdapterSection, FullSection, ScheduleKind};
use mp_train::pipeline::failure::{Cause, Failure};
use mp_train::pipeline::launch::{Blueprint, launch};
use mp_train::pipeline::schedule::Schedule;

use super::{MICRO_BATCHES, STAGES, base, blueprint, lora, prefix, step_plan, within_limit};

/// How a transfer fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Error,
    Panic,
    /// The connections break first, so that the other stages complain before this one does.
    PanicLate,
}

/// A transport that fails at one of its transfers.
struct Faulty {
    inner: Option<InProcess>,
    rank: usize,
    fault: Option<(usize, How)>,
    done: usize,
}

impl Faulty {
    fn connect(rank: usize, transfer: usize, how: How) -> Vec<Faulty> {
        let transports = in_process::connect(STAGES).into_iter().enumerate();
        let faulty = transports.map(|(index, inner)| Faulty {
            inner: Some(inner),
            rank: index,
            fault: (index == rank).then_some((transfer, how)),
            done: 0,
        });
        faulty.collect()
    }

    fn inner(&mut self) -> Result<&mut InProcess, CommError> {
        if let Some((transfer, how)) = self.fault.filter(|(transfer, _)| *transfer == self.done) {
            if how == How::PanicLate {
                self.inner = None;
                std::thread::sleep(Duration::from_millis(100));
            }
            match how {
                How::Error => {
                    return Err(CommError::OutOfStep {
                        peer: 77,
                        found: transfer,
                        expected: 0,
                    });
                }
                How::Panic | How::PanicLate => panic!("planted at transfer {transfer}"),
            }
        }
        self.done += 1;
        Ok(self.inner.as_mut().unwrap())
    }
}

impl<B: Backend> Transport<B> for Faulty {
    fn rank(&self) -> usize {
        self.rank
    }

    fn stages(&self) -> usize {
        STAGES
    }

    fn send<T: Plain>(
        &mut self,
        backend: &B,
        to: usize,
        x: &B::Buffer<T>,
        len: usize,
    ) -> Result<(), CommError> {
        self.inner()?.send(backend, to, x, len)
    }

    fn recv<T: Plain>(
        &mut self,
        backend: &B,
        from: usize,
        x: &mut B::Buffer<T>,
        len: usize,
    ) -> Result<(), CommError> {
        self.inner()?.recv(backend, from, x, len)
    }

    fn all_reduce_sum(
        &mut self,
        backend: &B,
        x: &mut B::Buffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        self.inner()?.all_reduce_sum(backend, x, len)
    }
}

/// During which action each transfer of a step takes place, on one stage.
fn transfers(schedule: &Schedule, rank: usize, at_the_end: usize) -> Vec<String> {
    let mut doing = Vec::new();
    for &action in &schedule.stages[rank] {
        let ends = [
            schedule.source(rank, action),
            schedule.destination(rank, action),
        ];
        doing.extend(ends.into_iter().flatten().map(|_| action.to_string()));
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
        let mut engine = launch(blueprint, transports, |_, n| Cpu::<f32>::new(n)).unwrap();
        assert!(engine.step(step_plan(0)).unwrap().applied);
        let failure = engine.step(step_plan(1)).unwrap_err();
        assert!(engine.step(step_plan(2)).is_err());
        assert!(engine.snapshot().is_err());
        failure
    })
}

/// Fails every transfer of the second step on every stage in turn.
fn every_transfer_fails(adapter: &AdapterSection, kind: ScheduleKind, at_the_end: [usize; STAGES]) {
    let schedule = Schedule::build(kind, STAGES, MICRO_BATCHES);
    let mut seen = Vec::new();
    for (rank, at_the_end) in at_the_end.into_iter().enumerate() {
        let transfers = transfers(&schedule, rank, at_the_end);
        for (place, doing) in transfers.iter().enumerate() {
            for how in [How::Error, How::Panic, How::PanicLate] {
                if how == How::PanicLate && place % 5 != 2 {
                    continue;
                }
                let transports = Faulty::connect(rank, transfers.len() + place, how);
                let failure = fails_in_second_step(blueprint(adapter, kind), transports);
                let what = format!("{how:?} at transfer {place} of stage {rank}: {failure}");
                assert_eq!((failure.rank, failure.step), (rank, Some(2)), "{what}");
                assert_eq!(failure.doing, *doing, "{what}");
                let told = format!("stage {rank}, step 2, {doing}: ");
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
    every_transfer_fails(&full, ScheduleKind::OneForwardOneBackward, [3, 1, 3]);
}

#[test]
fn any_transfer_of_a_projected_prefix_may_fail() {
    // One sum for each block's share of the gradient of what all of them come from.
    let blocks = base().config.num_layers;
    let kind = ScheduleKind::OneForwardOneBackward;
    every_transfer_fails(&prefix(true), kind, [blocks + 1; STAGES]);
}
