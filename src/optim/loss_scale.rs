//! The loss scale: gradients that would vanish in f16 are lifted by a factor before the backward
//! pass, and lowered again before they are used.

use serde::{Deserialize, Serialize};

/// Good steps after which the scale is doubled.
const GROWTH_INTERVAL: u32 = 2_000;
/// So large that only its reciprocal's being a normal number stands against the next doubling.
const CEILING: f32 = (1_u128 << 126) as f32;

/// The scale, and how the last steps went. Equal on all stages, saved with a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Saved", into = "Saved")]
pub struct LossScale {
    dynamic: bool,
    scale: f32,
    good_steps: u32,
    skipped_in_a_row: u32,
}

impl LossScale {
    /// For f16: starts at `initial`, a power of two, halves on overflow but never below 1, doubles after 2,000 steps
    /// without one.
    pub fn dynamic(initial: f32) -> Self {
        Self {
            dynamic: true,
            scale: initial,
            good_steps: 0,
            skipped_in_a_row: 0,
        }
    }

    /// For f32: always 1.
    pub fn fixed() -> Self {
        Self {
            dynamic: false,
            scale: 1.0,
            good_steps: 0,
            skipped_in_a_row: 0,
        }
    }

    /// The factor for the next step, a power of two.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Whether the factor can change.
    pub fn is_dynamic(&self) -> bool {
        self.dynamic
    }

    /// Steps skipped since the last good one.
    pub fn skipped_in_a_row(&self) -> u32 {
        self.skipped_in_a_row
    }

    /// Records a step: `finite` when every gradient of every stage was, so that it was applied.
    pub fn update(&mut self, finite: bool) {
        if !finite {
            self.skipped_in_a_row = self.skipped_in_a_row.saturating_add(1);
            self.good_steps = 0;
            if self.dynamic {
                self.scale = (self.scale / 2.0).max(1.0);
            }
            return;
        }
        self.skipped_in_a_row = 0;
        if self.dynamic {
            self.good_steps += 1;
            if self.good_steps == GROWTH_INTERVAL {
                self.good_steps = 0;
                self.scale = (self.scale * 2.0).min(CEILING);
            }
        }
    }
}

/// The state as it stands in a file, where anything may stand.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    dynamic: bool,
    scale: f32,
    good_steps: u32,
    skipped_in_a_row: u32,
}

impl From<LossScale> for Saved {
    fn from(state: LossScale) -> Self {
        Self {
            dynamic: state.dynamic,
            scale: state.scale,
            good_steps: state.good_steps,
            skipped_in_a_row: state.skipped_in_a_row,
        }
    }
}

impl TryFrom<Saved> for LossScale {
    type Error = String;

    fn try_from(saved: Saved) -> Result<Self, String> {
        let power_of_two = saved.scale.to_bits() & 0x007F_FFFF == 0;
        let possible = if saved.dynamic {
            power_of_two && (1.0..=CEILING).contains(&saved.scale)
        } else {
            saved.scale == 1.0 && saved.good_steps == 0
        };
        if !possible || saved.good_steps >= GROWTH_INTERVAL {
            return Err(format!(
                "no run can have reached loss scale {} after {} good steps",
                saved.scale, saved.good_steps
            ));
        }
        Ok(Self {
            dynamic: saved.dynamic,
            scale: saved.scale,
            good_steps: saved.good_steps,
            skipped_in_a_row: saved.skipped_in_a_row,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn halves_on_overflow_down_to_one_and_counts() {
        let mut state = LossScale::dynamic(65_536.0);
        assert_eq!(state.scale(), 65_536.0);
        for skipped in 1..=20 {
            state.update(false);
            assert_eq!(state.skipped_in_a_row(), skipped);
        }
        assert_eq!(state.scale(), 1.0);
        state.update(true);
        assert_eq!((state.scale(), state.skipped_in_a_row()), (1.0, 0));
    }

    #[test]
    fn doubles_after_two_thousand_good_steps_in_a_row_only() {
        let mut state = LossScale::dynamic(65_536.0);
        (0..1_999).for_each(|_| state.update(true));
        state.update(false);
        assert_eq!(state.scale(), 32_768.0);
        (0..1_999).for_each(|_| state.update(true));
        assert_eq!(state.scale(), 32_768.0);
        state.update(true);
        assert_eq!(state.scale(), 65_536.0);
        (0..2_000).for_each(|_| state.update(true));
        assert_eq!(state.scale(), 131_072.0);
    }

    #[test]
    fn stays_finite_for_ever() {
        let mut state = LossScale::dynamic(65_536.0);
        (0..2_000 * 200).for_each(|_| state.update(true));
        assert_eq!(state.scale(), CEILING);
        assert!((1.0 / state.scale()).is_normal());
    }

    #[test]
    fn fixed_never_moves_but_counts_skipped_steps() {
        let mut state = LossScale::fixed();
        (0..3_000).for_each(|_| state.update(true));
        state.update(false);
        state.update(false);
        assert_eq!((state.scale(), state.skipped_in_a_row()), (1.0, 2));
        assert!(!state.is_dynamic());
    }

    #[test]
    fn a_saved_state_goes_on_equally() {
        let mut state = LossScale::dynamic(65_536.0);
        (0..1_500).for_each(|step| state.update(step != 100));
        let mut again: LossScale =
            serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
        assert_eq!(again, state);
        (0..700).for_each(|_| {
            state.update(true);
            again.update(true);
        });
        assert_eq!(again, state);
        assert_eq!(again.scale(), 65_536.0);
    }

    #[test]
    fn impossible_saved_states_are_refused() {
        for (dynamic, scale, good_steps) in [
            (true, "0.5", 0),
            (true, "3.0", 0),
            (true, "2.0", 2_000),
            (false, "2.0", 0),
        ] {
            let text = format!(
                r#"{{"dynamic":{dynamic},"scale":{scale},"good_steps":{good_steps},"skipped_in_a_row":0}}"#
            );
            let error = serde_json::from_str::<LossScale>(&text).unwrap_err();
            assert!(error.to_string().contains("no run can have"), "{error}");
        }
    }
}
