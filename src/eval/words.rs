//! Text to words, as Python's jieba cuts it (`jieba.cut`, its model for unknown words on).
//!
//! Dictionary and model are those of jieba-rs, which are jieba's. Around them the two differ in what
//! belongs to a Chinese block, and in how they cut letters and digits that are no dictionary words
//! (`2-3`, `v1.2.3`): both are done here, as jieba does them. One difference is left: jieba-rs rounds the
//! model, so that a character five times or more in a row, which can be cut in several equally likely
//! ways, may be cut in another of them.

use std::sync::LazyLock;

use jieba_rs::Jieba;

/// The dictionary; made at the first use, which takes about a second.
static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);

/// The words of a text, in order, every character in one of them.
pub fn cut(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match in_block(first) {
            true => rest.find(|c| !in_block(c)).unwrap_or(rest.len()),
            // Whatever stands outside of blocks is a word of its own, character by character.
            false if rest.starts_with("\r\n") => 2,
            false => first.len_utf8(),
        };
        let (block, after) = rest.split_at(length);
        match in_block(first) {
            true => cut_block(block, &mut words),
            false => words.push(block),
        }
        rest = after;
    }
    words
}

/// Whether a character belongs to text that the dictionary is asked about.
fn in_block(c: char) -> bool {
    is_han(c) || c.is_ascii_alphanumeric() || "+#&._%-".contains(c)
}

/// jieba's Chinese characters, which end before those that Unicode added later.
fn is_han(c: char) -> bool {
    ('\u{4e00}'..='\u{9fd5}').contains(&c)
}

fn cut_block<'a>(block: &'a str, words: &mut Vec<&'a str>) {
    // What lies between `from` and the next word is letters, digits and signs that the dictionary
    // does not know, in pieces that jieba would cut otherwise.
    let (mut from, mut to) = (0, 0);
    for word in JIEBA.cut(block, true) {
        if word.contains(is_han) || is_known(word) {
            cut_unknown(&block[from..to], words);
            words.push(word);
            from = to + word.len();
        }
        to += word.len();
    }
    cut_unknown(&block[from..to], words);
}

/// Whether a word without Chinese characters is one of the dictionary (`C++`, `AT&T`). Each has a sign in
/// it; without its model jieba puts together letters and digits only, and leaves other signs alone.
fn is_known(word: &str) -> bool {
    let has_sign = word.bytes().any(|byte| !byte.is_ascii_alphanumeric());
    has_sign && word.len() > 1 && JIEBA.cut(word, false) == [word]
}

/// Cuts text without Chinese characters and dictionary words: numbers and names, and what lies between.
fn cut_unknown<'a>(text: &'a str, words: &mut Vec<&'a str>) {
    let mut rest = text;
    while !rest.is_empty() {
        let length = match name_length(rest) {
            0 => rest
                .find(|c: char| c.is_ascii_alphanumeric())
                .unwrap_or(rest.len()),
            length => length,
        };
        let (word, after) = rest.split_at(length);
        words.push(word);
        rest = after;
    }
}

/// Length of the name or number that a text begins with: letters and digits, perhaps a point and
/// further digits, perhaps a percent sign.
fn name_length(text: &str) -> usize {
    let end_of = |from: usize, belongs: fn(&u8) -> bool| {
        let bytes = text.as_bytes().iter().skip(from);
        from + bytes.take_while(|byte| belongs(byte)).count()
    };
    let mut end = end_of(0, u8::is_ascii_alphanumeric);
    if end == 0 {
        return 0;
    }
    if text[end..].starts_with('.') {
        let digits = end_of(end + 1, u8::is_ascii_digit);
        if digits > end + 1 {
            end = digits;
        }
    }
    end + usize::from(text[end..].starts_with('%'))
}
