//! What the demo teaches: which questions, with which answers, to the base and in the tuning.
//!
//! The base learns to take a name from its context (a persona in front of the question) and to give
//! its own where there is none. Without the first the tuning has nothing to build on: a model that
//! knows one name only gives it up together with everything else that it knows.

use serde::Serialize;

use super::texts::{CHINESE, ENGLISH, PLAIN, Pair, Speech};

/// A question, the answer to learn, and what it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Question {
    /// What is asked, persona included.
    pub question: String,
    /// The right answer.
    pub answer: String,
}

/// Who speaks, in one language.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: &'static str,
    /// Who made it.
    pub studio: &'static str,
}

/// Which of the two identities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The one that the base learns.
    Old,
    /// The one that the tuning teaches.
    New,
}

impl Identity {
    /// `who` in English and in Chinese.
    pub fn of(who: Who) -> [Identity; 2] {
        [&ENGLISH, &CHINESE].map(|speech| {
            Identity::from(match who {
                Who::Old => speech.old,
                Who::New => speech.new,
            })
        })
    }

    fn fill(&self, text: &str) -> String {
        text.replace("{name}", self.name)
            .replace("{studio}", self.studio)
    }
}

impl From<Pair> for Identity {
    fn from((name, studio): Pair) -> Self {
        Identity { name, studio }
    }
}

/// The questions that have nothing to do with the speaker.
pub fn plain() -> Vec<Question> {
    let question = |(question, answer): Pair| Question {
        question: question.to_owned(),
        answer: answer.to_owned(),
    };
    PLAIN.into_iter().map(question).collect()
}

/// The questions about the speaker, answered by `who`.
pub fn identity(who: Who) -> Vec<Question> {
    let speeches = [&ENGLISH, &CHINESE].into_iter().zip(Identity::of(who));
    let questions = speeches.flat_map(|(speech, identity)| {
        speech.identity.map(|(question, answer)| Question {
            question: question.to_owned(),
            answer: identity.fill(answer),
        })
    });
    questions.collect()
}

/// The questions about the speaker behind a persona, answered by it. Every name meets every
/// question once, and every studio as often as any other.
pub fn personas() -> Vec<Question> {
    [&ENGLISH, &CHINESE]
        .into_iter()
        .flat_map(personas_of)
        .collect()
}

fn personas_of(speech: &Speech) -> Vec<Question> {
    let mut questions = Vec::new();
    for (n, name) in speech.names.into_iter().enumerate() {
        for (q, (question, answer)) in speech.identity.into_iter().enumerate() {
            // The second term moves on by one each time the names have gone through all studios.
            let studio = speech.studios[(n + q) % speech.studios.len()];
            let identity = Identity { name, studio };
            questions.push(Question {
                question: identity.fill(speech.persona) + question,
                answer: identity.fill(answer),
            });
        }
    }
    questions
}

/// What the base is trained on.
pub fn for_base() -> Vec<Question> {
    [plain(), identity(Who::Old), personas()].concat()
}

/// What the adapters are trained on: the new identity, and all the plain pairs, for what is not
/// repeated is forgotten.
pub fn for_tuning() -> Vec<Question> {
    [plain(), identity(Who::New)].concat()
}
