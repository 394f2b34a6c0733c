//! The pieces, ready for look-up.

use std::collections::HashMap;

use super::error::{SentencePieceError, shorten};
use super::model_proto::{ModelProto, Piece, PieceKind};
use super::trie::Trie;

/// What segmentation needs to know of a piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct PieceFacts {
    pub(super) score: f32,
    pub(super) kind: PieceKind,
}

/// The pieces by id and by text.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pub(super) facts: Vec<PieceFacts>,
    /// Pieces that text can become: NORMAL, USER_DEFINED, UNUSED.
    pub(super) text: Trie,
    /// USER_DEFINED pieces alone.
    pub(super) user_defined: Trie,
    /// UNKNOWN, CONTROL and BYTE pieces.
    reserved: HashMap<String, u32>,
    /// Ids of the 256 BYTE pieces, with byte fallback.
    pub(super) byte_ids: Option<[u32; 256]>,
    pub(super) unk_id: u32,
    /// Over NORMAL pieces; as in the C++ library, `max_score` is never below the smallest positive f32.
    pub(super) min_score: f32,
    pub(super) max_score: f32,
}

impl Vocabulary {
    pub(super) fn new(model: &ModelProto) -> Result<Self, SentencePieceError> {
        let pieces = &model.pieces;
        let mut sorted: Vec<(&[u8], u32)> = (0..)
            .zip(pieces)
            .map(|(id, piece)| (piece.text.as_bytes(), id))
            .collect();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(piece_error(
                pieces,
                twice[1].1,
                format!("is also piece {}", twice[0].1),
            ));
        }
        let kind = |id: u32| pieces[id as usize].kind;
        let reserved = sorted.iter().filter(|(_, id)| !kind(*id).matches_text());
        let reserved = reserved.map(|&(_, id)| (pieces[id as usize].text.clone(), id));
        let reserved: HashMap<_, _> = reserved.collect();
        sorted.retain(|&(_, id)| kind(id).matches_text());
        let text = Trie::from_sorted(&sorted);
        sorted.retain(|&(_, id)| kind(id) == PieceKind::UserDefined);
        let user_defined = Trie::from_sorted(&sorted);

        let normal = || pieces.iter().filter(|p| p.kind == PieceKind::Normal);
        Ok(Self {
            facts: pieces.iter().map(facts).collect(),
            text,
            user_defined,
            reserved,
            byte_ids: byte_ids(model)?,
            unk_id: unknown_id(pieces)?,
            min_score: normal().map(|p| p.score).fold(f32::MAX, f32::min),
            max_score: normal().map(|p| p.score).fold(f32::MIN_POSITIVE, f32::max),
        })
    }

    /// The id of a piece by its exact text.
    pub(super) fn id_of(&self, piece: &str) -> Option<u32> {
        let text = self.text.get(piece.as_bytes());
        text.or_else(|| self.reserved.get(piece).copied())
    }
}

fn facts(piece: &Piece) -> PieceFacts {
    PieceFacts {
        score: piece.score,
        kind: piece.kind,
    }
}

fn unknown_id(pieces: &[Piece]) -> Result<u32, SentencePieceError> {
    let mut unknown = (0..)
        .zip(pieces)
        .filter(|(_, piece)| piece.kind == PieceKind::Unknown)
        .map(|(id, _)| id);
    match (unknown.next(), unknown.next()) {
        (Some(id), None) => Ok(id),
        (Some(first), Some(second)) => Err(piece_error(
            pieces,
            second,
            format!("is a second UNKNOWN piece beside piece {first}"),
        )),
        (None, _) => Err(SentencePieceError::Vocabulary {
            problem: "has no UNKNOWN piece".to_owned(),
        }),
    }
}

/// The ids of `<0x00>` to `<0xFF>`.
fn byte_ids(model: &ModelProto) -> Result<Option<[u32; 256]>, SentencePieceError> {
    const MISSING: u32 = u32::MAX;
    let mut ids = [MISSING; 256];
    for (id, piece) in (0..).zip(&model.pieces) {
        if piece.kind != PieceKind::Byte {
            continue;
        }
        let problem = match byte_of(&piece.text) {
            Some(_) if !model.trainer().byte_fallback => "is a BYTE piece without byte_fallback",
            Some(byte) => {
                ids[usize::from(byte)] = id;
                continue;
            }
            None => "is a BYTE piece that names no byte",
        };
        return Err(piece_error(&model.pieces, id, problem.to_owned()));
    }
    if !model.trainer().byte_fallback {
        return Ok(None);
    }
    match ids.iter().position(|&id| id == MISSING) {
        None => Ok(Some(ids)),
        Some(byte) => Err(SentencePieceError::Vocabulary {
            problem: format!("has byte_fallback but no BYTE piece <0x{byte:02X}>"),
        }),
    }
}

/// The byte that a BYTE piece stands for.
pub(super) fn byte_of(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let byte = u8::from_str_radix(hex, 16).ok()?;
    (format!("{byte:02X}") == hex).then_some(byte)
}

fn piece_error(pieces: &[Piece], id: u32, problem: String) -> SentencePieceError {
    let index = id as usize;
    SentencePieceError::Piece {
        index,
        piece: shorten(&pieces[index].text),
        problem,
    }
}
