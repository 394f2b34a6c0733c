//! The inner form of every row that asks and answers: messages in order, checked once for all
//! formats.

use crate::data::text_error::MessageProblem;
use crate::data::tokenizer::{ChatMessage, ChatRole};

/// One message, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: ChatRole,
    /// The name of the tool called; otherwise empty.
    pub metadata: String,
    /// What is said.
    pub content: String,
    /// Whether it may be trained on; counts for the assistant's messages only.
    pub trained: bool,
}

impl Message {
    /// A message in words, which may be trained on.
    pub fn new(role: ChatRole, content: impl Into<String>) -> Self {
        Self {
            role,
            metadata: String::new(),
            content: content.into(),
            trained: true,
        }
    }

    /// The message as the tokenizer takes it.
    pub fn as_chat(&self) -> ChatMessage<'_> {
        ChatMessage {
            role: self.role,
            metadata: &self.metadata,
            content: &self.content,
        }
    }
}

/// What was said, and at the end answered: perhaps a system message, then questions with their
/// answers, between them perhaps calls of tools with what these returned. The last message is the
/// assistant's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The messages in order.
    pub messages: Vec<Message>,
    /// How many messages stood behind the last answer and were left out.
    pub unanswered: usize,
    /// Whether the row also defines tools, which the model is not shown.
    pub defines_tools: bool,
}

impl Conversation {
    /// A question and its answer.
    pub fn pair(prompt: impl Into<String>, answer: impl Into<String>) -> Self {
        Self {
            messages: vec![
                Message::new(ChatRole::User, prompt),
                Message::new(ChatRole::Assistant, answer),
            ],
            ..Self::default()
        }
    }

    /// Checks who follows whom, and leaves out what stands behind the last answer.
    ///
    /// # Errors
    /// The number of the first message that is out of turn, from 1, and what is wrong with it;
    /// [`MessageProblem::NoAnswer`] of the last one if the assistant says nothing.
    pub fn checked(mut messages: Vec<Message>) -> Result<Self, (usize, MessageProblem)> {
        for (index, message) in messages.iter().enumerate() {
            let before = index.checked_sub(1).map(|before| &messages[before]);
            if let Some(due) = out_of_turn(before, message) {
                let found = message.role;
                return Err((index + 1, MessageProblem::Turn { found, due }));
            }
        }
        let all = messages.len();
        let is_answer = |message: &Message| message.role == ChatRole::Assistant;
        let answered = messages
            .iter()
            .rposition(is_answer)
            .map_or(0, |last| last + 1);
        if answered == 0 {
            return Err((all, MessageProblem::NoAnswer));
        }
        messages.truncate(answered);
        Ok(Self {
            messages,
            unanswered: all - answered,
            defines_tools: false,
        })
    }

    /// The system message, if there is one, and the rest.
    pub fn parts(&self) -> (Option<&Message>, &[Message]) {
        match self.messages.split_first() {
            Some((first, rest)) if first.role == ChatRole::System => (Some(first), rest),
            _ => (None, &self.messages),
        }
    }

    /// Bytes of all its text.
    pub fn bytes(&self) -> usize {
        let bytes = |message: &Message| message.metadata.len() + message.content.len();
        self.messages.iter().map(bytes).sum()
    }
}

/// Who is due in place of `message`, if it cannot follow on `before`.
fn out_of_turn(before: Option<&Message>, message: &Message) -> Option<&'static str> {
    use ChatRole::{Assistant, Observation, System, User};
    match (before.map(|before| before.role), message.role) {
        (None, System | User) | (Some(System), User) => None,
        (None | Some(System), _) => Some("user"),
        (Some(User | Observation), Assistant) => None,
        // Several tools may be called at once, and each returns something.
        (Some(Observation), Observation) => None,
        (Some(User | Observation), _) => Some("assistant"),
        (Some(Assistant), User | Observation) => None,
        (Some(Assistant), Assistant) if !message.metadata.is_empty() => None,
        (Some(Assistant), _) => Some("user"),
    }
}
