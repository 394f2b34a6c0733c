//! From ids back to text.

use super::SentencePiece;
use super::error::SentencePieceError;
use super::model_proto::PieceKind;
use super::normalizer::SPACE;
use super::vocabulary::byte_of;

impl SentencePiece {
    /// The text of ids. CONTROL pieces vanish; runs of BYTE pieces become UTF-8, each byte that
    /// is none becoming U+FFFD; the leading space of the dummy prefix is taken off.
    ///
    /// # Errors
    /// [`SentencePieceError::IdOutOfRange`] for an id without a piece.
    pub fn decode(&self, ids: &[u32]) -> Result<String, SentencePieceError> {
        let spec = self.proto.normalizer();
        let strips = spec.add_dummy_prefix || spec.remove_extra_whitespaces;
        let mut text = String::new();
        let mut bytes = Vec::new();
        // Whether one leading space was already taken off; with remove_extra_whitespaces all are.
        let mut stripped = false;
        for &id in ids {
            let piece =
                self.proto
                    .pieces
                    .get(id as usize)
                    .ok_or(SentencePieceError::IdOutOfRange {
                        id: i64::from(id),
                        pieces: self.proto.pieces.len(),
                    })?;
            if piece.kind == PieceKind::Byte {
                bytes.extend(byte_of(&piece.text));
                continue;
            }
            push_bytes(&mut text, &mut bytes);
            match piece.kind {
                PieceKind::Control => {}
                PieceKind::Unknown => text.push_str(&self.proto.trainer().unk_surface),
                _ => {
                    let mut surface = piece.text.as_str();
                    if strips
                        && text.is_empty()
                        && !stripped
                        && let Some(rest) = surface.strip_prefix(SPACE)
                    {
                        surface = rest;
                        stripped = !spec.remove_extra_whitespaces;
                    }
                    text.extend(
                        surface
                            .chars()
                            .map(|c| if c == '\u{2581}' { ' ' } else { c }),
                    );
                }
            }
        }
        push_bytes(&mut text, &mut bytes);
        Ok(text)
    }
}

/// Moves `bytes` to the end of `text`, what is no UTF-8 byte by byte as U+FFFD. (The standard
/// library's lossy conversion makes one U+FFFD of several bytes.)
fn push_bytes(text: &mut String, bytes: &mut Vec<u8>) {
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    bytes.clear();
}
