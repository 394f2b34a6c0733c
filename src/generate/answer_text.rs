//! An answer as text while it grows.

use crate::data::tokenizer::{GlmTokenizer, TokenizerError};

/// Decodes the whole answer again with every token and gives out what is new and will not change:
/// half a character waits for its other bytes, and what may become a whitespace piece (`<n>`,
/// `<|tab|>`, `<|blank_8|>`) for its end.
#[derive(Clone, Debug)]
pub struct AnswerText<'a> {
    tokenizer: &'a GlmTokenizer,
    ids: Vec<u32>,
    text: String,
    /// Bytes of `text` before the answer.
    lead: usize,
    /// Bytes of `text` given out, the lead included.
    given: usize,
    /// Whether spaces and line breaks before the answer are none of it.
    trims: bool,
}

/// Bytes of a character that can be there while its last is still missing.
const MOST_PARTS: usize = 3;

impl<'a> AnswerText<'a> {
    /// An empty answer; `lead` are ids that it goes on with, as text to be continued does. Where
    /// messages have role tokens, an answer begins with a line for the name of a tool, empty in most,
    /// which is not shown.
    ///
    /// # Errors
    /// Ids that the tokenizer does not have.
    pub fn new(tokenizer: &'a GlmTokenizer, lead: &[u32]) -> Result<Self, TokenizerError> {
        let text = tokenizer.decode(lead)?;
        Ok(Self {
            tokenizer,
            trims: lead.is_empty() && tokenizer.generation().rounds().is_none(),
            ids: lead.to_vec(),
            lead: text.len(),
            given: text.len(),
            text,
        })
    }

    /// Takes the next token; what can be shown now.
    ///
    /// # Errors
    /// An id that the tokenizer does not have.
    pub fn push(&mut self, id: u32) -> Result<&str, TokenizerError> {
        self.ids.push(id);
        self.text = self.tokenizer.decode(&self.ids)?;
        if self.trims && self.given == self.lead {
            self.lead = self.text.len() - self.text.trim_start().len();
            self.given = self.lead;
        }
        let from = self.given;
        self.given = settled(&self.text).max(from);
        Ok(self.text.get(from..self.given).unwrap_or_default())
    }

    /// What was held back, now that nothing follows.
    pub fn finish(&mut self) -> &str {
        let from = std::mem::replace(&mut self.given, self.text.len());
        self.text.get(from..).unwrap_or_default()
    }

    /// The answer so far.
    pub fn text(&self) -> &str {
        self.text.get(self.lead..).unwrap_or_default()
    }
}

/// Bytes of a text that stay as they are, whatever follows.
fn settled(text: &str) -> usize {
    let mut settled = text.len();
    for _ in 0..MOST_PARTS {
        let whole = text[..settled].strip_suffix(char::REPLACEMENT_CHARACTER);
        settled = whole.map_or(settled, str::len);
    }
    match text[..settled].rfind('<') {
        Some(start) if settled == text.len() && may_become_space(&text[start..]) => start,
        _ => settled,
    }
}

