//! How long prompts, answers and conversations may be, and what is left of those that are longer.

use super::encode::EncodeError;
use crate::data::template::{Template, TemplateSettings};
use crate::data::tokenizer::{ChatMessage, ChatRole, Generation, GlmTokenizer, LiteralSpecials};

/// The room for the ids of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lengths {
    /// A prompt and an answer have a limit each.
    Pair {
        /// Ids of a prompt without special tokens; with roles, all ids before the answer.
        prompt: usize,
        /// Ids of an answer without special tokens; with roles, all that the model writes.
        answer: usize,
    },
    /// Prompt, answer and special tokens have one together.
    Whole(usize),
}

impl Lengths {
    /// The lengths of these settings.
    ///
    /// # Errors
    /// One that leaves no place for an id of text beside the special tokens.
    pub fn of(
        tokenizer: &GlmTokenizer,
        settings: &TemplateSettings,
        literal: LiteralSpecials,
    ) -> Result<Self, EncodeError> {
        let check = |setting, value, least| match value < least {
            true => Err(EncodeError::TooShort {
                setting,
                value,
                least,
            }),
            false => Ok(value),
        };
        if let Template::PlainText(plain) = &settings.template {
            return Ok(Self::Whole(check("max_length", plain.max_length, 4)?));
        }
        // What a question and an answer of no text take: [gMASK], sop, marks of rounds or roles.
        let messages = [ChatRole::User, ChatRole::Assistant].map(|role| ChatMessage {
            role,
            metadata: "",
            content: "",
        });
        let bare = tokenizer.build_conversation(&messages, literal)?;
        if let Some(max_length) = settings.template.max_length() {
            let prefix = tokenizer.encode_with(&settings.source_prefix, literal);
            let least = bare.ids.len() + prefix.len() + 2;
            return Ok(Self::Whole(check("max_length", max_length, least)?));
        }
        let (source, target) = (settings.max_source_length, settings.max_target_length);
        let with_roles = tokenizer.generation().rounds().is_none();
        let (around_prompt, around_answer) = match tokenizer.generation() {
            // [gMASK] stands behind the prompt; the answer stands between sop and eop.
            Generation::ChatGlm(_) => (1, 2),
            // [gMASK] and sop stand before the prompt; what closes the answer comes on top.
            _ if !with_roles => (2, 0),
            _ => {
                let written = bare.written.first().map_or(0, ExactSizeIterator::len);
                (bare.ids.len() - written, written)
            }
        };
        let prompt = check("max_source_length", source, around_prompt + 1)?;
        let answer = check("max_target_length", target, around_answer + 1)?;
        Ok(match with_roles {
            true => Self::Pair { prompt, answer },
            false => Self::Pair {
                prompt: prompt - around_prompt,
                answer: answer - around_answer,
            },
        })
    }
}

/// What is kept of so many ids of a question and of an answer where both have `room` together: all
/// if it fits; else the longer one gives way first, down to half of the room.
pub(super) fn shares(question: usize, answer: usize, room: usize) -> (usize, usize) {
    let answer = answer.min(room - question.min(room / 2));
    (question.min(room - answer), answer)
}

/// The longest beginning of `text` of which `fits` is true, found without looking at more of a long
/// text than twice that; nothing where even that does not fit.
pub(super) fn longest_beginning(text: &str, fits: impl Fn(&str) -> bool) -> &str {
    let boundary = |mut at: usize| {
        while !text.is_char_boundary(at) {
            at += 1;
        }
        at
    };
    let (mut good, mut bad, mut step) = (0, None, 64);
    while bad.is_none() && good < text.len() {
        let next = boundary((good + step).min(text.len()));
        match fits(&text[..next]) {
            true => good = next,
            false => bad = Some(next),
        }
        step *= 2;
    }
    while let Some(end) = bad {
        let middle = boundary(good + (end - good) / 2);
        let next = match middle > good && middle < end {
            true => middle,
            false => boundary(good + 1),
        };
        if next >= end {
            break;
        }
        match fits(&text[..next]) {
            true => good = next,
            false => bad = Some(next),
        }
    }
    &text[..good]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_one_gives_way() {
        assert_eq!(shares(3, 4, 10), (3, 4));
        assert_eq!(shares(30, 4, 10), (6, 4));
        assert_eq!(shares(3, 40, 10), (3, 7));
        assert_eq!(shares(30, 40, 10), (5, 5));
        assert_eq!(shares(30, 40, 11), (5, 6));
    }

    #[test]
    fn the_longest_beginning_is_found() {
        let text = "a你b😀".repeat(200);
        let chars = text.chars().count();
        for most in [
            0,
            1,
            2,
            3,
            5,
            40,
            63,
            64,
            65,
            200,
            chars - 1,
            chars,
            chars + 1,
        ] {
            let found = longest_beginning(&text, |text| text.chars().count() <= most);
            assert_eq!(found.chars().count(), most.min(chars), "{most}");
        }
        assert_eq!(longest_beginning("", |_| false), "");
        assert_eq!(longest_beginning("你", |_| false), "");
    }
}
