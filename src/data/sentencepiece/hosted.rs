//! The model behind the traits of the `tokenizers` crate, for code that wants that crate's
//! pipeline (offsets, truncation, padding). Ids are those of [`SentencePiece::encode`], which is
//! about twice as fast, since it keeps no alignment.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::tokenizer::{
    AddedToken, Decoder, Model, NormalizedString, Normalizer, Result, Token, TokenizerImpl, Trainer,
};
use tokenizers::{PostProcessorWrapper, PreTokenizerWrapper};

use super::SentencePiece;
use super::error::shorten;

/// Name of the file that [`Model::save`] writes.
const FILE_NAME: &str = "tokenizer.model";

/// A [`SentencePiece`] as Normalizer, Model and Decoder of one pipeline.
#[derive(Clone, Debug)]
pub struct Hosted(Arc<SentencePiece>);

/// A pipeline of the `tokenizers` crate around one SentencePiece model.
pub type HostedTokenizer =
    TokenizerImpl<Hosted, Hosted, PreTokenizerWrapper, PostProcessorWrapper, Hosted>;

impl Hosted {
    /// Puts the model behind the traits.
    pub fn new(model: Arc<SentencePiece>) -> Self {
        Self(model)
    }

    /// The whole pipeline: this normaliser, model and decoder, and no pre-tokeniser, since
    /// SentencePiece cuts across words.
    ///
    /// # Errors
    /// None of its own; the crate's setter has an error type.
    pub fn pipeline(&self) -> Result<HostedTokenizer> {
        let mut pipeline = TokenizerImpl::new(self.clone());
        pipeline.with_normalizer(Some(self.clone()))?;
        pipeline.with_decoder(Some(self.clone()));
        Ok(pipeline)
    }
}

impl Normalizer for Hosted {
    fn normalize(&self, normalized: &mut NormalizedString) -> Result<()> {
        let source = normalized.get().to_owned();
        let mut steps = Vec::new();
        let text = self
            .0
            .normalize(&source, |at, range| steps.push((at, range)));
        let mut changes = Changes::default();
        let mut done = 0;
        for (index, (at, range)) in steps.iter().enumerate() {
            let removed = source[range.clone()].chars().count();
            let at = (*at).min(text.len());
            let end = steps.get(index + 1).map_or(text.len(), |next| next.0);
            let end = end.min(text.len()).max(at);
            changes.insert(&text[done..at]);
            // The first step removes leading spaces; the dummy prefix that follows is new text.
            match index {
                0 => changes.replace(removed, ""),
                _ => {
                    changes.replace(removed, &text[at..end]);
                    done = end;
                }
            }
        }
        normalized.transform(changes.characters, changes.removed_first);
        Ok(())
    }
}

/// The edit of a text as `NormalizedString::transform` wants it: each new character with 1 when it
/// is inserted, or with minus the number of old characters that vanish behind the one it replaces.
#[derive(Default)]
struct Changes {
    characters: Vec<(char, isize)>,
    removed_first: usize,
}

impl Changes {
    fn insert(&mut self, text: &str) {
        self.characters.extend(text.chars().map(|c| (c, 1)));
    }

    /// Puts `text` in place of the next `old` characters.
    fn replace(&mut self, old: usize, text: &str) {
        let mut new = text.chars();
        let replaced = new.by_ref().take(old);
        let before = self.characters.len();
        self.characters.extend(replaced.map(|c| (c, 0)));
        let removed = old - (self.characters.len() - before);
        self.insert(new.as_str());
        if removed == 0 {
            return;
        }
        match self.characters.last_mut() {
            // An inserted character takes the place of the first of them.
            Some((_, change)) if *change > 0 => *change = 1 - removed as isize,
            Some((_, change)) => *change -= removed as isize,
            None => self.removed_first += removed,
        }
    }
}

impl Model for Hosted {
    type Trainer = Untrainable;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        let mut tokens = Vec::new();
        self.0.encode_normalized(sequence, |id, range| {
            let piece = self.0.id_to_piece(id).map(|piece| piece.text.clone());
            tokens.push(Token::new(
                id,
                piece.unwrap_or_default(),
                (range.start, range.end),
            ));
        });
        Ok(tokens)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.piece_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_piece(id).map(|piece| piece.text.clone())
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        let pieces = self.0.proto().pieces.iter();
        pieces.map(|piece| piece.text.clone()).zip(0..).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.proto().pieces.len()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        let name = prefix.map_or_else(|| FILE_NAME.to_owned(), |p| format!("{p}-{FILE_NAME}"));
        let path = folder.join(name);
        std::fs::write(&path, self.0.proto().to_bytes())?;
        Ok(vec![path])
    }

    fn get_trainer(&self) -> Untrainable {
        Untrainable
    }
}

impl Decoder for Hosted {
    fn decode_chain(&self, tokens: Vec<String>) -> Result<Vec<String>> {
        let ids = tokens.iter().map(|token| {
            self.0
                .piece_to_id(token)
                .ok_or_else(|| format!("`{}` is no piece of the vocabulary", shorten(token)))
        });
        let ids: Vec<u32> = ids.collect::<std::result::Result<_, _>>()?;
        Ok(vec![self.0.decode(&ids)?])
    }
}

/// The trainer that the crate's trait asks for: vocabularies of trained models are fixed, so it
/// refuses.
#[derive(Clone, Copy, Debug)]
pub struct Untrainable;

impl Trainer for Untrainable {
    type Model = Hosted;

    fn should_show_progress(&self) -> bool {
        false
    }

    fn train(&self, _model: &mut Hosted) -> Result<Vec<AddedToken>> {
        Err("the vocabulary of a SentencePiece file is fixed; it cannot be trained further".into())
    }

    fn feed<I, S, F>(&mut self, _iterator: I, _process: F) -> Result<()>
    where
        I: Iterator<Item = S> + Send,
        S: AsRef<str> + Send,
        F: Fn(&str) -> Result<Vec<String>> + Sync,
    {
        Err("the vocabulary of a SentencePiece file is fixed; it takes no training text".into())
    }
}