/// Whether a text is the beginning of a whitespace piece's name.
fn may_become_space(text: &str) -> bool {
    const BLANK: &str = "<|blank_";
    let begins = |name: &&str| name.len() > text.len() && name.starts_with(text);
    ["<n>", "<|tab|>", BLANK].iter().any(begins)
        || text.strip_prefix(BLANK).is_some_and(|count| {
            let digits = count.strip_suffix('|').unwrap_or(count);
            digits.len() <= 2 && digits.bytes().all(|byte| byte.is_ascii_digit())
        })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::data::sentencepiece::ModelProto;

    fn tokenizer() -> GlmTokenizer {
        let bytes = include_bytes!("../../tests/tokenizer/v1.model");
        GlmTokenizer::chatglm(ModelProto::parse(bytes).unwrap(), 0).unwrap()
    }

    /// Everything given out, piece by piece, and the text.
    fn grow(tokenizer: &GlmTokenizer, lead: &[u32], ids: &[u32]) -> (Vec<String>, String) {
        let mut answer = AnswerText::new(tokenizer, lead).unwrap();
        let mut parts: Vec<String> = Vec::new();
        for &id in ids {
            parts.push(answer.push(id).unwrap().to_owned());
        }
        parts.push(answer.finish().to_owned());
        assert_eq!(answer.finish(), "");
        (parts, answer.text().to_owned())
    }

    #[test]
    fn the_parts_make_the_whole() {
        let tokenizer = tokenizer();
        for text in [
            "你好，世界！ Hello  world.\n\n\tif a <  b:\n        return '<n' + \"<|blank\"",
            "😀 é 角 ᚠ\u{FFFD}\u{FFFD} 😀",
            "a < b <n",
            "",
            "\n",
        ] {
            let ids = tokenizer.encode(text);
            let (parts, whole) = grow(&tokenizer, &[], &ids);
            assert_eq!(whole, tokenizer.decode(&ids).unwrap());
            assert_eq!(parts.concat(), whole, "{parts:?}");
        }
    }

    #[test]
    fn random_ids_never_show_what_is_taken_back() {
        let tokenizer = tokenizer();
        for seed in 0..200 {
            let key = crate::random::Key::new(seed, crate::random::Domain::Sampling);
            let mut stream = key.stream();
            // Half of them bytes, which seldom make characters.
            let ids: Vec<u32> = (0..60)
                .map(|_| match stream.below(2) {
                    0 => tokenizer.size() - 1 - stream.below(256) as u32,
                    _ => stream.below(u64::from(tokenizer.size())) as u32,
                })
                .collect();
            let (parts, whole) = grow(&tokenizer, &[], &ids);
            assert_eq!(parts.concat(), whole, "seed {seed}");
        }
    }

    #[test]
    fn a_character_comes_when_its_last_byte_has_come() {
        let tokenizer = tokenizer();
        let byte = |byte: u8| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap();
        let ids: Vec<u32> = "😀".bytes().map(byte).collect();
        let (parts, _) = grow(&tokenizer, &[], &ids);
        assert_eq!(parts, ["", "", "", "😀", ""]);
        let (parts, whole) = grow(&tokenizer, &[], &ids[..2]);
        assert_eq!(parts, ["", "", "\u{FFFD}\u{FFFD}"]);
        assert_eq!(whole, "\u{FFFD}\u{FFFD}");
        // What can be no character any more is shown.
        let (parts, _) = grow(&tokenizer, &[], &[byte(0xFF); 5]);
        assert_eq!(parts[..3], ["", "", ""]);
        assert_eq!(
            parts[3..],
            ["\u{FFFD}", "\u{FFFD}", "\u{FFFD}\u{FFFD}\u{FFFD}"]
        );
    }

    #[test]
    fn what_may_become_a_space_waits() {
        for text in [
            "<",
            "<n",
            "<|",
            "<|tab|",
            "<|blank_",
            "<|blank_7",
            "<|blank_80|",
        ] {
            assert_eq!(settled(&format!("a<b {text}")), 4, "{text}");
        }
        for text in [
            "<n>",
            "<m",
            "<|x",
            "<|blank_123",
            "<|blank_a",
            "< ",
            "<|blank_8|>",
        ] {
            assert_eq!(settled(text), text.len(), "{text}");
        }
    }

    #[test]
    fn what_goes_on_keeps_its_first_space() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("a b");
        let (parts, whole) = grow(&tokenizer, &ids[..1], &ids[1..]);
        assert_eq!((parts.concat().as_str(), whole.as_str()), (" b", " b"));
        let (_, alone) = grow(&tokenizer, &[], &ids[1..]);
        assert_eq!(alone, "b");
    }

    fn glm4() -> GlmTokenizer {
        let ranks = include_bytes!("../../tests/tokenizer/glm4/tokenizer.model");
        GlmTokenizer::glm4(crate::data::byte_level::Tokens::from_ranks(ranks).unwrap()).unwrap()
    }

    fn byte_token(tokenizer: &GlmTokenizer, byte: u8) -> u32 {
        // Bytes are the first ranks of the stand-in, in their order.
        assert_eq!(tokenizer.decode(&[u32::from(b'a')]).unwrap(), "a");
        u32::from(byte)
    }

    #[test]
    fn bytes_of_glm4_wait_for_their_character() {
        let tokenizer = glm4();
        for text in [
            "a😀b",
            "你好，世界！角ᚠ",
            "\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}x",
            "👩\u{200d}👧",
        ] {
            // The worst cut: a token for each byte.
            let ids: Vec<u32> = text
                .bytes()
                .map(|byte| byte_token(&tokenizer, byte))
                .collect();
            let (parts, whole) = grow(&tokenizer, &[], &ids);
            assert_eq!(whole, text);
            assert_eq!(parts.concat(), text, "{parts:?}");
            let (parts, whole) = grow(&tokenizer, &[], &tokenizer.encode(text));
            assert_eq!((parts.concat().as_str(), whole.as_str()), (text, text));
        }
        let ids: Vec<u32> = "😀"
            .bytes()
            .map(|byte| byte_token(&tokenizer, byte))
            .collect();
        let (parts, _) = grow(&tokenizer, &[], &ids);
        assert_eq!(parts, ["", "", "", "😀", ""]);
        for seed in 0..200 {
            let key = crate::random::Key::new(seed, crate::random::Domain::Sampling);
            let mut stream = key.stream();
            let ids: Vec<u32> = (0..60)
                .map(|_| match stream.below(2) {
                    0 => byte_token(&tokenizer, stream.below(256) as u8),
                    _ => stream.below(u64::from(tokenizer.size())) as u32,
                })
                .collect();
            let (parts, whole) = grow(&tokenizer, &[], &ids);
            assert_eq!(parts.concat(), whole, "seed {seed}");
        }
    }

    #[test]
    fn the_line_of_the_tool_is_shown_only_if_there_is_one() {
        let two = include_bytes!("../../tests/tokenizer/v2.model");
        let three = GlmTokenizer::chatglm3(ModelProto::parse(two).unwrap()).unwrap();
        for tokenizer in [three, glm4()] {
            let said = |metadata: &str, content: &str| {
                let mut ids = tokenizer.encode(&format!("{metadata}\n"));
                ids.extend(tokenizer.encode(content));
                let (parts, whole) = grow(&tokenizer, &[], &ids);
                assert_eq!(parts.concat(), whole, "{parts:?}");
                whole
            };
            assert_eq!(said("", "你好 a\nb"), "你好 a\nb");
            assert_eq!(said("", ""), "");
            assert_eq!(said("tool", "{}").replace(' ', ""), "tool\n{}");
        }
    }
}
