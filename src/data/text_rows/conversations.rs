//! Conversations to rows, in rounds or with roles; what is too long loses its oldest turns, then the
//! end of its text.

use super::encode::{Cuts, Encoded, RowEncoder};
use super::lengths::{Lengths, longest_beginning, shares};
use crate::data::TextProblem;
use crate::data::template::{Conversation, Message};
use crate::data::tokenizer::{
    ChatRole, ConversationIds, ConversationProblem, Generation, RoundStyle,
};

/// A question with its answer.
struct Turn<'a> {
    query: &'a str,
    answer: &'a Message,
}

/// Turns of a conversation without roles, with what is said before the first of them.
#[derive(Clone, Copy)]
struct Rounds<'a> {
    style: RoundStyle,
    system: Option<&'a str>,
    turns: &'a [Turn<'a>],
}

impl RowEncoder<'_> {
    /// A row for each turn that is trained on, behind all those before it: the model writes only what
    /// comes last.
    pub(super) fn in_rounds(
        &self,
        style: RoundStyle,
        conversation: &Conversation,
    ) -> Result<Encoded, TextProblem> {
        let turns = self.turns(conversation)?;
        let (system, _) = conversation.parts();
        let system = system.map(|system| system.content.as_str());
        let mut encoded = Encoded::default();
        let first = match self.trains_all_turns() {
            true => 0,
            false => turns.len().saturating_sub(1),
        };
        for (last, turn) in turns.iter().enumerate().skip(first) {
            if !turn.answer.trained {
                continue;
            }
            let mut cuts = Cuts::default();
            let rounds = Rounds {
                style,
                system,
                turns: &turns[..=last],
            };
            let written = match self.lengths {
                Lengths::Pair { prompt, answer } => {
                    let mut prompt_ids = self.prompt_ids(rounds, turn.query);
                    let mut answer_ids = self.encode_text(&turn.answer.content);
                    cuts.prompts = usize::from(cut(&mut prompt_ids, prompt));
                    cuts.answers = usize::from(cut(&mut answer_ids, answer));
                    self.tokenizer.build_pair(&prompt_ids, Some(&answer_ids))
                }
                Lengths::Whole(most) => self.shortened(rounds, turn, most, &mut cuts)?,
            };
            encoded.rows.push(self.row(&written, &[true]));
            encoded.cuts.add(cuts);
        }
        Ok(encoded)
    }

    /// The turns of a conversation.
    fn turns<'c>(&self, conversation: &'c Conversation) -> Result<Vec<Turn<'c>>, TextProblem> {
        let generation = self.tokenizer.generation();
        let mut turns = Vec::new();
        let mut query = None;
        for (message, number) in conversation.messages.iter().zip(1..) {
            if !message.metadata.is_empty() {
                return Err(ConversationProblem::Metadata { number, generation }.into());
            }
            match message.role {
                ChatRole::System => {}
                ChatRole::User => query = Some(message.content.as_str()),
                ChatRole::Assistant => turns.extend(query.take().map(|query| Turn {
                    query,
                    answer: message,
                })),
                role @ ChatRole::Observation => {
                    return Err(ConversationProblem::Role {
                        number,
                        role,
                        generation,
                    }
                    .into());
                }
            }
        }
        Ok(turns)
    }

    /// The ids of the prompt of `query`, which is that of the last of these turns, behind the others.
    fn prompt_ids(&self, rounds: Rounds<'_>, query: &str) -> Vec<u32> {
        let Rounds {
            style,
            system,
            turns,
        } = rounds;
        let history = turns.split_last().map_or(turns, |(_, history)| history);
        let behind_system = |query: &str| match system {
            Some(system) => style.after_system(system, query),
            None => query.to_owned(),
        };
        let bare = matches!(self.tokenizer.generation(), Generation::ChatGlm(_))
            && !self.settings.template.round_for_empty_history();
        let prompt = match history.split_first() {
            None if bare => behind_system(query),
            None => style.prompt([], &behind_system(query)),
            Some((first, others)) => {
                let opening = behind_system(first.query);
                let opening = (opening.as_str(), first.answer.content.as_str());
                let others = others.iter();
                let others = others.map(|turn| (turn.query, turn.answer.content.as_str()));
                style.prompt(std::iter::once(opening).chain(others), query)
            }
        };
        self.encode_text(&format!("{}{prompt}", self.settings.source_prefix))
    }

    /// The last of these turns behind as many of the others as fit into `most` ids, and the system
    /// message.
    fn shortened(
        &self,
        rounds: Rounds<'_>,
        turn: &Turn<'_>,
        most: usize,
        cuts: &mut Cuts,
    ) -> Result<ConversationIds, TextProblem> {
        // [gMASK], sop and the id that closes the answer.
        let room = most - 3;
        let mut answer = self.encode_text(&turn.answer.content);
        let behind = |from: usize| Rounds {
            turns: &rounds.turns[from..],
            ..rounds
        };
        let prompt = |from| self.prompt_ids(behind(from), turn.query);
        let from = first_that(rounds.turns.len() - 1, |from| {
            prompt(from).len() + answer.len() <= room
        });
        cuts.turns = usize::from(from > 0);
        let mut prompt = prompt(from);
        if prompt.len() + answer.len() > room {
            let (share, rest) = shares(prompt.len(), answer.len(), room);
            if prompt.len() > share {
                // The end of a prompt says that the answer follows; the question gives way.
                let of = |query: &str| self.prompt_ids(behind(from), query);
                prompt = of(longest_beginning(turn.query, |query| {
                    of(query).len() <= share
                }));
                cuts.prompts = 1;
            }
            if prompt.len() >= room {
                return Err(TextProblem::NoRoom {
                    tokens: prompt.len() + 3,
                    limit: most,
                    setting: "max_length",
                });
            }
            cuts.answers = usize::from(cut(&mut answer, rest.min(room - prompt.len())));
        }
        Ok(self.tokenizer.build_pair(&prompt, Some(&answer)))
    }

    /// One row, in which every message of the assistant that is trained on is a target.
    pub(super) fn with_roles(&self, conversation: &Conversation) -> Result<Encoded, TextProblem> {
        let mut messages = conversation.messages.clone();
        let is_user = |message: &Message| message.role == ChatRole::User;
        if let Some(first) = messages.iter_mut().find(|message| is_user(message)) {
            first.content.insert_str(0, &self.settings.source_prefix);
        }
        let system = messages.len() - conversation.parts().1.len();
        let questions: Vec<usize> = (system..messages.len())
            .filter(|&index| is_user(&messages[index]))
            .collect();
        let window = |from: usize| {
            let mut window = messages[..system].to_vec();
            window.extend_from_slice(&messages[questions.get(from).map_or(system, |at| *at)..]);
            window
        };
        let fits = |from: usize| self.build(&window(from)).is_ok_and(|ids| self.fits(&ids));
        let from = first_that(questions.len().saturating_sub(1), fits);
        let mut cuts = Cuts {
            turns: usize::from(from > 0),
            ..Cuts::default()
        };
        let mut kept = window(from);
        let mut ids = self.build(&kept)?;
        if !self.fits(&ids) {
            self.cut_last_turn(&ids, &mut kept, &mut cuts)?;
            ids = self.build(&kept)?;
        }
        let last_question = kept.iter().rposition(is_user).unwrap_or(0);
        let is_answer = |(_, message): &(usize, &Message)| message.role == ChatRole::Assistant;
        let answers = kept.iter().enumerate().filter(is_answer);
        let trained: Vec<bool> = answers
            .map(|(index, message)| {
                message.trained && (self.trains_all_turns() || index > last_question)
            })
            .collect();
        Ok(Encoded {
            rows: match trained.contains(&true) {
                true => vec![self.row(&ids, &trained)],
                false => Vec::new(),
            },
            cuts,
        })
    }

    fn build(&self, messages: &[Message]) -> Result<ConversationIds, TextProblem> {
        use crate::data::tokenizer::TokenizerError::Conversation;
        let chat: Vec<_> = messages.iter().map(Message::as_chat).collect();
        self.tokenizer
            .build_conversation(&chat, self.literal)
            .map_err(|error| match error {
                Conversation(problem) => problem.into(),
                other => TextProblem::Tokenizer {
                    message: other.to_string(),
                },
            })
    }

    fn fits(&self, ids: &ConversationIds) -> bool {
        match self.lengths {
            Lengths::Whole(most) => ids.ids.len() <= most,
            Lengths::Pair { prompt, answer } => ids
                .written
                .last()
                .is_some_and(|last| last.start <= prompt && last.len() <= answer),
        }
    }

    /// Cuts the last question and the last answer so that what is left fits; every part of a
    /// conversation with roles is encoded for itself.
    fn cut_last_turn(
        &self,
        ids: &ConversationIds,
        messages: &mut [Message],
        cuts: &mut Cuts,
    ) -> Result<(), TextProblem> {
        let question = messages.iter().rposition(|m| m.role == ChatRole::User);
        let (Some(question), Some(answer)) = (question, messages.len().checked_sub(1)) else {
            return Ok(());
        };
        let count = |index: usize| self.encode_text(&messages[index].content).len();
        let (asked, answered) = (count(question), count(answer));
        let written = ids.written.last().map_or(0, ExactSizeIterator::len);
        let before = ids.ids.len() - written;
        let no_room = |tokens: usize, limit, setting| TextProblem::NoRoom {
            tokens,
            limit,
            setting,
        };
        let (ask, tell) = match self.lengths {
            Lengths::Whole(most) => {
                let fixed = ids.ids.len() - asked - answered;
                if fixed + 2 > most {
                    return Err(no_room(fixed, most, "max_length"));
                }
                shares(asked, answered, most - fixed)
            }
            Lengths::Pair { prompt, answer } => {
                let fixed = before - asked;
                if fixed + 1 > prompt {
                    return Err(no_room(fixed, prompt, "max_source_length"));
                }
                let fixed_answer = written - answered;
                if fixed_answer + 1 > answer {
                    return Err(no_room(fixed_answer, answer, "max_target_length"));
                }
                (prompt - fixed, answer - fixed_answer)
            }
        };
        for (index, has, room, count) in [
            (question, asked, ask, &mut cuts.prompts),
            (answer, answered, tell, &mut cuts.answers),
        ] {
            if has > room {
                let fits = |text: &str| self.encode_text(text).len() <= room;
                let kept = longest_beginning(&messages[index].content, fits).len();
                messages[index].content.truncate(kept);
                *count = 1;
            }
        }
        Ok(())
    }
}

/// The first of `0..=last` for which `fits` is true, of which none but those before are false;
/// `last` if there is none.
fn first_that(last: usize, fits: impl Fn(usize) -> bool) -> usize {
    if last == 0 || fits(0) {
        return 0;
    }
    let (mut bad, mut good) = (0, last);
    while good - bad > 1 {
        let middle = bad + (good - bad) / 2;
        match fits(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    good
}

/// Cuts a list; whether there was anything to cut.
fn cut(ids: &mut Vec<u32>, most: usize) -> bool {
    let longer = ids.len() > most;
    ids.truncate(most);
    longer
}
