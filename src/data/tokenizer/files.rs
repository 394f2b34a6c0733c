//! The tokenizer's files in a model folder.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{ConfigIds, EraWarning, GlmTokenizer, TokenizerError, TokenizerFacts};
use crate::data::byte_level::{ByteLevelError, MAX_JSON_BYTES, MAX_RANKS_BYTES, Tokens, is_ranks};
use crate::data::sentencepiece::{MAX_MODEL_BYTES, ModelProto, SentencePieceError};

/// ChatGLM2 and 3 also go round with a `tokenizer.json` that others made; theirs is the model.
const MODEL_FILES: [&str; 3] = ["ice_text.model", "tokenizer.model", JSON_FILE];
const JSON_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";
const MODEL_CONFIG_FILE: &str = "config.json";
/// The original tokenizer's code, which some folders still hold.
const CODE_FILE: &str = "tokenization_chatglm.py";
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// A token that ChatGLM3 has and ChatGLM2 has not.
const ROLE_TOKEN: &str = "<|user|>";

/// The contents of a tokenizer's main file.
#[derive(Clone, Debug, PartialEq)]
pub enum VocabularyFile {
    /// ChatGLM-6B to ChatGLM3.
    SentencePiece(ModelProto),
    /// GLM-4, from either of its files.
    ByteLevel(Tokens),
}

/// What a model folder holds of a tokenizer, read but not yet matched with the model.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    /// The main file.
    pub path: PathBuf,
    /// Its contents.
    pub vocabulary: VocabularyFile,
    /// `num_image_tokens` of `tokenizer_config.json`, where given.
    pub num_image_tokens: Option<u32>,
    /// Whether other files of the folder say that there are role tokens (ChatGLM3) or none
    /// (ChatGLM2); nothing if none says.
    pub has_roles: Option<bool>,
}

impl TokenizerFiles {
    /// Reads `ice_text.model`, `tokenizer.model` (SentencePiece, or GLM-4's ranks) or, without
    /// these, `tokenizer.json` (GLM-4's), and `tokenizer_config.json` if it is there.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn read(folder: &Path) -> Result<Self, TokenizerError> {
        let path = MODEL_FILES
            .iter()
            .map(|name| folder.join(name))
            .find(|path| path.exists())
            .ok_or_else(|| TokenizerError::NoFile {
                folder: folder.to_owned(),
            })?;
        let vocabulary = read_vocabulary(&path)?;
        let config = read_config(&folder.join(CONFIG_FILE))?;
        Ok(Self {
            num_image_tokens: num_image_tokens(&config, &folder.join(CONFIG_FILE))?,
            has_roles: has_roles(folder, &config)?,
            path,
            vocabulary,
        })
    }

    /// What the era checks need to know.
    pub fn facts(&self) -> TokenizerFacts {
        match &self.vocabulary {
            VocabularyFile::SentencePiece(proto) => {
                TokenizerFacts::new(proto, self.num_image_tokens, self.has_roles)
            }
            VocabularyFile::ByteLevel(tokens) => TokenizerFacts::of_tokens(tokens),
        }
    }

    /// Checks that tokenizer and model belong together, then builds the tokenizer.
    ///
    /// # Errors
    /// [`TokenizerError::Era`] when they do not; [`TokenizerError::File`] and
    /// [`TokenizerError::ByteLevelFile`] for a damaged vocabulary.
    pub fn build(
        self,
        config: &ConfigIds,
        embedding_rows: Option<usize>,
    ) -> Result<(GlmTokenizer, Vec<EraWarning>), TokenizerError> {
        let verdict = self.facts().check(config, embedding_rows)?;
        let path = self.path;
        let tokenizer = match self.vocabulary {
            VocabularyFile::SentencePiece(proto) => {
                GlmTokenizer::of_proto(proto, verdict.generation, verdict.num_image_tokens)
            }
            VocabularyFile::ByteLevel(tokens) => GlmTokenizer::glm4(tokens),
        };
        let tokenizer = tokenizer.map_err(|error| match error {
            TokenizerError::SentencePiece(source) => TokenizerError::File { path, source },
            TokenizerError::ByteLevel(source) => TokenizerError::ByteLevelFile { path, source },
            other => other,
        })?;
        Ok((tokenizer, verdict.warnings))
    }
}

