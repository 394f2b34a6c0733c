//! The learning rate over the steps of a run.

use crate::config::run::{LrSchedule, OptimizerSection};

/// Learning rate of step `step`, counted from 0.
///
/// While `step < warmup_steps` it is `learning_rate * step / warmup_steps`, so the very first step
/// moves nothing. From there it follows `lr_schedule` to its end at `total_steps`, where linear and
/// cosine are 0. A step that was skipped for an overflow does not count.
pub fn learning_rate(optimizer: &OptimizerSection, step: u64, total_steps: u64) -> f64 {
    let (base, warm_up) = (optimizer.learning_rate, optimizer.warmup_steps);
    if step < warm_up {
        return base * (step as f64 / warm_up as f64);
    }
    let length = total_steps.saturating_sub(warm_up).max(1);
    let progress = ((step - warm_up) as f64 / length as f64).min(1.0);
    base * match optimizer.lr_schedule {
        LrSchedule::Constant => 1.0,
        LrSchedule::Linear => 1.0 - progress,
        LrSchedule::Cosine => (1.0 + (std::f64::consts::PI * progress).cos()) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::run::LossNormalisation;

    fn optimizer(lr_schedule: LrSchedule, warmup_steps: u64) -> OptimizerSection {
        OptimizerSection {
            learning_rate: 1e-3,
            lr_schedule,
            warmup_steps,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
            loss_normalisation: LossNormalisation::PerToken,
            initial_loss_scale: 65_536.0,
            max_skipped_steps: 20,
        }
    }

    /// `train.lr` of the reference run `lora_train`: base 0.001, 5 warm-up steps of 30.
    #[test]
    fn cosine_is_the_reference_run_s() {
        let expected = [
            (0, 0.0),
            (1, 0.0002),
            (4, 0.0008),
            (5, 0.001),
            (6, 0.000996057),
            (12, 0.000818712),
            (17, 0.000531395),
            (25, 9.5492e-5),
            (29, 3.943e-6),
        ];
        let optimizer = optimizer(LrSchedule::Cosine, 5);
        for (step, rate) in expected {
            let found = learning_rate(&optimizer, step, 30);
            assert!((found - rate).abs() < 1e-9, "step {step}: {found} {rate}");
        }
        assert_eq!(learning_rate(&optimizer, 30, 30), 0.0);
    }

    #[test]
    fn linear_falls_to_zero_and_constant_stays() {
        let linear = optimizer(LrSchedule::Linear, 2);
        let rates = [0, 1, 2, 6, 10, 99].map(|step| learning_rate(&linear, step, 10));
        assert_eq!(rates, [0.0, 5e-4, 1e-3, 5e-4, 0.0, 0.0]);
        let constant = optimizer(LrSchedule::Constant, 0);
        assert_eq!(
            [0, 9, 99].map(|step| learning_rate(&constant, step, 10)),
            [1e-3; 3]
        );
    }

    #[test]
    fn a_warm_up_longer_than_the_run_never_ends_and_divides_by_nothing() {
        for kind in [LrSchedule::Constant, LrSchedule::Linear, LrSchedule::Cosine] {
            let optimizer = optimizer(kind, 10);
            assert_eq!(learning_rate(&optimizer, 5, 8), 5e-4);
            assert!(learning_rate(&optimizer, 10, 10).is_finite());
        }
    }
}
