//! How close is close: the limits of the data's README, by the name of the tensor.

/// How far a value may be off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Not at all.
    Exact,
    /// By so much.
    Absolute(f64),
    /// By this share of the tensor's largest entry.
    OfLargest(f64),
    /// By so many steps of float16.
    HalfSteps(f64),
}

const LOGITS: Limit = Limit::Absolute(1e-4);
const HIDDEN: Limit = Limit::Absolute(5e-4);
const LOSS: Limit = Limit::Absolute(2e-5);
const GRADIENT: Limit = Limit::OfLargest(5e-5);
const TRAINING: Limit = Limit::Absolute(1e-4);
const TABLE: Limit = Limit::Absolute(1e-6);

impl Limit {
    /// The limit of a tensor; `None` for a name without a role.
    pub fn of(name: &str) -> Option<Limit> {
        // The runs of quant_* and generate_greedy: `ptuning.loss`, `plain.step_logits`.
        let runs = ["plain.", "ptuning_projection.", "ptuning.", "unrounded."];
        let name = runs
            .iter()
            .find_map(|run| name.strip_prefix(run))
            .unwrap_or(name);
        let (head, rest) = name.split_once('.').unwrap_or((name, ""));
        let last = name.rsplit('.').next().unwrap_or(name);
        Some(match (head, rest) {
            ("position_ids" | "attention_mask" | "new_tokens", "") => Limit::Exact,
            ("logits" | "step_logits", "") => LOGITS,
            ("loss" | "token_loss", "") => LOSS,
            ("prefix_key_value", "") => Limit::Absolute(1e-5),
            ("hidden", _) => HIDDEN,
            (_, "attention_probs") if is_layer(head) => Limit::Absolute(1e-5),
            (_, _) if is_layer(head) => HIDDEN,
            ("grad", _) => GRADIENT,
            ("final", _) => TRAINING,
            ("train", "lr") => Limit::Absolute(1e-8),
            ("train", "micro_loss" | "loss" | "grad_norm") => TRAINING,
            ("dequantised", _) => Limit::Exact,
            ("transformer", _) if matches!(last, "weight" | "weight_scale") => Limit::Exact,
            (_, "inv_freq") => Limit::Exact,
            (_, "f32.cos" | "f32.sin" | "cos" | "sin") => TABLE,
            (_, "f16.cos" | "f16.sin") => Limit::HalfSteps(1.0),
            _ => return None,
        })
    }

    /// The limit as a number, in the unit of [`Limit::error`].
    pub fn value(self) -> f64 {
        match self {
            Limit::Exact => 0.0,
            Limit::Absolute(limit) | Limit::OfLargest(limit) | Limit::HalfSteps(limit) => limit,
        }
    }

    /// The error of one value; `largest` is the tensor's largest entry.
    pub fn error(self, found: f64, expected: f64, largest: f64) -> f64 {
        let difference = (found - expected).abs();
        match self {
            Limit::Exact | Limit::Absolute(_) => difference,
            Limit::OfLargest(_) if difference == 0.0 => 0.0,
            Limit::OfLargest(_) => difference / largest,
            Limit::HalfSteps(_) => difference / half_step(expected),
        }
    }
}

fn is_layer(head: &str) -> bool {
    let number = head.strip_prefix("layer").unwrap_or("");
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// The distance between float16 numbers of this size.
fn half_step(value: f64) -> f64 {
    let exponent = value.abs().log2().floor().max(-14.0);
    2f64.powf(exponent - 10.0)
}
