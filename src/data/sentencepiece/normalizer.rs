//! What happens to text before it is cut: replacement rules, spaces, the dummy prefix.

use std::ops::Range;

use super::charsmap::Charsmap;
use super::error::SentencePieceError;
use super::model_proto::NormalizerSpec;
use super::trie::Trie;

/// Stands for a space inside pieces.
pub(super) const SPACE: &str = "\u{2581}";

/// The normaliser of one model.
#[derive(Debug)]
pub(super) struct TextNormalizer {
    charsmap: Option<Charsmap>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    space: &'static str,
}

impl TextNormalizer {
    pub(super) fn new(spec: &NormalizerSpec) -> Result<Self, SentencePieceError> {
        let blob = &spec.precompiled_charsmap;
        let charsmap = (!blob.is_empty()).then(|| Charsmap::parse(blob));
        Ok(Self {
            charsmap: charsmap.transpose()?,
            add_dummy_prefix: spec.add_dummy_prefix,
            remove_extra_whitespaces: spec.remove_extra_whitespaces,
            space: if spec.escape_whitespaces { SPACE } else { " " },
        })
    }

    /// Normalises `text`. `trace` is told, in order, from which bytes of `text` the output from a
    /// certain byte on comes; output past the end of the result was cut off again.
    pub(super) fn normalize(
        &self,
        text: &str,
        user_defined: &Trie,
        mut trace: impl FnMut(usize, Range<usize>),
    ) -> String {
        let mut at = 0;
        if self.remove_extra_whitespaces {
            while at < text.len() {
                let (replacement, len) = self.prefix(&text[at..], user_defined);
                if replacement != " " {
                    break;
                }
                at += len;
            }
        }
        trace(0, 0..at);
        if at == text.len() {
            return String::new();
        }
        let mut out = String::with_capacity(text.len() + text.len() / 2 + SPACE.len());
        if self.add_dummy_prefix {
            out.push_str(self.space);
        }
        let mut after_space = self.remove_extra_whitespaces;
        while at < text.len() {
            let (mut replacement, len) = self.prefix(&text[at..], user_defined);
            if after_space {
                replacement = replacement.trim_start_matches(' ');
            }
            trace(out.len(), at..at + len);
            for (index, part) in replacement.split(' ').enumerate() {
                if index > 0 {
                    out.push_str(self.space);
                }
                out.push_str(part);
            }
            if self.remove_extra_whitespaces && !replacement.is_empty() {
                after_space = replacement.ends_with(' ');
            }
            at += len;
        }
        if self.remove_extra_whitespaces {
            out.truncate(out.trim_end_matches(self.space).len());
        }
        out
    }

    /// What the start of a non-empty `text` becomes, and how many bytes of it that is.
    fn prefix<'a>(&'a self, text: &'a str, user_defined: &Trie) -> (&'a str, usize) {
        if let Some((len, _)) = user_defined.longest_prefix(text.as_bytes()) {
            return (&text[..len], len);
        }
        if let Some(map) = &self.charsmap
            && let Some((len, replacement)) = map.longest_rule(text)
        {
            return (replacement, len);
        }
        let len = text.chars().next().map_or(0, char::len_utf8);
        (&text[..len], len)
    }
}
