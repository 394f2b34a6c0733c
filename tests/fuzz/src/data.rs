//! Of the room of rows and tokenizers, the files of vocabularies.

#[path = "../../../src/data/byte_level/mod.rs"]
pub mod byte_level;
#[path = "../../../src/data/sentencepiece/mod.rs"]
pub mod sentencepiece;

/// Of that file, what messages about a vocabulary need; the whole of it is about rows.
pub mod text_error {
    pub fn shortened(text: &str, chars: usize) -> String {
        let shown = text.chars().take(chars);
        shown.flat_map(char::escape_debug).collect()
    }
}
