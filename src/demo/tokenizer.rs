//! A small tokenizer, written as the file that ChatGLM-6B's folders have.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::corpus::Question;
use super::{DemoError, files};
use crate::checkpoint::run_state::write_json;
use crate::data::sentencepiece::{ModelProto, ModelType, Piece, PieceKind};
use crate::data::tokenizer::{GlmTokenizer, TokenizerError, append_chatglm_pieces};

/// Pieces before the specials are appended: with those it makes 760.
const PIECES: usize = 416;

const SENTENCE_PIECE: &str = "ice_text.model";
const CONFIG: &str = "tokenizer_config.json";

/// In front of every word, where the text has a space.
const SPACE: char = '▁';

/// The vocabulary for these texts: all their characters, then whole English words, those first that
/// save most. UNIGRAM, as ChatGLM-6B's: with log frequencies for scores the most probable cut takes
/// a whole word where there is one.
pub fn vocabulary(questions: &[Question]) -> Vec<Piece> {
    let mut characters: BTreeMap<String, usize> = BTreeMap::new();
    let mut words: BTreeMap<String, usize> = BTreeMap::new();
    for text in questions.iter().flat_map(|q| [&q.question, &q.answer]) {
        let text = format!("{SPACE}{}", text.replace(' ', &SPACE.to_string()));
        for character in text.chars() {
            *characters.entry(character.to_string()).or_default() += 1;
        }
        for word in text.split_inclusive(SPACE).skip(1) {
            let letters = word.bytes().take_while(u8::is_ascii_alphabetic).count();
            if letters > 1 {
                let word = format!("{SPACE}{}", &word[..letters]);
                *words.entry(word).or_default() += 1;
            }
        }
    }
    let mut pieces: Vec<Piece> = [
        ("<unk>", PieceKind::Unknown),
        ("<s>", PieceKind::Control),
        ("</s>", PieceKind::Control),
        ("<pad>", PieceKind::Control),
        ("<n>", PieceKind::UserDefined),
    ]
    .map(|(text, kind)| Piece {
        text: text.to_owned(),
        score: 0.0,
        kind,
    })
    .into();
    let mut words: Vec<(String, usize)> = words.into_iter().filter(|(_, n)| *n > 1).collect();
    words.sort_by_key(|(word, n)| std::cmp::Reverse(n * (word.chars().count() - 1)));
    words.truncate(PIECES.saturating_sub(pieces.len() + characters.len()));
    let total: usize = characters.values().sum();
    let mut learned: Vec<(String, usize)> = characters.into_iter().chain(words).collect();
    learned.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    pieces.extend(learned.into_iter().map(|(text, n)| Piece {
        text,
        score: (n as f32 / total as f32).ln(),
        kind: PieceKind::Normal,
    }));
    pieces
}

/// Writes `ice_text.model`, specials appended, and `tokenizer_config.json` into a model folder, and
/// returns what they hold.
///
/// # Errors
/// The files cannot be written.
pub fn write(folder: &Path, questions: &[Question]) -> Result<GlmTokenizer, DemoError> {
    let mut proto = ModelProto::new(ModelType::Unigram, false, vocabulary(questions));
    append_chatglm_pieces(&mut proto).map_err(TokenizerError::from)?;
    files::write(&folder.join(SENTENCE_PIECE), &proto.to_bytes())?;
    let config = json!({ "tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0 });
    write_json(&folder.join(CONFIG), &config)?;
    Ok(GlmTokenizer::chatglm(proto, 0)?)
}

/// Copies the tokenizer's files from one model folder to another.
///
/// # Errors
/// A file cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<(), DemoError> {
    for name in [SENTENCE_PIECE, CONFIG] {
        files::copy(&from.join(name), &to.join(name))?;
    }
    Ok(())
}
