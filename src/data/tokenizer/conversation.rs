//! Whole conversations and single turns as ids, and which of them the model writes.

use std::fmt;
use std::ops::Range;

use super::rounds::RoundStyle;
use super::{Generation, GlmTokenizer, InputRule, LiteralSpecials, TokenizerError};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatRole {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// What a tool returned.
    Observation,
}

impl fmt::Display for ChatRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Observation => "observation",
        })
    }
}

/// One message of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChatMessage<'a> {
    /// Who speaks.
    pub role: ChatRole,
    /// The name of the tool called; otherwise empty.
    pub metadata: &'a str,
    /// What is said.
    pub content: &'a str,
}

/// A conversation as token ids, and which of them the model writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConversationIds {
    /// All ids, special tokens included.
    pub ids: Vec<u32>,
    /// Per assistant message that can be trained on: its ids, the one that closes it included.
    pub written: Vec<Range<usize>>,
}

/// Why messages make no conversation in a generation's form. Messages are counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConversationProblem {
    /// Nothing is said.
    #[error("it has no messages")]
    Empty,
    /// A role that the generation was not trained with.
    #[error("message {number} has the role {role}, which {generation} has no form for")]
    Role {
        /// The message.
        number: usize,
        /// Its role.
        role: ChatRole,
        /// The generation.
        generation: Generation,
    },
    /// A tool call in a generation without tools.
    #[error("message {number} calls a tool, which {generation} has no form for")]
    Metadata {
        /// The message.
        number: usize,
        /// The generation.
        generation: Generation,
    },
    /// The name of a tool that would end the line it stands on.
    #[error("the metadata of message {number} (the name of a tool) has a line break in it")]
    MetadataLines {
        /// The message.
        number: usize,
    },
    /// Not question, answer, question, answer.
    #[error(
        "message {number} has the role {found} where {expected} is due: for {generation}, questions and answers must take turns, and a system message comes first"
    )]
    Order {
        /// The message.
        number: usize,
        /// Its role.
        found: ChatRole,
        /// The role due.
        expected: ChatRole,
        /// The generation.
        generation: Generation,
    },
    /// Nobody asks or answers at the end.
    #[error("it ends with a system message: there is nothing to answer")]
    EndsWithSystem,
}

impl Generation {
    /// How conversations are written; `None` where each message has a token for its role.
    pub fn rounds(self) -> Option<RoundStyle> {
        match self {
            Self::ChatGlm(_) => Some(RoundStyle::CHATGLM),
            Self::ChatGlm2 => Some(RoundStyle::CHATGLM2),
            Self::ChatGlm3 | Self::Glm4 => None,
        }
    }
}

