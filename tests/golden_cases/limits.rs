//! How close is close. In f32 the limits of the family's README. In f16 the caps below, which hold for all
//! families, the CPU and GPUs alike; a GPU is held to the CPU's own error besides (`compare.rs`).

use mp_train::config::run::Precision;

use super::manifest::Form;

/// What a tensor is, by the name that the harness has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Logits of the batch, or of the steps of a generation.
    Logits,
    /// Mean loss of a batch.
    Loss,
    /// Loss of each target.
    TokenLoss,
    /// Gradient of a trainable tensor.
    Gradient,
    /// Norm of all gradients, for each step.
    GradNorm,
    /// Loss of each step, and of each of its micro-batches.
    TrainingLoss,
    /// Trained weights at the end.
    FinalWeights,
    /// Anything on the way from the embedding to the final norm.
    Hidden,
    /// Attention probabilities.
    Probabilities,
    /// Keys and values of a prefix.
    PrefixKeyValue,
    /// Learning rate of each step.
    LearningRate,
    /// Ids, masks, codes, scales.
    Exact,
    /// Rotary tables in f32.
    Table,
    /// Rotary tables in f16.
    HalfTable,
    /// Rotary tables in bf16.
    BfloatTable,
    /// Vectors after the rotary step.
    Rotated,
}

/// How far a value may be off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Not at all.
    Exact,
    /// By so much.
    Absolute(f64),
    /// By this share of the value itself.
    Relative(f64),
    /// By this share of the tensor's largest entry.
    OfLargest(f64),
    /// By so many steps of float16.
    HalfSteps(f64),
    /// Not compared, as long as it is a number.
    Finite,
}

impl Kind {
    /// The kind of a tensor; `None` for a name without a role.
    pub fn of(name: &str) -> Option<Kind> {
        // The runs of quant_*, generate_greedy and ptuning_*: `ptuning.loss`, `plain.step_logits`.
        let runs = [
            "plain.",
            "ptuning_projection.",
            "ptuning.",
            "unrounded.",
            "left_pad.",
            "batch.",
        ];
        if let Some(rest) = runs.iter().find_map(|run| name.strip_prefix(run)) {
            return Kind::of(rest);
        }
        let (head, rest) = name.split_once('.').unwrap_or((name, ""));
        let last = name.rsplit('.').next().unwrap_or(name);
        Some(match (head, rest) {
            ("position_ids" | "attention_mask" | "new_tokens", "") => Kind::Exact,
            ("generated", _) => Kind::Exact,
            ("logits", "") | ("step_logits", _) => Kind::Logits,
            ("loss", "") => Kind::Loss,
            ("forward_loss_after", "") => Kind::TrainingLoss,
            ("token_loss", "") => Kind::TokenLoss,
            ("prefix_key_value", "") => Kind::PrefixKeyValue,
            ("hidden", _) => Kind::Hidden,
            (_, "attention_probs") if is_layer(head) => Kind::Probabilities,
            (_, _) if is_layer(head) => Kind::Hidden,
            ("grad", _) => Kind::Gradient,
            ("train" | "trainer_style" | "token_weighted", _) => match rest {
                "lr" | "lr_reported_after_step" => Kind::LearningRate,
                "micro_loss" | "loss" => Kind::TrainingLoss,
                "grad_norm" => Kind::GradNorm,
                _ if rest.starts_with("final.") => Kind::FinalWeights,
                _ => return None,
            },
            ("dequantised", _) => Kind::Exact,
            ("transformer", _) if matches!(last, "weight" | "weight_scale") => Kind::Exact,
            (_, "inv_freq") | ("inv_freq" | "theta", "") => Kind::Exact,
            (_, "f32.cos" | "f32.sin" | "cos" | "sin") => Kind::Table,
            (_, "f16.cos" | "f16.sin") => Kind::HalfTable,
            ("apply", "y") => Kind::Rotated,
            ("real", _) if rest.ends_with("_float16") => Kind::HalfTable,
            ("real", _) if rest.ends_with("_bfloat16") => Kind::BfloatTable,
            ("real", _) => Kind::Table,
            (_, "") if head.starts_with("table") => Kind::Table,
            _ => return None,
        })
    }

    /// The limit on a backend that stores activations so, for a family of this form.
    pub fn limit(self, precision: Precision, form: Form) -> Limit {
        match (precision, form) {
            (Precision::F32, Form::Named) => self.single(),
            (Precision::F32, Form::Listed) => self.single_later(),
            (Precision::F16, _) => self.half(),
        }
    }

