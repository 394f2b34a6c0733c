//! Special tokens: their ids, the pieces that the oldest file lacks, and text that names them.

use super::text::{MAX_BLANK, NEWLINE, TAB, blank};
use super::{Era, Generation, TokenizerError};
use crate::data::sentencepiece::{ModelProto, Piece, PieceKind, SentencePiece, SentencePieceError};

/// Specials of ChatGLM2 and 3, numbered from the end of the vocabulary.
const NUMBERED: [&str; 9] = [
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
];

/// The ids of the special tokens, as the model sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialIds {
    /// `[MASK]`
    pub mask: u32,
    /// `[gMASK]`
    pub gmask: u32,
    /// `[sMASK]`
    pub smask: u32,
    /// `<sop>`: an answer begins.
    pub sop: u32,
    /// `<eop>`: an answer ends (ChatGLM-6B).
    pub eop: u32,
    /// `<unk>`
    pub unk: u32,
    /// `<pad>`
    pub pad: u32,
    /// `</s>`: an answer ends (ChatGLM2 and 3).
    pub eos: u32,
    /// Number of pieces, from which the specials of ChatGLM2 and 3 are numbered.
    first_numbered: u32,
    /// How many specials are numbered behind the vocabulary: 0, 5 or 9.
    pub(super) numbered: u32,
}

impl SpecialIds {
    pub(super) fn of_chatglm(model: &SentencePiece, shift: u32) -> Result<Self, TokenizerError> {
        // The shift of a hostile configuration must not wrap around.
        let pieces = model.proto().pieces.len() as u32;
        let first_numbered = shift
            .checked_add(pieces)
            .ok_or(TokenizerError::IdOutOfRange {
                id: u32::MAX,
                size: pieces,
            })?;
        let id = |piece| Ok::<_, TokenizerError>(shift + piece_id(model, piece, "ChatGLM-6B")?);
        id(NEWLINE)?;
        Ok(Self {
            mask: id("[MASK]")?,
            gmask: id("[gMASK]")?,
            smask: id("[sMASK]")?,
            sop: id("<sop>")?,
            eop: id("<eop>")?,
            unk: id("<unk>")?,
            pad: id("<pad>")?,
            eos: id("</s>")?,
            first_numbered,
            numbered: 0,
        })
    }

    /// Those of ChatGLM2 and 3.
    pub(super) fn numbered(
        model: &SentencePiece,
        generation: Generation,
    ) -> Result<Self, TokenizerError> {
        let first = model.proto().pieces.len() as u32;
        let unk = piece_id(model, "<unk>", "ChatGLM2")?;
        Ok(Self {
            mask: first,
            gmask: first + 1,
            smask: first + 2,
            sop: first + 3,
            eop: first + 4,
            unk,
            pad: unk,
            eos: piece_id(model, "</s>", "ChatGLM2")?,
            first_numbered: first,
            numbered: if generation == Generation::ChatGlm3 {
                9
            } else {
                5
            },
        })
    }

    /// The id of the `index`-th role (system, user, assistant, observation), in ChatGLM3.
    pub(super) fn role(&self, index: u32) -> Option<u32> {
        (5 + index < self.numbered).then(|| self.first_numbered + 5 + index)
    }

    pub(super) fn numbered_id(&self, token: &str) -> Option<u32> {
        let used = NUMBERED.iter().take(self.numbered as usize);
        let index = used.zip(0..).find(|(name, _)| **name == token)?.1;
        Some(self.first_numbered + index)
    }

    pub(super) fn numbered_name(&self, id: u32) -> Option<&'static str> {
        let index = id.checked_sub(self.first_numbered)?;
        (index < self.numbered).then(|| NUMBERED[index as usize])
    }
}

fn piece_id(
    model: &SentencePiece,
    piece: &str,
    needed_by: &'static str,
) -> Result<u32, TokenizerError> {
    model
        .piece_to_id(piece)
        .ok_or_else(|| TokenizerError::MissingPiece {
            piece: piece.to_owned(),
            needed_by,
        })
}

