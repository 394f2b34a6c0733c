//! Special tokens around a prompt and its answer, as each generation's own code puts them.

use super::{Era, Generation, GlmTokenizer};

/// How ChatGLM-6B's own code put special tokens around a prompt, over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputRule {
    /// March 2023: prompt and answer in one, `[gMASK]` unless a mask is there, `<sop>` last.
    First,
    /// April 2023: as [`InputRule::First`] for the prompt, then the answer and `<eop>`.
    Between,
    /// Since 14 April 2023: `[gMASK] <sop>` behind the prompt, always.
    Always,
}

impl GlmTokenizer {
    /// The rule of this tokenizer's era; [`InputRule::Always`] from era C on.
    pub fn input_rule(&self) -> InputRule {
        match self.generation {
            Generation::ChatGlm(Era::A) => InputRule::First,
            Generation::ChatGlm(Era::B) => InputRule::Between,
            _ => InputRule::Always,
        }
    }

    /// Special tokens around a prompt and, where given, its answer, by this tokenizer's rule
    /// (`build_inputs_with_special_tokens`). ChatGLM2 and 3 put `[gMASK] sop` in front.
    pub fn build_inputs(&self, prompt: &[u32], answer: Option<&[u32]>) -> Vec<u32> {
        self.build_inputs_by(self.input_rule(), prompt, answer)
    }

    /// As [`GlmTokenizer::build_inputs`], by the rule of another time; ChatGLM2 and 3 have one.
    pub fn build_inputs_by(
        &self,
        rule: InputRule,
        prompt: &[u32],
        answer: Option<&[u32]>,
    ) -> Vec<u32> {
        let special = &self.special;
        let Generation::ChatGlm(_) = self.generation else {
            let mut ids = vec![special.gmask, special.sop];
            ids.extend(prompt);
            if let Some(answer) = answer {
                ids.extend(answer);
                ids.push(special.eos);
            }
            return ids;
        };
        let mut ids = prompt.to_vec();
        match rule {
            InputRule::First => {
                ids.extend(answer.unwrap_or_default());
                self.close_with_mask(&mut ids);
                return ids;
            }
            InputRule::Between => self.close_with_mask(&mut ids),
            InputRule::Always => ids.extend([special.gmask, special.sop]),
        }
        if let Some(answer) = answer {
            ids.extend(answer);
            if rule == InputRule::Always || answer.last() != Some(&special.eop) {
                ids.push(special.eop);
            }
        }
        ids
    }

    fn close_with_mask(&self, ids: &mut Vec<u32>) {
        let is_mask = |id: &u32| [self.special.mask, self.special.gmask].contains(id);
        if !ids.iter().any(is_mask) {
            ids.push(self.special.gmask);
        }
        if !ids.last().is_some_and(is_mask) {
            ids.push(self.special.eos);
        }
        ids.push(self.special.sop);
    }
}
