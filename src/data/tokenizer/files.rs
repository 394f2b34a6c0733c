//! The tokenizer's files in a model folder.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{ConfigIds, EraWarning, GlmTokenizer, TokenizerError, TokenizerFacts};
use crate::data::sentencepiece::{MAX_MODEL_BYTES, ModelProto, SentencePieceError};

const MODEL_FILES: [&str; 2] = ["ice_text.model", "tokenizer.model"];
const CONFIG_FILE: &str = "tokenizer_config.json";
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// What a model folder holds of a tokenizer, read but not yet matched with the model.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    /// The SentencePiece file.
    pub path: PathBuf,
    /// Its contents.
    pub proto: ModelProto,
    /// `num_image_tokens` of `tokenizer_config.json`, where given.
    pub num_image_tokens: Option<u32>,
}

impl TokenizerFiles {
    /// Reads `ice_text.model` or `tokenizer.model`, and `tokenizer_config.json` if it is there.
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
        let bytes =
            read_bounded(&path, MAX_MODEL_BYTES)?.map_err(|bytes| TokenizerError::File {
                path: path.clone(),
                source: SentencePieceError::TooLarge {
                    bytes,
                    limit: MAX_MODEL_BYTES,
                },
            })?;
        if is_tiktoken(&bytes) {
            return Err(TokenizerError::Tiktoken { path });
        }
        let proto = ModelProto::parse(&bytes).map_err(|source| TokenizerError::File {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            num_image_tokens: read_num_image_tokens(&folder.join(CONFIG_FILE))?,
            path,
            proto,
        })
    }

    /// What the era checks need to know.
    pub fn facts(&self) -> TokenizerFacts {
        TokenizerFacts::new(&self.proto, self.num_image_tokens)
    }

    /// Checks that tokenizer and model belong together, then builds the tokenizer. A file of
    /// ChatGLM2 and 3 (they are alike) gives ChatGLM2's.
    ///
    /// # Errors
    /// [`TokenizerError::Era`] when they do not; [`TokenizerError::File`] for a damaged vocabulary.
    pub fn build(
        self,
        config: &ConfigIds,
        embedding_rows: Option<usize>,
    ) -> Result<(GlmTokenizer, Vec<EraWarning>), TokenizerError> {
        let facts = self.facts();
        let verdict = facts.check(config, embedding_rows)?;
        let tokenizer = match verdict.era {
            Some(_) => GlmTokenizer::chatglm(self.proto, verdict.num_image_tokens),
            None => GlmTokenizer::chatglm2(self.proto),
        };
        let tokenizer = tokenizer.map_err(|error| match error {
            TokenizerError::SentencePiece(source) => TokenizerError::File {
                path: self.path,
                source,
            },
            other => other,
        })?;
        Ok((tokenizer, verdict.warnings))
    }
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

/// Whether the file is lines of a base64 token and its rank.
fn is_tiktoken(bytes: &[u8]) -> bool {
    let first_line = bytes.split(|&byte| byte == b'\n').next();
    let Some((token, rank)) = first_line
        .and_then(|line| std::str::from_utf8(line).ok())
        .and_then(|line| line.trim_end().split_once(' '))
    else {
        return false;
    };
    let is_base64 = |c: char| c.is_ascii_alphanumeric() || "+/=".contains(c);
    !token.is_empty() && token.chars().all(is_base64) && rank.parse::<u32>().is_ok()
}

fn read_num_image_tokens(path: &Path) -> Result<Option<u32>, TokenizerError> {
    if !path.exists() {
        return Ok(None);
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
    let json: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| fail(format!("not valid JSON: {error}")))?;
    match json.get("num_image_tokens") {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| {
                fail(format!(
                    "num_image_tokens is {value}; it must be a whole number (0 or 20000)"
                ))
            }),
    }
}
