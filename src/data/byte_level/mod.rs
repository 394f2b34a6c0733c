//! GLM-4's tokens: any sequence of bytes, merged by rank inside the words that a pattern cuts.
//!
//! The file is tiktoken's list of ranks or a `tokenizer.json`; both become the same [`Tokens`], and
//! the BPE of the `tokenizers` crate merges them.

use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::tokenizer::Model;

mod alphabet;
mod bounded;
mod error;
mod ranks;
mod tokenizer_json;
mod words;

use alphabet::Alphabet;
pub use error::ByteLevelError;
pub use ranks::is_ranks;
use words::Words;

/// Largest list of ranks that is read; GLM-4's has 2.6 MB.
pub const MAX_RANKS_BYTES: u64 = 8 << 20;
/// Largest `tokenizer.json` that is read; GLM-4's has 20 MB.
pub const MAX_JSON_BYTES: u64 = 48 << 20;
/// Most tokens; GLM-4 has 151,329.
const MAX_TOKENS: usize = 1 << 18;
/// Longest token, in bytes.
const MAX_TOKEN_BYTES: usize = 512;
/// Words of up to this many different ids are remembered with theirs.
const REMEMBERED_WORDS: usize = 10_000;

/// What a file says: tokens, and how they are merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// The bytes of each id; all 256 single bytes are among them.
    pub tokens: Vec<Vec<u8>>,
    /// Pairs of ids that become one, those first that are merged first.
    pub merges: Vec<(u32, u32)>,
    /// Whether a whole word that is a token is taken as it is, whatever the merges say.
    pub whole_words: bool,
    /// Names of special tokens, numbered behind the tokens; nothing where the file has none.
    pub specials: Vec<String>,
}

impl Tokens {
    /// Text to tell vocabularies apart by: the same for the same ids.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for token in &self.tokens {
            bytes.extend((token.len() as u32).to_le_bytes());
            bytes.extend(token);
        }
        for (left, right) in &self.merges {
            bytes.extend(left.to_le_bytes());
            bytes.extend(right.to_le_bytes());
        }
        bytes.push(u8::from(self.whole_words));
        bytes
    }
}

/// A vocabulary ready for use.
#[derive(Debug)]
pub struct ByteLevel {
    tokens: Tokens,
    alphabet: Alphabet,
    words: Words,
    bpe: BPE,
}

impl ByteLevel {
    /// Builds the look-up tables.
    ///
    /// # Errors
    /// [`ByteLevelError`] for a single byte without a token, or merges that make no token.
    pub fn new(tokens: Tokens) -> Result<Self, ByteLevelError> {
        let alphabet = Alphabet::new();
        let names: Vec<String> = tokens
            .tokens
            .iter()
            .map(|token| alphabet.write(token))
            .collect();
        let vocabulary: std::collections::HashMap<String, u32> =
            names.iter().cloned().zip(0..).collect();
        for byte in 0..=u8::MAX {
            if !vocabulary.contains_key(&alphabet.write(&[byte])) {
                return Err(ByteLevelError::MissingByte { byte });
            }
        }
        let mut merges = Vec::with_capacity(tokens.merges.len());
        for (index, &(left, right)) in tokens.merges.iter().enumerate() {
            let name = |id: u32| names.get(id as usize).cloned();
            let merge = name(left).zip(name(right));
            // The crate's builder takes a merge that makes no token for one.
            let sound = |(left, right): &(String, String)| {
                vocabulary.contains_key(&format!("{left}{right}"))
            };
            let number = index + 1;
            merges.push(
                merge
                    .filter(sound)
                    .ok_or(ByteLevelError::Merge { number })?,
            );
        }
        let bpe = BpeBuilder::new()
            .vocab_and_merges(vocabulary.into_iter().collect::<Vocab>(), merges)
            .ignore_merges(tokens.whole_words)
            .cache_capacity(REMEMBERED_WORDS)
            .build()
            .map_err(|error| ByteLevelError::Build(error.to_string()))?;
        Ok(Self {
            words: Words::new()?,
            tokens,
            alphabet,
            bpe,
        })
    }

    /// What it was built from.
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// The ids of `text`; nothing in it is special.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for word in self.words.cut(text) {
            let name = self.alphabet.write(word.as_bytes());
            match self.bpe.tokenize(&name) {
                Ok(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                // Without an unknown token, which we never give it, the crate has no error here;
                // the single bytes would be right, if not the shortest.
                Err(_) => ids.extend(name.chars().filter_map(|c| {
                    let mut buffer = [0; 4];
                    self.bpe.token_to_id(c.encode_utf8(&mut buffer))
                })),
            }
        }
        ids
    }

    /// The bytes of ids; an id beyond the tokens has none.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let tokens = &self.tokens.tokens;
        let bytes = ids.iter().filter_map(|&id| tokens.get(id as usize));
        bytes.flatten().copied().collect()
    }

    /// The id of a token by its bytes.
    pub fn token_to_id(&self, token: &[u8]) -> Option<u32> {
        self.bpe.token_to_id(&self.alphabet.write(token))
    }
}
