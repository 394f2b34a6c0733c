//! `tokenizer.json` of GLM-4, in the format of the `tokenizers` crate.
//!
//! Read here and not by the crate, which would take any model, normaliser and pattern that the file
//! names: what is not GLM-4's is refused by name.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::alphabet::Alphabet;
use super::bounded::{AtMost, MembersAtMost};
use super::ranks::in_order;
use super::words::PATTERN;
use super::{ByteLevelError, MAX_TOKEN_BYTES, MAX_TOKENS, Tokens};
use crate::data::text_error::shortened;

/// Most merges: a token may be reached in several ways. GLM-4's has about two for each token.
const MAX_MERGES: usize = 4 * MAX_TOKENS;
/// Most added tokens; GLM-4 has 14.
const MAX_ADDED: usize = 1024;
/// Longest text of a part that is looked into; GLM-4's pre_tokenizer has some hundred bytes.
const MAX_PART_BYTES: usize = 1 << 14;
/// Most characters of a value in a message.
const SHOWN: usize = 80;

#[derive(Deserialize)]
struct TokenizerJson<'a> {
    #[serde(default = "nothing_added")]
    added_tokens: AtMost<AddedToken, MAX_ADDED>,
    #[serde(borrow)]
    normalizer: Option<&'a RawValue>,
    #[serde(borrow)]
    pre_tokenizer: Option<&'a RawValue>,
    #[serde(borrow)]
    decoder: Option<&'a RawValue>,
    #[serde(borrow)]
    model: BpeModel<'a>,
}

fn nothing_added() -> AtMost<AddedToken, MAX_ADDED> {
    AtMost(Vec::new())
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct BpeModel<'a> {
    vocab: MembersAtMost<u32, MAX_TOKENS>,
    merges: AtMost<Merge, MAX_MERGES>,
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    dropout: Option<&'a RawValue>,
    #[serde(borrow)]
    unk_token: Option<&'a RawValue>,
    #[serde(borrow)]
    continuing_subword_prefix: Option<&'a RawValue>,
    #[serde(borrow)]
    end_of_word_suffix: Option<&'a RawValue>,
    #[serde(borrow)]
    byte_fallback: Option<&'a RawValue>,
    #[serde(default)]
    ignore_merges: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair([String; 2]),
    Line(String),
}

impl Tokens {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`ByteLevelError::Part`] for one that is not GLM-4's, and what is wrong with a damaged one.
    pub fn from_tokenizer_json(file: &[u8]) -> Result<Self, ByteLevelError> {
        let json: TokenizerJson = serde_json::from_slice(file)
            .map_err(|error| ByteLevelError::Json(error.to_string()))?;
        check_settings(&json)?;
        let BpeModel {
            vocab: MembersAtMost(vocab),
            merges: AtMost(merges),
            ignore_merges,
            ..
        } = json.model;
        let vocab: HashMap<String, u32> = vocab.into_iter().collect();
        let merges = merges.iter().zip(1..).map(|(merge, number)| {
            let (left, right) = match merge {
                Merge::Pair([left, right]) => (left.as_str(), right.as_str()),
                Merge::Line(line) => line
                    .split_once(' ')
                    .ok_or(ByteLevelError::Merge { number })?,
            };
            let id = |name: &str| vocab.get(name).copied();
            let pair = id(left).zip(id(right));
            pair.ok_or(ByteLevelError::Merge { number })
        });
        let merges = merges.collect::<Result<_, _>>()?;
        let specials = numbered_behind(vocab.len(), json.added_tokens.0, &vocab)?;
        Ok(Self {
            merges,
            tokens: in_order(bytes_of(vocab)?)?,
            whole_words: ignore_merges,
            specials,
        })
    }
}

/// The bytes of each token.
fn bytes_of(vocab: HashMap<String, u32>) -> Result<Vec<(u32, Vec<u8>)>, ByteLevelError> {
    let alphabet = Alphabet::new();
    let bytes = vocab.into_iter().map(|(name, id)| {
        let bytes = alphabet.read(&name).filter(|bytes| !bytes.is_empty());
        let bytes = bytes.ok_or_else(|| ByteLevelError::Part {
            key: format!("model.vocab, id {id}"),
            found: shortened(&format!("{name:?}"), SHOWN),
            expected: "tokens of bytes, in GPT-2's alphabet".to_owned(),
        })?;
        match bytes.len() {
            0..=MAX_TOKEN_BYTES => Ok((id, bytes)),
            len => Err(ByteLevelError::LongToken { id, bytes: len }),
        }
    });
    bytes.collect()
}

