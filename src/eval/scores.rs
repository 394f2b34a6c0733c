//! What one answer is worth, and what all of them are.

use serde::Serialize;

use super::bleu::bleu4;
use super::rouge::{is_space, rouge};
use super::words::cut;

/// Scores of one answer against its label, 0 to 100, or their means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Scores {
    /// Over characters.
    #[serde(rename = "bleu-4")]
    pub bleu4: f64,
    /// F value over words.
    #[serde(rename = "rouge-1")]
    pub rouge1: f64,
    /// F value over pairs of words.
    #[serde(rename = "rouge-2")]
    pub rouge2: f64,
    /// F value of the longest common subsequence of words.
    #[serde(rename = "rouge-l")]
    pub rouge_l: f64,
}

impl Scores {
    /// Scores of an answer. One without text, or against a label without text, is worth 0; the Python
    /// packages raise an error there.
    pub fn of(answer: &str, label: &str) -> Self {
        let Some(rouge) = rouge(&cut(answer), &cut(label)) else {
            return Scores::default();
        };
        Scores {
            bleu4: 100.0 * bleu4(answer, label),
            rouge1: 100.0 * rouge.one,
            rouge2: 100.0 * rouge.two,
            rouge_l: 100.0 * rouge.longest,
        }
    }
}

/// The mean of scores, taken one by one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mean {
    sum: Scores,
    count: usize,
}

impl Mean {
    /// Adds the scores of one answer.
    pub fn add(&mut self, scores: Scores) {
        self.sum.bleu4 += scores.bleu4;
        self.sum.rouge1 += scores.rouge1;
        self.sum.rouge2 += scores.rouge2;
        self.sum.rouge_l += scores.rouge_l;
        self.count += 1;
    }

    /// The mean of all; 0 of none.
    pub fn get(&self) -> Scores {
        let mean = |sum: f64| sum / self.count.max(1) as f64;
        Scores {
            bleu4: mean(self.sum.bleu4),
            rouge1: mean(self.sum.rouge1),
            rouge2: mean(self.sum.rouge2),
            rouge_l: mean(self.sum.rouge_l),
        }
    }
}

/// A text as it is scored and shown: without white space around it, by Python's notion of it.
pub fn stripped(text: &str) -> &str {
    text.trim_matches(is_space)
}
