//! Bytes as characters that can be seen, in which byte-level vocabularies are written.

use std::collections::HashMap;

/// GPT-2's alphabet: printable characters of Latin-1 stand for themselves, the other bytes for the
/// characters from U+0100 on, in order.
#[derive(Clone, Debug)]
pub(super) struct Alphabet {
    characters: [char; 256],
    bytes: HashMap<char, u8>,
}

impl Alphabet {
    pub(super) fn new() -> Self {
        let mut others = '\u{100}'..;
        let characters = std::array::from_fn(|byte| {
            let byte = byte as u8;
            match byte {
                b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
                // The range does not end at the 68th.
                _ => others.next().unwrap_or(char::REPLACEMENT_CHARACTER),
            }
        });
        let bytes = characters.iter().copied().zip(0..=u8::MAX).collect();
        Self { characters, bytes }
    }

    /// Bytes as characters.
    pub(super) fn write(&self, bytes: &[u8]) -> String {
        let characters = bytes.iter().map(|&byte| self.characters[usize::from(byte)]);
        characters.collect()
    }

    /// The way back; `None` if a character stands for no byte.
    pub(super) fn read(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|c| self.bytes.get(&c).copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let alphabet = Alphabet::new();
        let all: Vec<u8> = (0..=u8::MAX).collect();
        let text = alphabet.write(&all);
        assert_eq!(alphabet.read(&text), Some(all));
        // As vocabularies in the wild write them: space, newline, delete, no-break space, ÿ.
        assert_eq!(alphabet.write(b" \n\x7f\xa0\xad\xff!"), "ĠĊġłŃÿ!");
        assert_eq!(alphabet.read("a b"), None);
    }
}