    /// The limits of ChatGLM-6B's README.
    fn single(self) -> Limit {
        match self {
            Kind::Logits | Kind::TrainingLoss | Kind::GradNorm | Kind::FinalWeights => {
                Limit::Absolute(1e-4)
            }
            Kind::Loss | Kind::TokenLoss => Limit::Absolute(2e-5),
            Kind::Gradient => Limit::OfLargest(5e-5),
            Kind::Hidden => Limit::Absolute(5e-4),
            Kind::Probabilities | Kind::PrefixKeyValue => Limit::Absolute(1e-5),
            Kind::LearningRate => Limit::Absolute(1e-8),
            Kind::Exact => Limit::Exact,
            Kind::Table | Kind::Rotated => Limit::Absolute(1e-6),
            Kind::HalfTable => Limit::HalfSteps(1.0),
            Kind::BfloatTable => Limit::Absolute(1.0 / 256.0),
        }
    }

    /// The limits of the READMEs of ChatGLM2-6B and GLM-4-9B, but for tensors whose float64_gap allows
    /// more ([`Limit::allowing`]).
    fn single_later(self) -> Limit {
        match self {
            Kind::Logits | Kind::Hidden => Limit::Absolute(5e-5),
            Kind::Loss | Kind::TokenLoss | Kind::TrainingLoss => Limit::Absolute(1e-5),
            Kind::Gradient | Kind::GradNorm => Limit::Absolute(2e-5),
            Kind::FinalWeights => Limit::Absolute(1e-5),
            _ => self.single(),
        }
    }

    /// The caps on half precision, against the reference in f32.
    pub fn half(self) -> Limit {
        match self {
            Kind::Logits => Limit::Absolute(0.05),
            Kind::Loss | Kind::TokenLoss => Limit::Absolute(0.005),
            Kind::Gradient => Limit::OfLargest(0.03),
            Kind::GradNorm => Limit::Relative(0.03),
            Kind::TrainingLoss => Limit::Absolute(0.05),
            // AdamW divides a gradient by its own size: where a value is all rounding, so is its update.
            Kind::FinalWeights => Limit::Finite,
            Kind::Hidden | Kind::Probabilities => Limit::OfLargest(0.03),
            // Computed in f32 and rounded once: half a step, which is 2^-11 of the number at most.
            Kind::PrefixKeyValue => Limit::OfLargest(1.1 / 2048.0),
            Kind::Rotated => Limit::OfLargest(1.1 / 2048.0),
            Kind::LearningRate
            | Kind::Exact
            | Kind::Table
            | Kind::HalfTable
            | Kind::BfloatTable => self.single(),
        }
    }
}

/// By how much more than its distance to float64 a result of the reference may be missed.
const OF_GAP: f64 = 10.0;

impl Limit {
    /// The limit for a tensor that lies so far from the same computation in float64, where that is more
    /// than the limit has in mind.
    pub fn allowing(self, float64_gap: Option<f64>) -> Limit {
        match (self, float64_gap) {
            (Limit::Absolute(limit), Some(gap)) => Limit::Absolute(limit.max(OF_GAP * gap)),
            _ => self,
        }
    }

    /// The limit as a number, in the unit of [`Limit::error`].
    pub fn value(self) -> f64 {
        match self {
            Limit::Exact => 0.0,
            Limit::Absolute(limit)
            | Limit::Relative(limit)
            | Limit::OfLargest(limit)
            | Limit::HalfSteps(limit) => limit,
            Limit::Finite => f64::INFINITY,
        }
    }

    /// The error of one value; `largest` is the tensor's largest entry.
    pub fn error(self, found: f64, expected: f64, largest: f64) -> f64 {
        let difference = (found - expected).abs();
        match self {
            Limit::Exact | Limit::Absolute(_) => difference,
            // An infinity is no result either.
            Limit::Finite => difference * 0.0,
            _ if difference == 0.0 => 0.0,
            Limit::Relative(_) => difference / expected.abs(),
            Limit::OfLargest(_) => difference / largest,
            Limit::HalfSteps(_) => difference / half_step(expected),
        }
    }

    /// One step of float16 at the tensor's largest entry, as an error.
    pub fn half_step(self, largest: f64) -> f64 {
        match self {
            Limit::Exact | Limit::Finite => 0.0,
            Limit::Absolute(_) => half_step(largest),
            Limit::HalfSteps(_) => 1.0,
            Limit::Relative(_) | Limit::OfLargest(_) => half_step(largest) / largest,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Limit::Exact => out.write_str("exact"),
            Limit::Absolute(limit) => write!(out, "{limit}"),
            Limit::Relative(limit) => write!(out, "{limit} of the value"),
            Limit::OfLargest(limit) => write!(out, "{limit} of the largest"),
            Limit::HalfSteps(limit) => write!(out, "{limit} steps of f16"),
            Limit::Finite => out.write_str("not compared"),
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
