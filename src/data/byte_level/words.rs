//! The cut of text into words, inside of which tokens are merged.

use regex::Regex;

use super::ByteLevelError;

/// GLM-4's pattern, as tokenizer files have it (SPEC of the tokenizers, section 6).
pub(super) const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// [`PATTERN`] without its look-ahead, so that it is matched in linear time and never gives up:
/// engines that look ahead go back through every run of spaces and have a limit for that.
const LINEAR: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";

/// Cuts text.
#[derive(Clone, Debug)]
pub(super) struct Words(Regex);

impl Words {
    pub(super) fn new() -> Result<Self, ByteLevelError> {
        let regex = Regex::new(LINEAR).map_err(|error| ByteLevelError::Build(error.to_string()))?;
        Ok(Self(regex))
    }

    /// The words of `text`, which together are all of it.
    pub(super) fn cut<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let rest = text.get(at..).filter(|rest| !rest.is_empty())?;
            // Every character is in one of the pattern's classes: a match begins at once.
            let found = self.0.find(rest).map_or(rest.len(), |found| found.end());
            let word = &rest[..found.max(1)];
            let end = match found == rest.len() {
                true => found,
                false => found - looked_ahead(word),
            };
            at += end;
            Some(&rest[..end])
        })
    }
}

/// Bytes that `\s+(?!\S)` leaves of a run of spaces before something else: its last character, if
/// there are others.
fn looked_ahead(word: &str) -> usize {
    match word.chars().next_back() {
        Some(last)
            if last.len_utf8() < word.len()
                && !"\r\n".contains(last)
                && word.chars().all(char::is_whitespace) =>
        {
            last.len_utf8()
        }
        _ => 0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_as_the_pattern_says() {
        let words = Words::new().unwrap();
        for (text, expected) in [
            ("", &[][..]),
            ("Hello world", &["Hello", " world"]),
            ("it'S I'll ſ's", &["it", "'S", " I", "'ll", " ſ", "'s"]),
            ("12345 6", &["123", "45", " ", "6"]),
            ("a   b", &["a", "  ", " b"]),
            ("a   ", &["a", "   "]),
            ("a \u{3000}1", &["a", " ", "\u{3000}", "1"]),
            ("a  \r\n\n  b", &["a", "  \r\n\n", " ", " b"]),
            ("x = 3;\n\ny", &["x", " =", " ", "3", ";\n\n", "y"]),
            ("你好，世界！", &["你好", "，世界", "！"]),
            ("\u{0}\u{301}e\u{301}", &["\u{0}\u{301}", "e", "\u{301}"]),
        ] {
            let found: Vec<&str> = words.cut(text).collect();
            assert_eq!(found, expected, "{text:?}");
        }
    }

    #[test]
    fn the_two_patterns_differ_by_the_look_ahead() {
        assert_eq!(LINEAR, PATTERN.replace(r"|\s+(?!\S)", ""));
    }

    #[test]
    fn long_runs_are_cut_in_linear_time() {
        let words = Words::new().unwrap();
        let spaces = " ".repeat(3_000_000);
        let text = format!("{spaces}x{spaces}");
        let found: Vec<usize> = words.cut(&text).map(str::len).collect();
        assert_eq!(found, [2_999_999, 2, 3_000_000]);
    }
}