/// The names of the added tokens, whose ids must follow those of the vocabulary. One that repeats a
/// token of the vocabulary adds nothing.
fn numbered_behind(
    tokens: usize,
    mut added: Vec<AddedToken>,
    vocab: &HashMap<String, u32>,
) -> Result<Vec<String>, ByteLevelError> {
    added.retain(|token| vocab.get(&token.content) != Some(&token.id));
    added.sort_by_key(|token| token.id);
    let named = added.into_iter().zip(tokens..).map(|(token, id)| {
        if token.id as usize == id {
            return Ok(token.content);
        }
        Err(ByteLevelError::Part {
            key: format!("added_tokens, {}", shortened(&token.content, SHOWN)),
            found: format!("id {}", token.id),
            expected: format!("{id}, since added tokens are numbered behind the vocabulary"),
        })
    });
    named.collect()
}

/// Everything that changes which ids a text has.
fn check_settings(json: &TokenizerJson<'_>) -> Result<(), ByteLevelError> {
    let model = &json.model;
    let text = |text: &str| Value::String(text.to_owned());
    // What a file leaves out is as GLM-4 has it.
    for (key, found, expected) in [
        ("model.type", model.kind, text("BPE")),
        ("model.dropout", model.dropout, Value::Null),
        ("model.unk_token", model.unk_token, Value::Null),
        (
            "model.continuing_subword_prefix",
            model.continuing_subword_prefix,
            text(""),
        ),
        (
            "model.end_of_word_suffix",
            model.end_of_word_suffix,
            text(""),
        ),
        (
            "model.byte_fallback",
            model.byte_fallback,
            Value::Bool(false),
        ),
    ] {
        let found = part(key, found)?;
        if !found.is_null() {
            expect(key, &found, &expected)?;
        }
    }
    let at = |value: &Value, pointer: &str| value.pointer(pointer).cloned().unwrap_or_default();
    expect(
        "normalizer",
        &part("normalizer", json.normalizer)?,
        &Value::Null,
    )?;
    let pre_tokenizer = part("pre_tokenizer", json.pre_tokenizer)?;
    for (key, expected) in [
        ("/type", text("Sequence")),
        ("/pretokenizers/0/type", text("Split")),
        ("/pretokenizers/0/pattern/Regex", text(PATTERN)),
        ("/pretokenizers/0/behavior", text("Isolated")),
        ("/pretokenizers/0/invert", Value::Bool(false)),
        ("/pretokenizers/1/type", text("ByteLevel")),
        ("/pretokenizers/1/add_prefix_space", Value::Bool(false)),
        ("/pretokenizers/1/use_regex", Value::Bool(false)),
        ("/pretokenizers/2", Value::Null),
    ] {
        let name = format!("pre_tokenizer{}", key.replace('/', "."));
        expect(&name, &at(&pre_tokenizer, key), &expected)?;
    }
    let decoder = at(&part("decoder", json.decoder)?, "/type");
    expect("decoder.type", &decoder, &text("ByteLevel"))
}

/// A small part of the file; null if it is not there.
fn part(key: &str, json: Option<&RawValue>) -> Result<Value, ByteLevelError> {
    let Some(json) = json.map(RawValue::get) else {
        return Ok(Value::Null);
    };
    if json.len() > MAX_PART_BYTES {
        return Err(ByteLevelError::Json(format!(
            "{key} has {} bytes, more than {MAX_PART_BYTES}",
            json.len()
        )));
    }
    serde_json::from_str(json).map_err(|error| ByteLevelError::Json(format!("{key}: {error}")))
}

fn expect(key: &str, found: &Value, expected: &Value) -> Result<(), ByteLevelError> {
    if found == expected {
        return Ok(());
    }
    let shown = |value: &Value| match value {
        Value::Null => "nothing".to_owned(),
        value => shortened(&value.to_string(), SHOWN),
    };
    Err(ByteLevelError::Part {
        key: key.to_owned(),
        found: shown(found),
        expected: shown(expected),
    })
}
