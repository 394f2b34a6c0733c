//! A worker that dies at any action of a step.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use mp_train::backend::BackendError;
use mp_train::backend::cpu::Cpu;
use mp_train::comm::in_process;
use mp_train::config::run::{AdapterSection, FullSection, ScheduleKind};
use mp_train::model::ModelError;
use mp_train::pipeline::failure::{Cause, Failure};
use mp_train::pipeline::launch::{Blueprint, Engine, launch};
use mp_train::pipeline::place::Place;

use super::faulty_backend::{FaultyBackend, Hook, Moment, Then};
use super::{STAGES, blueprint, lora, names, open, step_plan, within_limit};

/// The number of the command that is the second step: the first two connect and step.
pub const SECOND_STEP: u32 = 3;

/// Stages whose every op asks `hook` first.
pub fn start(blueprint: Blueprint, hook: Hook) -> Result<Engine, Failure> {
    let transports = in_process::connect(STAGES);
    launch(blueprint, transports, move |rank, threads, pulse| {
        let cpu: Cpu<f32> = open(rank, threads, pulse)?;
        Ok(FaultyBackend::new(cpu, rank, &hook))
    })
}

/// Every place at which a stage computes something in a second step, with the stage.
pub fn moments(adapter: &AdapterSection, kind: ScheduleKind) -> BTreeSet<(usize, Place)> {
    let seen = Arc::new(Mutex::new(BTreeSet::new()));
    let noted = Arc::clone(&seen);
    let hook: Hook = Arc::new(move |moment: Moment| {
        if moment.place.command == SECOND_STEP {
            noted.lock().unwrap().insert((moment.rank, moment.place));
        }
        Ok(Then::Compute)
    });
    let blueprint = blueprint(adapter, kind);
    within_limit(move || {
        let mut engine = start(blueprint, hook).unwrap();
        engine.step(step_plan(0)).unwrap();
        engine.step(step_plan(1)).unwrap();
    });
    let seen = seen.lock().unwrap();
    seen.clone()
}

/// The error that is planted.
fn planted() -> BackendError {
    BackendError::OutOfMemory {
        device: "planted".to_owned(),
        bytes: 1,
    }
}

/// Kills each stage at each place of the second step in turn, by turns with a panic and with an error.
fn killed_everywhere(adapter: &AdapterSection, kind: ScheduleKind) {
    let schedule = blueprint(adapter, kind).schedule;
    let moments = moments(adapter, kind);
    for rank in 0..STAGES {
        let names = names(&schedule, rank);
        let visited: BTreeSet<&str> = moments
            .iter()
            .filter(|(other, _)| *other == rank)
            .map(|(_, place)| names[place.operation].as_str())
            .collect();
        for action in ["F0", "F3", "B0", "B3", "update"] {
            assert!(visited.contains(action), "{rank}: {visited:?}");
        }
    }
    for (count, (rank, place)) in moments.into_iter().enumerate() {
        let panics = count % 2 == 0;
        let hook: Hook = Arc::new(move |moment: Moment| {
            if (moment.rank, moment.place) != (rank, place) {
                return Ok(Then::Compute);
            }
            assert!(!panics, "planted before {}", moment.op);
            Err(planted())
        });
        let blueprint = blueprint(adapter, kind);
        let failure = within_limit(move || {
            let mut engine = start(blueprint, hook).unwrap();
            engine.step(step_plan(0)).unwrap();
            let failure = engine.step(step_plan(1)).unwrap_err();
            assert!(matches!(
                engine.step(step_plan(1)).unwrap_err().cause,
                Cause::Over
            ));
            assert!(engine.snapshot().is_err());
            failure
        });
        let name = &names(&schedule, rank)[place.operation];
        let what = format!("stage {rank} at {place:?}: {failure}");
        assert_eq!((failure.rank, failure.step), (rank, Some(2)), "{what}");
        assert_eq!(&failure.doing, name, "{what}");
        match (panics, &failure.cause) {
            (true, Cause::Panic { message }) => assert!(message.starts_with("planted"), "{what}"),
            (false, Cause::Model(ModelError::Backend(BackendError::OutOfMemory { .. }))) => {}
            (false, Cause::Comm(_)) => assert!(what.contains("planted"), "{what}"),
            _ => panic!("{what}"),
        }
        assert!(failure.is_machine(), "{what}");
    }
}

#[test]
fn a_worker_may_die_at_any_action_of_1f1b() {
    killed_everywhere(&lora(), ScheduleKind::OneForwardOneBackward);
}

#[test]
fn a_worker_may_die_at_any_action_of_gpipe_with_a_tied_matrix() {
    killed_everywhere(&AdapterSection::Full(FullSection {}), ScheduleKind::Gpipe);
}

#[test]
fn memory_may_run_out_on_one_stage() {
    for rank in 0..STAGES {
        let hook: Hook = Arc::new(move |moment: Moment| {
            match moment.rank == rank && moment.op == "zeros" && moment.nth > 20 {
                true => Err(planted()),
                false => Ok(Then::Compute),
            }
        });
        let blueprint = blueprint(&lora(), ScheduleKind::OneForwardOneBackward);
        let failure = within_limit(move || start(blueprint, hook).err().unwrap());
        let text = failure.to_string();
        let told = format!("stage {rank}, loading on cpu: planted: no memory for");
        assert!(text.starts_with(&told), "{text}");
    }
}
