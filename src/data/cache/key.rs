//! What a cache file is made of, as text that is compared, and as a name.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

use super::digest::{Digest, Digester, digest};
use super::progress::{Meter, Phase};
use super::{RowKind, mapped};
use crate::config::model::ModelConfig;
use crate::data::DataError;
use crate::data::text_rows::{BadRows, RowReport, TextSettings};

/// Everything that decides which rows a cache file holds.
#[derive(Serialize)]
struct Manifest<'a> {
    version: u64,
    rows: Made<'a>,
    model: ModelFacts,
    files: Vec<FileFacts>,
}

/// Changes with every change to how rows are made that is not seen in the settings.
const VERSION: u64 = 2;

#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Made<'a> {
    Text {
        settings: &'a TextSettings,
        tokenizer: TokenizerFacts,
    },
    TokenIds {
        bad_rows: BadRows,
    },
}

#[derive(Serialize)]
struct TokenizerFacts {
    model: Digest,
    generation: String,
    num_image_tokens: u32,
}

/// What of the model decides which rows can be used, and where their tokens stand.
#[derive(Serialize)]
struct ModelFacts {
    vocab_size: usize,
    max_sequence_length: usize,
    context_ids: Option<[u32; 3]>,
}

/// The name counts too: its ending says how the file is read.
#[derive(Serialize)]
struct FileFacts {
    name: String,
    contents: Digest,
}

/// The key of a cache file.
pub(super) struct CacheKey {
    manifest: String,
    name: String,
    files: Vec<(PathBuf, Stamp)>,
}

/// What changes when a file is written to.
type Stamp = (u64, Option<SystemTime>);

fn stamp(metadata: &Metadata) -> Stamp {
    (metadata.len(), metadata.modified().ok())
}

impl CacheKey {
    /// The key of these files and settings; the files are read for it.
    ///
    /// # Errors
    /// A file that cannot be read; an interruption.
    pub fn of(
        files: &[PathBuf],
        kind: RowKind<'_>,
        model: &ModelConfig,
        meter: &mut Meter<'_>,
    ) -> Result<Self, DataError> {
        let size = |file: &PathBuf| std::fs::metadata(file).map_or(0, |metadata| metadata.len());
        meter.begin(Phase::Checking, files.iter().map(size).sum());
        let mut facts = Vec::with_capacity(files.len());
        let mut stamps = Vec::with_capacity(files.len());
        for file in files {
            let (contents, stamp) = digest_of(file, meter)?;
            let name = file.file_name().unwrap_or_default();
            facts.push(FileFacts {
                name: name.to_string_lossy().into_owned(),
                contents,
            });
            stamps.push((file.clone(), stamp));
        }
        meter.finish()?;
        let manifest = Manifest {
            version: VERSION,
            rows: match kind {
                RowKind::Text {
                    settings,
                    tokenizer,
                } => Made::Text {
                    settings,
                    tokenizer: TokenizerFacts {
                        model: digest(&tokenizer.vocabulary_bytes()),
                        generation: format!("{:?}", tokenizer.generation()),
                        num_image_tokens: tokenizer.num_image_tokens(),
                    },
                },
                RowKind::TokenIds { bad_rows } => Made::TokenIds { bad_rows },
            },
            model: ModelFacts {
                vocab_size: model.vocab_size,
                max_sequence_length: model.max_sequence_length,
                context_ids: model
                    .context_ids
                    .map(|ids| [ids.bos_token_id, ids.mask_token_id, ids.gmask_token_id]),
            },
            files: facts,
        };
        // Plain structs of text and numbers always have a JSON form.
        let manifest = serde_json::to_string(&manifest).unwrap_or_default();
        Ok(Self {
            name: digest(manifest.as_bytes()).name(),
            manifest,
            files: stamps,
        })
    }

    /// The text that a cache file of this key holds.
    pub fn manifest(&self) -> &str {
        &self.manifest
    }

    /// The text that a cache file of this key ends with.
    pub fn tail(&self, report: &RowReport) -> Vec<u8> {
        mapped::tail(&self.manifest, report)
    }

    /// The name that belongs to the manifest, without an ending.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cache file.
    pub fn path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.rows", self.name))
    }

    /// Checks that nobody wrote to the files since the key was made.
    ///
    /// # Errors
    /// [`DataError::Changed`] if someone did.
    pub fn check_unchanged(&self) -> Result<(), DataError> {
        for (path, before) in &self.files {
            let now = std::fs::metadata(path).ok();
            if now.as_ref().map(stamp).as_ref() != Some(before) {
                return Err(DataError::Changed { path: path.clone() });
            }
        }
        Ok(())
    }
}

/// The fingerprint of a file's contents.
fn digest_of(path: &Path, meter: &mut Meter<'_>) -> Result<(Digest, Stamp), DataError> {
    let io = |source| DataError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let stamp = stamp(&file.metadata().map_err(io)?);
    let mut digester = Digester::default();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok((digester.finish(), stamp)),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(io(error)),
        };
        digester.update(&buffer[..read]);
        meter.update(|progress| progress.bytes_done += read as u64)?;
    }
}