/// Appends the 344 pieces that ChatGLM-6B's first file (14 March 2023) lacks and switches byte
/// fallback on, as the code of that time did at load: the result is the later file, byte for byte.
/// A file that has `[gMASK]` is left as it is. Returns whether it was changed.
///
/// # Errors
/// [`SentencePieceError::Malformed`] when the file's own settings cannot be read.
pub fn append_chatglm_pieces(proto: &mut ModelProto) -> Result<bool, SentencePieceError> {
    const CONTROLS: [&str; 8] = [
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<unused_0>",
        "<sop>",
        "<eop>",
        "<ENC>",
        "<dBLOCK>",
    ];
    if proto.pieces.iter().any(|piece| piece.text == "[gMASK]") {
        return Ok(false);
    }
    let controls = CONTROLS.map(|text| (text.to_owned(), PieceKind::Control));
    let tab = std::iter::once((TAB.to_owned(), PieceKind::UserDefined));
    let blanks = (2..=MAX_BLANK).map(|n| (blank(n), PieceKind::UserDefined));
    let bytes = (0..=u8::MAX).map(|byte| (format!("<0x{byte:02X}>"), PieceKind::Byte));
    let added = controls.into_iter().chain(tab).chain(blanks).chain(bytes);
    proto.pieces.extend(added.map(|(text, kind)| Piece {
        text,
        score: 0.0,
        kind,
    }));
    proto.enable_byte_fallback()?;
    Ok(true)
}

/// The literals that the reference splits text at, with their ids.
#[derive(Clone, Debug)]
pub(super) struct SpecialText(Vec<(&'static str, u32)>);

/// A stretch of text between, or at, literal special tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Part<'a> {
    Text(&'a str),
    Special(u32),
}

impl SpecialText {
    /// `[gMASK]` is in none of the lists: the reference leaves it to ordinary pieces.
    pub(super) fn new(era: Era, model: &SentencePiece, shift: u32) -> Self {
        let literals = match era {
            Era::A => ["<sop>", "</s>", "<unk>", "<pad>", "[MASK]"],
            Era::B | Era::C => ["<sop>", "<eop>", "<unk>", "<pad>", "[MASK]"],
        };
        let with_id = |literal| Some((literal, model.piece_to_id(literal)? + shift));
        Self(literals.into_iter().filter_map(with_id).collect())
    }

    pub(super) fn none() -> Self {
        Self(Vec::new())
    }

    /// Cuts `text` at the literals; whitespace beside them is dropped, and what is then empty too.
    pub(super) fn split<'a>(&self, text: &'a str) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        let mut rest = text;
        let mut at = 0;
        while at < rest.len() {
            let here = rest.as_bytes()[at..].iter();
            let Some(skip) = here.clone().position(|byte| b"<[".contains(byte)) else {
                break;
            };
            at += skip;
            let literal = self.0.iter().find(|(name, _)| rest[at..].starts_with(name));
            let Some(&(name, id)) = literal else {
                at += 1;
                continue;
            };
            let before = rest[..at].trim_end_matches(is_python_space);
            parts.extend((!before.is_empty()).then_some(Part::Text(before)));
            parts.push(Part::Special(id));
            rest = rest[at + name.len()..].trim_start_matches(is_python_space);
            at = 0;
        }
        parts.extend((!rest.is_empty()).then_some(Part::Text(rest)));
        parts
    }
}

/// What Python's `str.strip` removes: Unicode's whitespace and four control characters.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_at_literals_and_strips_beside_them() {
        let special = SpecialText(vec![("<sop>", 1), ("[MASK]", 2)]);
        assert_eq!(
            special.split(" a \u{1f}\u{3000}<sop>\n b[ <[MASK][MASK]  "),
            [
                Part::Text(" a"),
                Part::Special(1),
                Part::Text("b[ <"),
                Part::Special(2),
                Part::Special(2),
            ]
        );
        assert_eq!(special.split(" x "), [Part::Text(" x ")]);
        assert_eq!(special.split(""), []);
    }
}