impl GlmTokenizer {
    /// The whole conversation in this generation's form. With an assistant message at the end it is
    /// a row to train on; otherwise a prompt, which ends where the assistant begins to write.
    ///
    /// ChatGLM-6B and ChatGLM2 have one text for all turns (`[Round k]`), so that only the last
    /// answer is `written`; ChatGLM-6B asks a single question as it stands. They know no system
    /// role: such a message goes in front of the first question. ChatGLM3 and GLM-4 have a token
    /// for each role, and every assistant message is `written`: the line of its metadata, its text,
    /// and the role token that follows it, at which generation stops. Behind the last one stands
    /// [`GlmTokenizer::end_of_answer`].
    ///
    /// Every part is encoded for itself, so that text never becomes a role.
    ///
    /// # Errors
    /// [`TokenizerError::Conversation`] for roles, or an order of them, that the generation has no
    /// form for.
    pub fn build_conversation(
        &self,
        messages: &[ChatMessage<'_>],
        literal: LiteralSpecials,
    ) -> Result<ConversationIds, TokenizerError> {
        if messages.is_empty() {
            return Err(ConversationProblem::Empty.into());
        }
        match self.generation.rounds() {
            Some(style) => Ok(self.in_rounds(style, messages, literal)?),
            None => self.with_roles(messages, literal),
        }
    }

    fn in_rounds(
        &self,
        style: RoundStyle,
        messages: &[ChatMessage<'_>],
        literal: LiteralSpecials,
    ) -> Result<ConversationIds, ConversationProblem> {
        let generation = self.generation;
        let mut turns: Vec<(String, Option<&str>)> = Vec::new();
        let mut system = None;
        for (message, number) in messages.iter().zip(1..) {
            if !message.metadata.is_empty() {
                return Err(ConversationProblem::Metadata { number, generation });
            }
            let expected = match turns.last() {
                Some((_, None)) => ChatRole::Assistant,
                _ => ChatRole::User,
            };
            match message.role {
                role @ ChatRole::Observation => {
                    return Err(ConversationProblem::Role {
                        number,
                        role,
                        generation,
                    });
                }
                ChatRole::System if number == 1 => system = Some(message.content),
                ChatRole::User if expected == ChatRole::User => {
                    let asked = match system.take() {
                        Some(system) => style.after_system(system, message.content),
                        None => message.content.to_owned(),
                    };
                    turns.push((asked, None));
                }
                ChatRole::Assistant if expected == ChatRole::Assistant => {
                    if let Some((_, answer)) = turns.last_mut() {
                        *answer = Some(message.content);
                    }
                }
                found => {
                    return Err(ConversationProblem::Order {
                        number,
                        found,
                        expected,
                        generation,
                    });
                }
            }
        }
        let (query, answer) = turns.pop().ok_or(ConversationProblem::EndsWithSystem)?;
        let history = turns
            .iter()
            .map(|(query, answer)| (query.as_str(), answer.unwrap_or_default()));
        let prompt = match generation {
            Generation::ChatGlm(_) if turns.is_empty() => query,
            _ => style.prompt(history, &query),
        };
        let prompt = self.encode_with(&prompt, literal);
        let answer = answer.map(|answer| self.encode_with(answer, literal));
        Ok(self.build_pair(&prompt, answer.as_deref()))
    }

    fn with_roles(
        &self,
        messages: &[ChatMessage<'_>],
        literal: LiteralSpecials,
    ) -> Result<ConversationIds, TokenizerError> {
        let mut ids = vec![self.special.gmask, self.special.sop];
        let mut written: Vec<Range<usize>> = Vec::new();
        // Where the ids of the assistant's message before begin.
        let mut open = None;
        for (message, number) in messages.iter().zip(1..) {
            if message.metadata.contains(['\n', '\r']) {
                return Err(ConversationProblem::MetadataLines { number }.into());
            }
            ids.push(self.role_id(message.role)?);
            written.extend(open.take().map(|start| start..ids.len()));
            open = (message.role == ChatRole::Assistant).then_some(ids.len());
            ids.extend(self.encode_with(&format!("{}\n", message.metadata), literal));
            ids.extend(self.encode_with(message.content, literal));
        }
        match messages.last().map(|message| message.role) {
            Some(ChatRole::System) => return Err(ConversationProblem::EndsWithSystem.into()),
            Some(ChatRole::Assistant) => {
                ids.push(self.end_of_answer());
                written.extend(open.map(|start| start..ids.len()));
            }
            _ => ids.push(self.role_id(ChatRole::Assistant)?),
        }
        Ok(ConversationIds { ids, written })
    }

    /// A single turn of ids without special tokens, which may have been cut before: the form of
    /// training rows, and without an answer that of prompts. The prompt is taken as it is: what
    /// ChatGLM2 is to see as a round of a chat must be one already.
    pub fn build_pair(&self, prompt: &[u32], answer: Option<&[u32]>) -> ConversationIds {
        let (Ok(user), Ok(assistant)) = (
            self.role_id(ChatRole::User),
            self.role_id(ChatRole::Assistant),
        ) else {
            // The form of training rows is the same in all eras, unlike that of prompts.
            let ids = self.build_inputs_by(InputRule::Always, prompt, answer);
            let end = ids.len();
            let written = answer.map(|answer| end - answer.len() - 1..end);
            return ConversationIds {
                ids,
                written: written.into_iter().collect(),
            };
        };
        // No metadata: an empty line.
        let line = self.encode("\n");
        let mut ids = vec![self.special.gmask, self.special.sop, user];
        ids.extend(&line);
        ids.extend(prompt);
        ids.push(assistant);
        let start = ids.len();
        let Some(answer) = answer else {
            return ConversationIds {
                ids,
                written: Vec::new(),
            };
        };
        ids.extend(&line);
        ids.extend(answer);
        ids.push(self.end_of_answer());
        let written = std::iter::once(start..ids.len()).collect();
        ConversationIds { ids, written }
    }

    /// The id that closes the last answer of a row: eop for ChatGLM-6B and `</s>` for ChatGLM2 and
    /// 3, each its model's `eos_token_id`. Of the three that end generation in GLM-4 it is
    /// `<|user|>`, with which its chat models give the word back; `<|endoftext|>` ends documents.
    pub fn end_of_answer(&self) -> u32 {
        match self.generation {
            Generation::ChatGlm(_) => Some(self.special.eop),
            Generation::Glm4 => self.special.role(ChatRole::User),
            Generation::ChatGlm2 | Generation::ChatGlm3 => None,
        }
        .unwrap_or(self.special.eos)
    }

    /// The id that closes a document: eop for ChatGLM-6B, `</s>` for ChatGLM2 and 3,
    /// `<|endoftext|>` for GLM-4.
    pub fn end_of_document(&self) -> u32 {
        match self.generation {
            Generation::ChatGlm(_) => self.special.eop,
            _ => self.special.eos,
        }
    }

    /// The ids at which an answer ends: those of the model's code, which for ChatGLM3 names more
    /// than its `config.json`.
    pub fn stop_ids(&self) -> Vec<u32> {
        let ends = [self.end_of_document()].into_iter();
        let roles = [ChatRole::User, ChatRole::Observation];
        ends.chain(roles.iter().filter_map(|&role| self.role_id(role).ok()))
            .collect()
    }

    fn role_id(&self, role: ChatRole) -> Result<u32, TokenizerError> {
        self.special
            .role(role)
            .ok_or(TokenizerError::NotInGeneration {
                what: "a chat with role tokens",
                defined_for: "ChatGLM3 and GLM-4",
            })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::ChatRole::{Assistant, Observation, System, User};
    use super::*;
    use crate::data::sentencepiece::ModelProto;

    fn tokenizers() -> [GlmTokenizer; 3] {
        let one = include_bytes!("../../../tests/tokenizer/v1.model");
        let two = include_bytes!("../../../tests/tokenizer/v2.model");
        let proto = |bytes: &[u8]| ModelProto::parse(bytes).unwrap();
        [
            GlmTokenizer::chatglm(proto(one), 0).unwrap(),
            GlmTokenizer::chatglm2(proto(two)).unwrap(),
            GlmTokenizer::chatglm3(proto(two)).unwrap(),
        ]
    }

    fn said<'a>(messages: &[(ChatRole, &'a str)]) -> Vec<ChatMessage<'a>> {
        let message = |&(role, content)| ChatMessage {
            role,
            metadata: "",
            content,
        };
        messages.iter().map(message).collect()
    }

