//! Special tokens: their ids, the pieces that the oldest file lacks, and text that names them.

use super::text::{MAX_BLANK, NEWLINE, TAB, blank};
use super::{ChatRole, Era, Generation, TokenizerError};
use crate::data::sentencepiece::{ModelProto, Piece, PieceKind, SentencePiece, SentencePieceError};

/// Specials of ChatGLM2 and 3, numbered from the end of the vocabulary.
const CHATGLM3: [&str; 9] = [
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
/// How many of them ChatGLM2 has; behind them are the roles.
pub(super) const ROLES_FROM: u32 = 5;

/// Specials of GLM-4, numbered likewise. The last four, of images, only some of its files have.
const GLM4: [&str; 14] = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
];
/// Where its roles begin; all of its files name these, and what stands before them.
pub(super) const GLM4_ROLES_FROM: u32 = 6;
const GLM4_LEAST: usize = 10;

/// How many specials GLM-4 has where the file does not say.
pub(super) fn glm4_specials() -> usize {
    GLM4.len()
}

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
    /// `<pad>`; `<unk>` in ChatGLM2 and 3, `<|endoftext|>` in GLM-4.
    pub pad: u32,
    /// `</s>`: an answer ends (ChatGLM2 and 3); `<|endoftext|>` in GLM-4.
    pub eos: u32,
    /// Number of pieces, from which the specials of all but ChatGLM-6B are numbered.
    first_numbered: u32,
    /// The names of those specials, in order.
    numbered: Vec<String>,
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
            pad: id("<pad>")?,
            eos: id("</s>")?,
            first_numbered,
            numbered: Vec::new(),
        })
    }

    /// Those of ChatGLM2 and 3.
    pub(super) fn of_chatglm2(
        model: &SentencePiece,
        generation: Generation,
    ) -> Result<Self, TokenizerError> {
        let first = model.proto().pieces.len() as u32;
        let count = match generation {
            Generation::ChatGlm2 => ROLES_FROM as usize,
            _ => CHATGLM3.len(),
        };
        Ok(Self {
            mask: first,
            gmask: first + 1,
            smask: first + 2,
            sop: first + 3,
            eop: first + 4,
            pad: piece_id(model, "<unk>", "ChatGLM2")?,
            eos: piece_id(model, "</s>", "ChatGLM2")?,
            first_numbered: first,
            numbered: CHATGLM3[..count].iter().map(|&name| name.into()).collect(),
        })
    }

    /// GLM-4's, behind so many tokens; a file that names its specials must name these.
    pub(super) fn of_glm4(first: u32, named: &[String]) -> Result<Self, TokenizerError> {
        for (index, &name) in GLM4.iter().enumerate() {
            let needed = index < GLM4_LEAST && !named.is_empty();
            if needed && named.get(index).is_none_or(|found| found != name) {
                return Err(TokenizerError::MissingSpecial {
                    name,
                    id: first + index as u32,
                });
            }
        }
        let numbered = match named {
            [] => GLM4.iter().map(|&name| name.into()).collect(),
            named => named.to_vec(),
        };
        Ok(Self {
            eos: first,
            pad: first,
            mask: first + 1,
            gmask: first + 2,
            smask: first + 3,
            sop: first + 4,
            eop: first + 5,
            first_numbered: first,
            numbered,
        })
    }

    /// How many specials are numbered behind the vocabulary.
    pub(super) fn count(&self) -> u32 {
        self.numbered.len() as u32
    }

    /// The id of a role's token, in the generations that have them.
    pub(super) fn role(&self, role: ChatRole) -> Option<u32> {
        self.numbered_id(&format!("<|{role}|>"))
    }

    pub(super) fn numbered_id(&self, token: &str) -> Option<u32> {
        let index = self.numbered.iter().position(|name| name == token)?;
        Some(self.first_numbered + index as u32)
    }

    pub(super) fn numbered_name(&self, id: u32) -> Option<&str> {
        let index = id.checked_sub(self.first_numbered)?;
        self.numbered.get(index as usize).map(String::as_str)
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

/// The literals that the reference splits text at.
#[derive(Clone, Debug, Default)]
pub(super) struct SpecialText {
    /// With their ids.
    literals: Vec<(String, u32)>,
    /// Whether whitespace beside them vanishes.
    strips: bool,
}

/// A stretch of text between, or at, literal special tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Part<'a> {
    Text(&'a str),
    Special(u32),
}

impl SpecialText {
    /// ChatGLM-6B's. `[gMASK]` is in none of the lists: the reference leaves it to ordinary pieces.
    pub(super) fn of_chatglm(era: Era, model: &SentencePiece, shift: u32) -> Self {
        let literals = match era {
            Era::A => ["<sop>", "</s>", "<unk>", "<pad>", "[MASK]"],
            Era::B | Era::C => ["<sop>", "<eop>", "<unk>", "<pad>", "[MASK]"],
        };
        let with_id = |literal: &str| Some((literal.into(), model.piece_to_id(literal)? + shift));
        Self {
            literals: literals.into_iter().filter_map(with_id).collect(),
            strips: true,
        }
    }

    /// GLM-4's: all of its specials.
    pub(super) fn of_glm4(special: &SpecialIds) -> Self {
        Self {
            literals: special
                .numbered
                .iter()
                .cloned()
                .zip(special.first_numbered..)
                .collect(),
            strips: false,
        }
    }

    /// Cuts `text` at the literals. What is empty between them is left out.
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
            let is_here = |(name, _): &&(String, u32)| rest[at..].starts_with(name.as_str());
            let Some((name, id)) = self.literals.iter().find(is_here) else {
                at += 1;
                continue;
            };
            let mut before = &rest[..at];
            rest = &rest[at + name.len()..];
            if self.strips {
                before = before.trim_end_matches(is_python_space);
                rest = rest.trim_start_matches(is_python_space);
            }
            parts.extend((!before.is_empty()).then_some(Part::Text(before)));
            parts.push(Part::Special(*id));
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
        let mut special = SpecialText {
            literals: vec![("<sop>".to_owned(), 1), ("[MASK]".to_owned(), 2)],
            strips: true,
        };
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
        special.strips = false;
        assert_eq!(
            special.split("<sop> x \n[MASK]"),
            [Part::Special(1), Part::Text(" x \n"), Part::Special(2)]
        );
    }
}
