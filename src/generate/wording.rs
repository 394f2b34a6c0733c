//! From a question to the ids that the model sees, in the words that it was trained on.

use super::question::Question;
use super::template_file::{self, Asking};
use crate::config::model::ModelConfig;
use crate::data::template::{Template, Turn, alpaca_prompt};
use crate::data::tokenizer::{
    ChatMessage, ChatRole, ConfigIds, EraWarning, Generation, GlmTokenizer, LiteralSpecials,
    RoundStyle, TokenizerError, TokenizerFiles,
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
        Ok((Self::new(tokenizer, asking), warnings))
    }

    /// The wording of a tokenizer and a template.
    pub fn new(tokenizer: GlmTokenizer, asking: Asking) -> Self {
        Self { tokenizer, asking }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &GlmTokenizer {
        &self.tokenizer
    }

    /// The ids of a question in the form of the generation's training rows, up to where the answer
    /// begins; of text to be continued `[gMASK]`, sop, text. Earlier turns that the template lacks
    /// are written as the generation writes them.
    ///
    /// # Errors
    /// None of its own: questions and answers take turns, which every generation has a form for.
    pub fn words(&self, question: &Question) -> Result<Worded, TokenizerError> {
        let (query, history) = match (question, &self.asking.settings.template) {
            (Question::Instruction { instruction, input }, _) => {
                (alpaca_prompt(instruction, input), &[][..])
            }
            (Question::Text { query, history }, Template::PlainText(_)) if history.is_empty() => {
                let special = self.tokenizer.special();
                let text = self.tokenizer.encode_with(query, self.literal());
                return Ok(Worded {
                    continued: text.len(),
                    input_ids: [&[special.gmask, special.sop], &text[..]].concat(),
                });
            }
            (Question::Text { query, history }, Template::Alpaca(_)) if history.is_empty() => {
                (alpaca_prompt(query, ""), &[][..])
            }
            (Question::Text { query, history }, _) => (query.clone(), &history[..]),
        };
        let input_ids = match self.tokenizer.generation().rounds() {
            Some(style) => {
                // An instruction has a form of its own; rounds are for what was said in turns.
                let is_said = matches!(question, Question::Text { .. });
                let first_round =
                    is_said && self.asking.settings.template.round_for_empty_history();
                self.in_rounds(style, history, query, first_round)
            }
            None => self.with_roles(history, query)?,
        };
        Ok(Worded {
            input_ids,
            continued: 0,
        })
    }

    /// `first_round`: whether a question without earlier turns is written as a round too, in ChatGLM-6B.
    fn in_rounds(
        &self,
        style: RoundStyle,
        history: &[Turn],
        query: String,
        first_round: bool,
    ) -> Vec<u32> {
        let settings = &self.asking.settings;
        let bare = matches!(self.tokenizer.generation(), Generation::ChatGlm(_))
            && history.is_empty()
            && !first_round;
        let prompt = match bare {
            true => query,
            false => {
                let turns = history.iter();
                let turns = turns.map(|turn| (turn.query.as_str(), turn.answer.as_str()));
                style.prompt(turns, &query)
            }
        };
        let text = format!("{}{prompt}", settings.source_prefix);
        let prompt = self.tokenizer.encode_with(&text, self.literal());
        self.tokenizer.build_pair(&prompt, None).ids
    }

    fn with_roles(&self, history: &[Turn], query: String) -> Result<Vec<u32>, TokenizerError> {
        let turns = history.iter().flat_map(|turn| {
            [
                (ChatRole::User, turn.query.as_str()),
                (ChatRole::Assistant, turn.answer.as_str()),
            ]
        });
        let messages = turns.chain([(ChatRole::User, query.as_str())]);
        let prefix = &self.asking.settings.source_prefix;
        let (mut first, mut rest) = (String::new(), messages);
        if let Some((_, query)) = rest.next() {
            first = format!("{prefix}{query}");
        }
        let messages = std::iter::once((ChatRole::User, first.as_str())).chain(rest);
        let messages: Vec<_> = messages
            .map(|(role, content)| ChatMessage {
                role,
                metadata: "",
                content,
            })
            .collect();
        let built = self.tokenizer.build_conversation(&messages, self.literal());
        Ok(built?.ids)
    }

    fn literal(&self) -> LiteralSpecials {
        match self.asking.settings.parse_special {
            true => LiteralSpecials::AsReference,
            false => LiteralSpecials::AsText,
        }
    }

    /// The ids that end an answer: those of `config.json`, and what the generation's own code stops
    /// at (in ChatGLM3 a role token, which its `config.json` does not name).
    pub fn stops(&self, of_config: &[u32]) -> Vec<u32> {
        let mut stops = of_config.to_vec();
        let of_code = self.tokenizer.stop_ids();
        stops.extend(of_code.iter().filter(|id| !of_config.contains(id)));
        stops
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
    use crate::data::byte_level::Tokens;
    use crate::data::sentencepiece::ModelProto;
    use crate::data::template::{Conversation, RowText, TemplateSettings};
    use crate::data::text_rows::RowEncoder;

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
        Wording::new(GlmTokenizer::chatglm(proto, 0).unwrap(), asking)
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
                assert_eq!(wording.words(&question).unwrap(), expected, "{question:?}");
                assert_eq!(wording.misfit(&question), misfit);
            }
        }
    }

    #[test]
    fn plain_text_stands_behind_the_mask_as_in_training() {
        let wording = wording(Template::PlainText(Default::default()), "");
        let worded = wording.words(&"你好".into()).unwrap();
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
            let ids = wording.words(&"a<sop>b".into()).unwrap().input_ids;
            ids.iter().filter(|&&id| id == sop).count()
        };
        assert_eq!(count(&wording), 1);
        wording.asking.settings.parse_special = true;
        assert_eq!(count(&wording), 2);
    }

    /// Every generation's tokenizer, from the stand-ins.
    fn tokenizers() -> [GlmTokenizer; 4] {
        let two = || ModelProto::parse(include_bytes!("../../tests/tokenizer/v2.model")).unwrap();
        let one = include_bytes!("../../tests/tokenizer/v1.model");
        let ranks = include_bytes!("../../tests/tokenizer/glm4/tokenizer.model");
        [
            GlmTokenizer::chatglm(ModelProto::parse(one).unwrap(), 0).unwrap(),
            GlmTokenizer::chatglm2(two()).unwrap(),
            GlmTokenizer::chatglm3(two()).unwrap(),
            GlmTokenizer::glm4(Tokens::from_ranks(ranks).unwrap()).unwrap(),
        ]
    }

    #[test]
    fn every_generation_is_asked_as_it_was_trained() {
        let templates = [
            Template::Alpaca(Default::default()),
            Template::PromptResponse(Default::default()),
            Template::Messages(Default::default()),
        ];
        for tokenizer in tokenizers() {
            for template in &templates {
                for (prefix, with_history) in [("", false), ("P ", false), ("P ", true)] {
                    let settings = TemplateSettings {
                        template: template.clone(),
                        source_prefix: prefix.to_owned(),
                        ..TemplateSettings::default()
                    };
                    let is_alpaca = matches!(template, Template::Alpaca(_));
                    let (question, asked) = match (is_alpaca, with_history) {
                        (true, false) => ("x".into(), alpaca_prompt("x", "")),
                        (false, false) => ("x".into(), "x".to_owned()),
                        (_, true) => (after_a_turn("x"), "x".to_owned()),
                    };
                    let mut conversation = match with_history {
                        true => Conversation::pair("q", "a"),
                        false => Conversation::default(),
                    };
                    conversation
                        .messages
                        .extend(Conversation::pair(asked, "你好").messages);
                    let encoder = RowEncoder::new(&tokenizer, &settings).unwrap();
                    let rows = encoder
                        .encode(&RowText::Conversation(conversation))
                        .unwrap();
                    let trained: Vec<u32> =
                        rows.rows[0].input_ids.iter().map(|&id| id as u32).collect();
                    let asking = Asking {
                        settings: settings.clone(),
                        known: true,
                    };
                    let wording = Wording::new(tokenizer.clone(), asking);
                    let asked = wording.words(&question).unwrap().input_ids;
                    let generation = tokenizer.generation();
                    assert!(
                        trained.starts_with(&asked),
                        "{generation}, {template:?}: {asked:?} does not begin {trained:?}"
                    );
                    // What is left is the answer and what closes it.
                    let answer = tokenizer.decode(&trained[asked.len()..]).unwrap();
                    assert_eq!(answer.trim(), "你好", "{generation}");
                    let closing = trained.last().copied();
                    assert_eq!(closing, Some(tokenizer.end_of_answer()));
                    assert!(wording.stops(&[]).contains(&tokenizer.end_of_answer()));
                }
            }
        }
    }

    #[test]
    fn answers_end_where_the_file_or_the_code_says() {
        let asking = || Asking {
            settings: TemplateSettings::default(),
            known: false,
        };
        let [one, two, three, four] = tokenizers().map(|t| Wording::new(t, asking()));
        assert_eq!(one.stops(&[1661]), [1661]);
        assert_eq!(two.stops(&[2]), [2]);
        assert_eq!(three.stops(&[2]), [2, 2006, 2008]);
        assert_eq!(four.stops(&[2000, 2007, 2009]), [2000, 2007, 2009]);
    }
}
