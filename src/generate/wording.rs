//! From a question to the ids that the model sees, in the words that it was trained on.

use super::question::Question;
use super::template_file::{self, Asking};
use crate::config::model::ModelConfig;
use crate::data::template::{Template, alpaca_prompt, round_prompt};
use crate::data::tokenizer::{
    ConfigIds, EraWarning, Generation, GlmTokenizer, InputRule, LiteralSpecials, TokenizerError,
    TokenizerFiles,
};

/// The tokenizer of a model and the template of its training.
#[derive(Clone, Debug)]
pub struct Wording {
    tokenizer: GlmTokenizer,
    asking: Asking,
}

/// The ids of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worded {
    /// What the model sees, special tokens included.
    pub input_ids: Vec<u32>,
    /// How many of the last ids are text that the answer goes on with (plain text only).
    pub continued: usize,
}

/// A form of question that a template has no place for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// An instruction, for a model that was not trained on instructions.
    Instruction,
    /// Earlier turns, for a model that was not trained on conversations.
    History,
}

impl Wording {
    /// Reads the tokenizer in the model's folder.
    ///
    /// # Errors
    /// There is none, it is damaged, or it is another model's.
    pub fn open(
        folder: &std::path::Path,
        config: &ModelConfig,
        asking: Asking,
    ) -> Result<(Self, Vec<EraWarning>), TokenizerError> {
        let files = TokenizerFiles::read(folder)?;
        let (tokenizer, warnings) = files.build(&ConfigIds::from(config), None)?;
        Ok((Self::new(tokenizer, asking)?, warnings))
    }

    /// The wording of a tokenizer and a template.
    ///
    /// # Errors
    /// A tokenizer that is not ChatGLM-6B's.
    pub fn new(tokenizer: GlmTokenizer, asking: Asking) -> Result<Self, TokenizerError> {
        match tokenizer.generation() {
            Generation::ChatGlm(_) => Ok(Self { tokenizer, asking }),
            Generation::ChatGlm2 | Generation::ChatGlm3 | Generation::Glm4 => {
                Err(TokenizerError::NotInGeneration {
                    what: "wording questions",
                    defined_for: "ChatGLM-6B",
                })
            }
        }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &GlmTokenizer {
        &self.tokenizer
    }

    /// The ids of a question, in the form of training rows: prompt, `[gMASK]`, sop; of text to be
    /// continued `[gMASK]`, sop, text. A form that the template lacks is written as ChatGLM-6B does.
    pub fn words(&self, question: &Question) -> Worded {
        let settings = &self.asking.settings;
        let literal = match settings.parse_special {
            true => LiteralSpecials::AsReference,
            false => LiteralSpecials::AsText,
        };
        let text = match (question, &settings.template) {
            (Question::Instruction { instruction, input }, _) => alpaca_prompt(instruction, input),
            (Question::Text { query, history }, template) => match template {
                Template::PlainText(_) if history.is_empty() => {
                    let special = self.tokenizer.special();
                    let text = self.tokenizer.encode_with(query, literal);
                    return Worded {
                        continued: text.len(),
                        input_ids: [&[special.gmask, special.sop], &text[..]].concat(),
                    };
                }
                Template::Alpaca(_) if history.is_empty() => alpaca_prompt(query, ""),
                Template::PromptResponse(pair) => {
                    round_prompt(history, query, pair.round_for_empty_history)
                }
                Template::Alpaca(_)
                | Template::PlainText(_)
                | Template::Messages(_)
                | Template::ShareGpt(_) => round_prompt(history, query, false),
            },
        };
        let text = format!("{}{text}", settings.source_prefix);
        let prompt = self.tokenizer.encode_with(&text, literal);
        Worded {
            input_ids: self
                .tokenizer
                .build_inputs_by(InputRule::Always, &prompt, None),
            continued: 0,
        }
    }

    /// What the template, if anybody named one, has no place for in a question.
    pub fn misfit(&self, question: &Question) -> Option<Misfit> {
        let misfit = match (question, &self.asking.settings.template) {
            (Question::Instruction { .. }, Template::Alpaca(_)) => None,
            (Question::Instruction { .. }, _) => Some(Misfit::Instruction),
            (Question::Text { .. }, template) if holds_turns(template) => None,
            (Question::Text { history, .. }, _) if history.is_empty() => None,
            (Question::Text { .. }, _) => Some(Misfit::History),
        };
        misfit.filter(|_| self.asking.known)
    }

    /// Whether the template has a place for earlier turns.
    pub fn has_history(&self) -> bool {
        holds_turns(&self.asking.settings.template)
    }

    /// The template's name.
    pub fn template(&self) -> &'static str {
        template_file::name(template_file::kind(&self.asking.settings.template))
    }
}

