//! Plain text: documents, in pieces of bounded size.

use super::{Content, Documents, Input, ReadError, Record};
use crate::data::RowProblem;

/// Pieces of a document are cut near this size, in bytes, where possible at a line end.
const PIECE_BYTES: usize = 1 << 20;

/// Reader of documents. Line ends become line feeds; those before and behind a document vanish.
pub(super) struct PlainText {
    documents: Documents,
    piece: Piece,
    /// Bytes of a character that the last part of a long line ended within.
    cut: Vec<u8>,
    /// Whether the document ends with what was read so far.
    document_ended: bool,
    ended: bool,
}

#[derive(Default)]
struct Piece {
    line: usize,
    text: String,
    /// Line feeds behind the text that count only if more text follows.
    line_feeds: usize,
    /// Whether pieces of the same document came before.
    continues: bool,
}

impl PlainText {
    pub(super) fn new(documents: Documents) -> Self {
        Self {
            documents,
            piece: Piece::default(),
            cut: Vec::new(),
            document_ended: false,
            ended: false,
        }
    }

    /// `limit` bounds the pieces; documents have none.
    pub(super) fn next(
        &mut self,
        input: &mut Input,
        limit: usize,
    ) -> Result<Option<Record>, ReadError> {
        let limit = limit.clamp(8, PIECE_BYTES);
        while !self.ended {
            if std::mem::take(&mut self.document_ended)
                && let Some(record) = self.end_document()
            {
                return Ok(Some(record));
            }
            let line = input.line();
            let mut part = std::mem::take(&mut self.cut);
            if input.read_line(limit, &mut part)? == 0 && part.is_empty() {
                self.ended = true;
                break;
            }
            let (part, ends_line) = match part.strip_suffix(b"\n") {
                Some(part) => (part.strip_suffix(b"\r").unwrap_or(part), true),
                None => (part.as_slice(), false),
            };
            let text = match std::str::from_utf8(part) {
                Ok(text) => text,
                // The part of a long line may end within a character; at the end of the file none
                // does.
                Err(error)
                    if error.error_len().is_none() && !ends_line && input.peek()?.is_some() =>
                {
                    let (whole, cut) = part.split_at(error.valid_up_to());
                    self.cut = cut.to_vec();
                    std::str::from_utf8(whole).unwrap_or_default()
                }
                Err(error) => {
                    self.leave_out(ends_line);
                    return Err(ReadError::Row {
                        line,
                        problem: RowProblem::NotUtf8 {
                            byte: error.valid_up_to(),
                        },
                    });
                }
            };
            if let Some(record) = self.take(line, text, ends_line, limit) {
                return Ok(Some(record));
            }
        }
        Ok(self.end_document())
    }

    /// Adds a line, or a part of one; what is complete with it.
    fn take(&mut self, line: usize, text: &str, ends_line: bool, limit: usize) -> Option<Record> {
        let separates = self.documents == Documents::BlankLine
            && ends_line
            && text.trim().is_empty()
            && (self.piece.text.is_empty() || self.piece.line_feeds > 0);
        if separates {
            self.document_ended = true;
            return None;
        }
        let mut full = None;
        if !text.is_empty() {
            let length = self.piece.text.len() + self.piece.line_feeds + text.len();
            if length > limit && !self.piece.text.is_empty() {
                full = self.end_piece();
            }
            self.piece.add(line, text);
        }
        if ends_line {
            self.end_line(limit);
        }
        full
    }

    fn end_line(&mut self, limit: usize) {
        if self.documents == Documents::Line {
            self.document_ended = true;
        } else if !self.piece.text.is_empty() {
            // Endless line feeds are bounded as all is.
            self.piece.line_feeds = (self.piece.line_feeds + 1).min(limit);
        }
    }

    /// Goes on behind a line, or a part of one, that is no text.
    fn leave_out(&mut self, ends_line: bool) {
        if self.documents == Documents::Line {
            self.piece = Piece::default();
        } else if ends_line && !self.piece.text.is_empty() {
            self.piece.line_feeds += 1;
        }
    }

    /// The piece so far, more of its document being about to follow.
    fn end_piece(&mut self) -> Option<Record> {
        self.piece.flush_line_feeds();
        let begins = !self.piece.continues;
        let text = std::mem::take(&mut self.piece.text);
        self.piece.continues = true;
        Some(record(self.piece.line, text, begins, false))
    }

    /// The piece so far, its document ending with it; `None` for a document of white space.
    fn end_document(&mut self) -> Option<Record> {
        let piece = std::mem::take(&mut self.piece);
        let blank = piece.text.trim().is_empty() && !piece.continues;
        (!blank).then(|| record(piece.line, piece.text, !piece.continues, true))
    }
}

impl Piece {
    fn add(&mut self, line: usize, text: &str) {
        self.flush_line_feeds();
        if self.text.is_empty() {
            self.line = line;
        }
        self.text.push_str(text);
    }

    fn flush_line_feeds(&mut self) {
        self.text.extend(std::iter::repeat_n(
            '\n',
            std::mem::take(&mut self.line_feeds),
        ));
    }
}

fn record(line: usize, text: String, begins: bool, ends: bool) -> Record {
    Record {
        line,
        content: Content::Text { text, begins, ends },
    }
}
