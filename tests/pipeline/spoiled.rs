//! Numbers that are none, on one stage.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mp_train::config::run::ScheduleKind;
use mp_train::pipeline::messages::{StepOutcome, StepPlan};
use mp_train::pipeline::place::Phase;

use super::faulty_backend::{Hook, Moment, Then};
use super::killed::{SECOND_STEP, start};
use super::{STAGES, blueprint, lora, step_plan, within_limit};

/// The outcomes of some steps.
fn outcomes(hook: Hook, plans: Vec<StepPlan>) -> Vec<StepOutcome> {
    let blueprint = blueprint(&lora(), ScheduleKind::OneForwardOneBackward);
    within_limit(move || {
        let mut engine = start(blueprint, hook).unwrap();
        let steps = plans.into_iter().map(|plan| engine.step(plan).unwrap());
        steps.collect()
    })
}

#[test]
fn a_stage_that_once_computes_no_number_costs_that_step_alone() {
    // After one update, the step that is spoiled is the second, and the one after it the third.
    let third = StepPlan {
        updates: 1,
        ..step_plan(2)
    };
    let calm: Hook = Arc::new(|_| Ok(Then::Compute));
    let undisturbed = outcomes(calm, vec![step_plan(0), third.clone()]);
    assert!(undisturbed[1].loss_sums.iter().all(|loss| loss.is_finite()));
    for rank in 0..STAGES {
        let spoilt = Arc::new(AtomicBool::new(false));
        let once = Arc::clone(&spoilt);
        let hook: Hook = Arc::new(move |moment: Moment| {
            let here = moment.rank == rank && moment.place.command == SECOND_STEP;
            let forward = moment.place.phase == Phase::Work && moment.op == "residual";
            Ok(
                match here && forward && !once.swap(true, Ordering::Relaxed) {
                    true => Then::Spoil,
                    false => Then::Compute,
                },
            )
        });
        let steps = outcomes(hook, vec![step_plan(0), step_plan(1), third.clone()]);
        assert!(spoilt.load(Ordering::Relaxed));
        assert!(!steps[1].applied && !steps[1].grad_norm.is_finite());
        assert_eq!([&steps[0], &steps[2]], [&undisturbed[0], &undisturbed[1]]);
    }
}