/// Whether rows of a template hold earlier turns.
fn holds_turns(template: &Template) -> bool {
    match template {
        Template::PromptResponse(_) | Template::Messages(_) | Template::ShareGpt(_) => true,
        Template::Alpaca(_) | Template::PlainText(_) => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::data::sentencepiece::ModelProto;
    use crate::data::template::{TemplateSettings, Turn};

    fn wording(template: Template, prefix: &str) -> Wording {
        let bytes = include_bytes!("../../tests/tokenizer/v1.model");
        let proto = ModelProto::parse(bytes).unwrap();
        let settings = TemplateSettings {
            template,
            source_prefix: prefix.to_owned(),
            ..TemplateSettings::default()
        };
        let asking = Asking {
            settings,
            known: true,
        };
        Wording::new(GlmTokenizer::chatglm(proto, 0).unwrap(), asking).unwrap()
    }

    fn after_a_turn(query: &str) -> Question {
        let turn = |query: &str, answer: &str| Turn {
            query: query.to_owned(),
            answer: answer.to_owned(),
        };
        Question::Text {
            query: query.to_owned(),
            history: vec![turn("q", "a")],
        }
    }

    fn instruction(instruction: &str, input: &str) -> Question {
        Question::Instruction {
            instruction: instruction.to_owned(),
            input: input.to_owned(),
        }
    }

    #[test]
    fn each_template_words_each_question() {
        let alpaca = || Template::Alpaca(Default::default());
        let pair = || Template::PromptResponse(Default::default());
        let plain = || Template::PlainText(Default::default());
        let rounds = "[Round 0]\n问：q\n答：a\n[Round 1]\n问：x\n答：";
        for (template, question, text, misfit) in [
            (alpaca(), "x".into(), "Instruction: x\nAnswer: ", None),
            (
                alpaca(),
                instruction("i", ""),
                "Instruction: i\nAnswer: ",
                None,
            ),
            (alpaca(), after_a_turn("x"), rounds, Some(Misfit::History)),
            (pair(), "x".into(), "x", None),
            (pair(), after_a_turn("x"), rounds, None),
            (
                pair(),
                instruction("i", "n"),
                "Instruction: i\nInput: n\nAnswer: ",
                Some(Misfit::Instruction),
            ),
            (plain(), after_a_turn("x"), rounds, Some(Misfit::History)),
        ] {
            for prefix in ["", "P "] {
                let wording = wording(template.clone(), prefix);
                let tokenizer = wording.tokenizer();
                let prompt = tokenizer.encode(&format!("{prefix}{text}"));
                let expected = Worded {
                    input_ids: tokenizer.build_inputs(&prompt, None),
                    continued: 0,
                };
                assert_eq!(wording.words(&question), expected, "{question:?}");
                assert_eq!(wording.misfit(&question), misfit);
            }
        }
    }

    #[test]
    fn plain_text_stands_behind_the_mask_as_in_training() {
        let wording = wording(Template::PlainText(Default::default()), "");
        let worded = wording.words(&"你好".into());
        // SPEC.md's example: [gMASK] 1657, <sop> 1660.
        assert_eq!(
            (worded.input_ids, worded.continued),
            (vec![1657, 1660, 230, 138], 2)
        );
        assert!(!wording.has_history());
    }

    #[test]
    fn text_stays_text_unless_training_had_it_otherwise() {
        let mut wording = wording(Template::PromptResponse(Default::default()), "");
        let sop = wording.tokenizer().special().sop;
        let count = |wording: &Wording| {
            let ids = wording.words(&"a<sop>b".into()).input_ids;
            ids.iter().filter(|&&id| id == sop).count()
        };
        assert_eq!(count(&wording), 1);
        wording.asking.settings.parse_special = true;
        assert_eq!(count(&wording), 2);
    }
}