fn read_vocabulary(path: &Path) -> Result<VocabularyFile, TokenizerError> {
    let byte_level = |source| TokenizerError::ByteLevelFile {
        path: path.to_owned(),
        source,
    };
    let sentence_piece = |source| TokenizerError::File {
        path: path.to_owned(),
        source,
    };
    let is_json = path.file_name().is_some_and(|name| name == JSON_FILE);
    let limit = match is_json {
        true => MAX_JSON_BYTES,
        false => MAX_MODEL_BYTES,
    };
    let too_large = |bytes| match is_json {
        true => byte_level(ByteLevelError::TooLarge { bytes, limit }),
        false => sentence_piece(SentencePieceError::TooLarge { bytes, limit }),
    };
    let bytes = read_bounded(path, limit)?.map_err(too_large)?;
    if is_json {
        let tokens = Tokens::from_tokenizer_json(&bytes).map_err(byte_level)?;
        return Ok(VocabularyFile::ByteLevel(tokens));
    }
    if !is_ranks(&bytes) {
        let proto = ModelProto::parse(&bytes).map_err(sentence_piece)?;
        return Ok(VocabularyFile::SentencePiece(proto));
    }
    if bytes.len() as u64 > MAX_RANKS_BYTES {
        return Err(byte_level(ByteLevelError::TooLarge {
            bytes: bytes.len() as u64,
            limit: MAX_RANKS_BYTES,
        }));
    }
    let tokens = Tokens::from_ranks(&bytes).map_err(byte_level)?;
    Ok(VocabularyFile::ByteLevel(tokens))
}

/// The file's bytes, or its size when that is over `limit`.
fn read_bounded(path: &Path, limit: u64) -> Result<Result<Vec<u8>, u64>, TokenizerError> {
    let io = |source| TokenizerError::Io {
        path: path.to_owned(),
        source,
    };
    // Looked at before it is opened: opening a pipe waits for a writer for ever.
    let meta = path.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(TokenizerError::NotAFile {
            path: path.to_owned(),
        });
    }
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    let len = meta.len();
    // The size may lie (a file that grows): the read itself is bounded too.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(TokenizerError::LfsPointer {
            path: path.to_owned(),
        });
    }
    let found = len.max(bytes.len() as u64);
    Ok(if found > limit { Err(found) } else { Ok(bytes) })
}

/// `tokenizer_config.json`; null if there is none.
fn read_config(path: &Path) -> Result<Value, TokenizerError> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    let fail = |problem| TokenizerError::Config {
        path: path.to_owned(),
        problem,
    };
    let bytes = read_bounded(path, MAX_CONFIG_BYTES)?.map_err(|bytes| {
        fail(format!(
            "{bytes} bytes, more than {MAX_CONFIG_BYTES}: not a tokenizer_config.json"
        ))
    })?;
    serde_json::from_slice(&bytes).map_err(|error| fail(format!("not valid JSON: {error}")))
}

fn num_image_tokens(config: &Value, path: &Path) -> Result<Option<u32>, TokenizerError> {
    match config.get("num_image_tokens") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| TokenizerError::Config {
                path: path.to_owned(),
                problem: format!(
                    "num_image_tokens is {value}; it must be a whole number (0 or 20000)"
                ),
            }),
    }
}

/// Whether the folder is ChatGLM3's, of which ChatGLM2's has the same `tokenizer.model`: by the name
/// or the tokens in `tokenizer_config.json`, by the original code, by the name in `config.json`.
fn has_roles(folder: &Path, config: &Value) -> Result<Option<bool>, TokenizerError> {
    let by_config = by_name(config).or_else(|| names_role_token(config).then_some(true));
    if by_config.is_some() {
        return Ok(by_config);
    }
    // What is too large or no JSON says nothing here; config.json is checked where the model is.
    let read = |name| match folder.join(name) {
        path if path.exists() => read_bounded(&path, MAX_CONFIG_BYTES).map(Result::ok),
        _ => Ok(None),
    };
    if let Some(code) = read(CODE_FILE)? {
        let code = String::from_utf8_lossy(&code);
        return Ok(Some(code.contains(ROLE_TOKEN)));
    }
    let model = read(MODEL_CONFIG_FILE)?;
    let model: Option<Value> = model.and_then(|json| serde_json::from_slice(&json).ok());
    Ok(model.as_ref().and_then(by_name))
}

/// What the name says that a configuration was saved from.
fn by_name(config: &Value) -> Option<bool> {
    let names = ["name_or_path", "_name_or_path"].iter();
    let names = names.filter_map(|key| config.get(key)?.as_str());
    names.map(str::to_lowercase).find_map(|name| {
        let says = |family| name.contains(family);
        match (says("chatglm2"), says("chatglm3")) {
            (true, false) => Some(false),
            (false, true) => Some(true),
            _ => None,
        }
    })
}

/// Whether the tokens or the chat template of `tokenizer_config.json` have roles.
fn names_role_token(config: &Value) -> bool {
    let added = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object);
    let mut added = added.into_iter().flat_map(|tokens| tokens.values());
    let more = config.get("additional_special_tokens");
    let mut more = more.and_then(Value::as_array).into_iter().flatten();
    let template = config.get("chat_template").and_then(Value::as_str);
    let is_role = |token: &Value| token.as_str() == Some(ROLE_TOKEN);
    added.any(|token| token.get("content").is_some_and(is_role))
        || more.any(|token| is_role(token) || token.get("content").is_some_and(is_role))
        || template.is_some_and(|template| template.contains(ROLE_TOKEN))
}