    fn build(tokenizer: &GlmTokenizer, messages: &[(ChatRole, &str)]) -> ConversationIds {
        tokenizer
            .build_conversation(&said(messages), LiteralSpecials::AsText)
            .unwrap()
    }

    /// What each written range says.
    fn written(tokenizer: &GlmTokenizer, built: &ConversationIds) -> Vec<String> {
        let ranges = built.written.iter().cloned();
        ranges
            .map(|range| tokenizer.decode(&built.ids[range]).unwrap())
            .collect()
    }

    #[test]
    fn rounds_train_on_the_last_answer() {
        let [one, two, _] = tokenizers();
        let messages = [
            (User, "你好"),
            (Assistant, "a"),
            (User, "x"),
            (Assistant, "b"),
        ];
        let cases = [
            (one, "[Round 0]\n问：你好\n答：a\n[Round 1]\n问：x\n答："),
            (
                two,
                "[Round 1]\n\n问：你好\n\n答：a\n\n[Round 2]\n\n问：x\n\n答：",
            ),
        ];
        for (tokenizer, text) in cases {
            let built = build(&tokenizer, &messages);
            let prompt = tokenizer.build_inputs(&tokenizer.encode(text), None);
            assert_eq!(build(&tokenizer, &messages[..3]).ids, prompt);
            let answer = [&tokenizer.encode("b")[..], &[tokenizer.end_of_answer()]].concat();
            assert_eq!(built.ids, [&prompt[..], &answer].concat());
            let rest = prompt.len()..built.ids.len();
            assert_eq!(built.written, [rest]);
            assert!(build(&tokenizer, &messages[..3]).written.is_empty());
        }
    }

