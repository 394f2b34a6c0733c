//! What `mp-train generate` and `mp-train chat` were asked to do.

use std::path::PathBuf;

use super::model::ModelConfig;
use super::resolve;
use super::run::{Device, Precision, Quantization, RotaryPrecision, TemplateKind};

/// How to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Folder with `config.json` and the weights.
    pub model: PathBuf,
    /// Adapter folder (PEFT LoRA or THUDM prefix); none: the base model alone.
    pub adapter: Option<PathBuf>,
    /// Storage type of weights and activations.
    pub precision: Precision,
    /// Storage of the linear layers of all blocks.
    pub quantization: Quantization,
    /// Rounding of the rotary tables.
    pub rotary_table: RotaryPrecision,
    /// One stage per entry.
    pub devices: Vec<Device>,
    /// Blocks per stage, as many as devices; chosen by cost when absent.
    pub balance: Option<Vec<usize>>,
    /// CPU threads for all stages together.
    pub threads: usize,
    /// Most ids to generate for one prompt.
    pub max_new_tokens: usize,
    /// Whether an answer ends at eop (`eos_token_id`).
    pub stop_at_eop: bool,
    /// How each token is chosen.
    pub sampling: Sampling,
    /// The form of prompts; that of training when absent.
    pub template: Option<TemplateKind>,
}

impl GenerateOptions {
    /// The defaults over `devices`: greedy, 128 new ids at most, ending at eop, all cores.
    pub fn new(model: PathBuf, devices: Vec<Device>) -> Self {
        let precision = resolve::default_precision(&devices);
        GenerateOptions {
            model,
            adapter: None,
            precision,
            quantization: Quantization::None,
            rotary_table: precision.rotary_table(),
            devices,
            balance: None,
            threads: resolve::default_threads(),
            max_new_tokens: 128,
            stop_at_eop: true,
            sampling: Sampling::greedy(),
            template: None,
        }
    }

    /// The ids that end an answer of `model` under these options.
    pub fn stops<'a>(&self, model: &'a ModelConfig) -> &'a [u32] {
        match self.stop_at_eop {
            true => &model.eos_token_ids,
            false => &[],
        }
    }
}

/// How the next token is chosen from the logits; names and meanings are Hugging Face's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0: always the likeliest token, nothing is drawn.
    pub temperature: f64,
    /// Only tokens as likely as the k-th are drawn; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that reach this probability together are drawn; 1: all.
    pub top_p: f64,
    /// Divides positive and multiplies negative logits of tokens seen before; 1: leaves them.
    pub repetition_penalty: f64,
    /// Key of the random numbers.
    pub seed: u64,
}

/// Seed when none is given, as in training.
const DEFAULT_SEED: u64 = 42;

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Sampling {
            temperature: 0.0,
            ..Sampling::plain()
        }
    }

    /// From the model's own distribution.
    pub fn plain() -> Self {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: DEFAULT_SEED,
        }
    }

    /// As THUDM's `chat()` does it: temperature 0.95 and top_p 0.7, beside transformers' own top_k
    /// of 50.
    pub fn chat() -> Self {
        Sampling {
            temperature: 0.95,
            top_k: 50,
            top_p: 0.7,
            ..Sampling::plain()
        }
    }

    /// Checks that every number is one that means something.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self) -> Result<(), SamplingProblem> {
        let zero_or_more = |x: f64| x.is_finite() && x >= 0.0;
        let settings = [
            (
                "temperature",
                self.temperature,
                zero_or_more(self.temperature),
                "0 (always the likeliest token) or more",
            ),
            (
                "top_p",
                self.top_p,
                (0.0..=1.0).contains(&self.top_p),
                "from 0 to 1",
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                zero_or_more(self.repetition_penalty) && self.repetition_penalty > 0.0,
                "more than 0 (1 changes nothing)",
            ),
        ];
        match settings.into_iter().find(|(_, _, good, _)| !good) {
            None => Ok(()),
            Some((setting, found, _, must_be)) => Err(SamplingProblem {
                setting,
                found,
                must_be,
            }),
        }
    }
}

/// A number by which nothing can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{setting} is {found}; it must be {must_be}")]
pub struct SamplingProblem {
    /// Name of the setting.
    pub setting: &'static str,
    /// Its value.
    pub found: f64,
    /// What it takes.
    pub must_be: &'static str,
}

/// One prompt of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Line in the input, from 1, for messages.
    pub line: usize,
    /// Token ids, at least one; ends in `.. gMASK sop`.
    pub input_ids: Vec<u32>,
    /// Keys visible to all queries; the index of sop when absent.
    pub context_length: Option<usize>,
    /// Both position rows, each as long as `input_ids`; by the usual rule when absent.
    pub position_ids: Option<[Vec<u32>; 2]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_mean_nothing_are_named() {
        for sampling in [Sampling::greedy(), Sampling::plain(), Sampling::chat()] {
            assert_eq!(sampling.check(), Ok(()));
        }
        let plain = Sampling::plain;
        type Change = fn(&mut Sampling);
        let cases: [(Change, &str); 7] = [
            (|s| s.temperature = -0.1, "temperature"),
            (|s| s.temperature = f64::NAN, "temperature"),
            (|s| s.temperature = f64::INFINITY, "temperature"),
            (|s| s.top_p = 1.01, "top_p"),
            (|s| s.top_p = f64::NAN, "top_p"),
            (|s| s.repetition_penalty = 0.0, "repetition_penalty"),
            (
                |s| s.repetition_penalty = f64::INFINITY,
                "repetition_penalty",
            ),
        ];
        for (change, name) in cases {
            let mut sampling = plain();
            change(&mut sampling);
            let problem = sampling.check().err().map(|problem| problem.setting);
            assert_eq!(problem, Some(name), "{sampling:?}");
        }
    }
}
