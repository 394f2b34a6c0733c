//! Steps that compute what they must not, or nothing at all.

use mp_train::adapter::initial::initial_values;
use mp_train::adapter::{ParameterSpec, ParameterState, Role};
use mp_train::comm::Flow;
use mp_train::config::run::{AdapterSection, FullSection, ScheduleKind};
use mp_train::data::batch::MicroBatch;
use mp_train::pipeline::failure::{Cause, Failure};
use mp_train::pipeline::launch::Blueprint;

use super::{STAGES, blueprint, fails_in_first_step, lora, prefix, start, step_plan, within_limit};

#[test]
fn a_panic_in_the_middle_of_computing_does_not_keep_the_others_waiting() {
    // Without weights for the targets the last stage panics while it computes; with one thread for
    // all stages the others wait for their turn just then.
    for threads in [1, 2, 6] {
        let kind = ScheduleKind::OneForwardOneBackward;
        let mut blueprint = blueprint(&lora(), kind);
        blueprint.threads = threads;
        let mut plan = step_plan(0);
        plan.target_weights.truncate(2);
        let failure = fails_in_first_step(blueprint, plan);
        assert_eq!(
            (failure.rank, failure.step),
            (STAGES - 1, Some(1)),
            "{failure}"
        );
        assert_eq!(failure.doing, "F2");
        assert!(matches!(failure.cause, Cause::Panic { .. }), "{failure}");
    }
}

#[test]
fn a_micro_batch_without_room_ends_the_step_at_its_forward() {
    let mut plan = step_plan(0);
    let large = MicroBatch {
        input_ids: vec![1; 25],
        position: vec![0; 25],
        block_position: vec![0; 25],
        ..MicroBatch::default()
    };
    plan.micro_batches[1] = large;
    let failure = fails_in_first_step(blueprint(&lora(), ScheduleKind::Gpipe), plan);
    assert_eq!(
        (failure.step, failure.doing.as_str()),
        (Some(1), "F1"),
        "{failure}"
    );
    assert!(failure.to_string().contains("25 tokens"), "{failure}");
}

/// A run whose schedule has no backward at all.
fn without_backwards(adapter: &AdapterSection) -> Failure {
    let mut blueprint = blueprint(adapter, ScheduleKind::Gpipe);
    for actions in &mut blueprint.schedule.stages {
        actions.retain(|action| action.flow == Flow::Forward);
    }
    let failure = fails_in_first_step(blueprint, step_plan(0));
    let place = (failure.step, failure.doing.as_str());
    assert_eq!(place, (Some(1), "update"), "{failure}");
    failure
}

#[test]
fn a_trainable_that_no_backward_reaches_is_refused() {
    for (adapter, tensor) in [
        (lora(), "lora_"),
        (prefix(false), "prefix_encoder.embedding.weight["),
        (AdapterSection::Full(FullSection {}), "weight"),
    ] {
        let failure = without_backwards(&adapter);
        match &failure.cause {
            Cause::NeverWritten { name } => assert!(name.contains(tensor), "{name}"),
            cause => panic!("{cause:?}"),
        }
        assert!(failure.is_machine(), "a bug, not the user's doing");
    }
    // A projection's gradients are computed at the end of a step, here from nothing: all are zero.
    let failure = without_backwards(&prefix(true));
    match &failure.cause {
        Cause::ZeroGradient { name } => assert!(name.contains("prefix_encoder"), "{name}"),
        cause => panic!("{cause:?}"),
    }
}

#[test]
fn a_stage_out_of_step_with_the_others_is_found() {
    // Stage 1 leaves its backwards out: it alone fails, the others only lose their peer.
    let mut blueprint = blueprint(&lora(), ScheduleKind::Gpipe);
    blueprint.schedule.stages[1].retain(|action| action.flow == Flow::Forward);
    let failure = fails_in_first_step(blueprint, step_plan(0));
    assert_eq!(
        (failure.rank, failure.doing.as_str()),
        (1, "update"),
        "{failure}"
    );
    assert!(
        matches!(failure.cause, Cause::NeverWritten { .. }),
        "{failure}"
    );
}

/// A LoRA with these matrices all zero.
fn lora_without(role: Role) -> Blueprint {
    let mut blueprint = blueprint(&lora(), ScheduleKind::OneForwardOneBackward);
    let key = |spec: &ParameterSpec| ParameterSpec {
        role: Role::LoraA,
        ..spec.clone()
    };
    blueprint.initial = Box::new(move |spec| {
        let values = match spec.role == role {
            true => vec![0.0; spec.len()],
            false => initial_values(&key(spec), 1).unwrap(),
        };
        Ok(ParameterState::fresh(values))
    });
    blueprint
}

#[test]
fn a_lora_that_would_learn_nothing_is_refused_and_a_fresh_one_is_not() {
    let failure = fails_in_first_step(lora_without(Role::LoraA), step_plan(0));
    assert_eq!((failure.step, failure.doing.as_str()), (Some(1), "update"));
    match &failure.cause {
        Cause::ZeroGradient { name } => assert!(name.ends_with("lora_B.weight"), "{name}"),
        cause => panic!("{cause:?}"),
    }
    assert!(!failure.is_machine());

    // lora_A is rightly without gradient while lora_B is zero.
    let outcome = within_limit(|| {
        let mut engine = start(lora_without(Role::LoraB));
        engine.step(step_plan(0)).unwrap();
        engine.step(step_plan(1)).unwrap()
    });
    assert!(outcome.applied && outcome.grad_norm > 0.0);
}

#[test]
fn a_gradient_that_is_not_finite_skips_the_update_on_every_stage() {
    within_limit(|| {
        let mut engine = start(blueprint(&lora(), ScheduleKind::OneForwardOneBackward));
        engine.step(step_plan(0)).unwrap();
        let before = engine.snapshot().unwrap();
        let mut plan = step_plan(1);
        plan.target_weights[2] = f32::INFINITY;
        let outcome = engine.step(plan).unwrap();
        assert!(!outcome.applied && !outcome.grad_norm.is_finite());
        assert!(outcome.loss_sums.iter().all(|loss| loss.is_finite()));
        assert!(engine.snapshot().unwrap() == before);
        assert!(engine.step(step_plan(1)).unwrap().applied);
        assert!(engine.snapshot().unwrap() != before);
    });
}