    #[test]
    fn a_first_question_is_bare_for_chatglm_and_a_round_for_chatglm2() {
        let [one, two, _] = tokenizers();
        let bare = one.build_inputs(&one.encode("x"), None);
        assert_eq!(build(&one, &[(User, "x")]).ids, bare);
        let round = two.build_inputs(&two.encode("[Round 1]\n\n问：x\n\n答："), None);
        assert_eq!(build(&two, &[(User, "x")]).ids, round);
        let told = [(System, "s"), (User, "x")];
        let bare = one.build_inputs(&one.encode("s\nx"), None);
        assert_eq!(build(&one, &told).ids, bare);
        let round = two.build_inputs(&two.encode("[Round 1]\n\n问：s\n\nx\n\n答："), None);
        assert_eq!(build(&two, &told).ids, round);
    }

    #[test]
    fn role_tokens_train_on_every_answer_and_what_ends_it() {
        let [_, _, three] = tokenizers();
        let mut messages = said(&[
            (System, "s"),
            (User, "x"),
            (Assistant, "1"),
            (Observation, "2"),
            (Assistant, "3"),
        ]);
        messages[2].metadata = "tool";
        let literal = LiteralSpecials::AsText;
        let built = three.build_conversation(&messages, literal).unwrap();
        assert_eq!(written(&three, &built), ["tool\n 1", "\n 3"]);
        let closing: Vec<u32> = built.written.iter().map(|r| built.ids[r.end - 1]).collect();
        let observation = three.token_to_id("<|observation|>").unwrap();
        assert_eq!(closing, [observation, three.special().eos]);
        // The prompt of an answer is what stands before its range.
        let prompt = three.build_conversation(&messages[..4], literal).unwrap();
        assert_eq!(prompt.ids, built.ids[..built.written[1].start]);
        assert_eq!(prompt.written, built.written[..1]);
        // A turn of ids is the conversation of its texts.
        let turn = build(&three, &[(User, "x"), (Assistant, "你好")]);
        let (asked, answer) = (three.encode("x"), three.encode("你好"));
        assert_eq!(three.build_pair(&asked, Some(&answer)), turn);
        assert_eq!(
            three.build_pair(&asked, None),
            build(&three, &[(User, "x")])
        );
    }

    #[test]
    fn what_has_no_form_is_named() {
        let [one, two, three] = tokenizers();
        let problem = |tokenizer: &GlmTokenizer, messages: &[(ChatRole, &str)]| {
            tokenizer
                .build_conversation(&said(messages), LiteralSpecials::AsText)
                .unwrap_err()
                .to_string()
        };
        for (messages, expected) in [
            (&[][..], "it has no messages"),
            (&[(System, "s")], "ends with a system message"),
            (
                &[(User, "a"), (Observation, "b")],
                "message 2 has the role observation, which ChatGLM",
            ),
            (
                &[(User, "a"), (User, "b")],
                "message 2 has the role user where assistant is due",
            ),
            (
                &[(Assistant, "a")],
                "message 1 has the role assistant where user is due",
            ),
            (
                &[(User, "a"), (Assistant, "b"), (System, "c")],
                "message 3 has the role system where user is due",
            ),
        ] {
            for tokenizer in [&one, &two] {
                let told = problem(tokenizer, messages);
                assert!(told.contains(expected), "{told}");
            }
        }
        assert!(problem(&three, &[(System, "s")]).contains("ends with a system message"));
        assert!(problem(&three, &[]).contains("no messages"));
        let mut call = said(&[(User, "a")]);
        call[0].metadata = "a\nb";
        let literal = LiteralSpecials::AsText;
        let told = three.build_conversation(&call, literal).unwrap_err();
        assert!(told.to_string().contains("message 1"), "{told}");
        let told = two.build_conversation(&call, literal).unwrap_err();
        assert!(
            told.to_string().contains("message 1 calls a tool"),
            "{told}"
        );
    }
}
