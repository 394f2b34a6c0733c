//! Compiled kernels on disk: a second start need not compile.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::compile::{OPTIONS, Target};
use super::error::CudaError;
use super::library;
use super::source::{SourceFile, Sources};

/// Names the folder of the cache.
const FOLDER_VARIABLE: &str = "MP_TRAIN_KERNEL_CACHE";

/// Folder of compiled kernels.
pub(super) struct KernelCache {
    folder: Option<PathBuf>,
    /// Whether the folder was named by the user, so that it has to work.
    named: bool,
}

impl KernelCache {
    /// The folder that was named, else `mp-train/kernels` in the user's cache folder.
    pub fn open() -> Self {
        if let Some(folder) = std::env::var_os(FOLDER_VARIABLE) {
            return KernelCache {
                folder: Some(folder.into()),
                named: true,
            };
        }
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
        KernelCache {
            folder: base.or_else(home).map(|base| base.join("mp-train/kernels")),
            named: false,
        }
    }

    /// The code of a file, from the cache or else from `make`, which is then kept.
    ///
    /// # Errors
    /// `make` fails, or a folder that was named cannot be used.
    pub fn get(
        &self,
        file: &SourceFile,
        sources: &Sources,
        target: Target,
        make: impl FnOnce() -> Result<Vec<u8>, CudaError>,
    ) -> Result<Vec<u8>, CudaError> {
        let Some(folder) = &self.folder else {
            return make();
        };
        let stem = file.name.trim_end_matches(".cu");
        let name = format!(
            "{stem}-{}-{:016x}",
            target.name(),
            key(file, sources, target)
        );
        let path = folder.join(name);
        if let Some(code) = std::fs::read(&path).ok().and_then(unseal) {
            return Ok(code);
        }
        let code = make()?;
        match keep(folder, &path, &code) {
            Err(reason) if self.named => Err(CudaError::Cache {
                path: folder.clone(),
                reason,
            }),
            // Nobody asked for this folder; without it every start compiles.
            _ => Ok(code),
        }
    }
}

/// 64 bits of everything that decides the code (FNV-1a).
fn key(file: &SourceFile, sources: &Sources, target: Target) -> u64 {
    let (major, minor) = library::nvrtc_version();
    let mut key = 0xcbf2_9ce4_8422_2325u64;
    let mut mix = |bytes: &[u8]| {
        for &byte in bytes.iter().chain(&[0xff]) {
            key = (key ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    mix(&major.to_le_bytes());
    mix(&minor.to_le_bytes());
    mix(target.name().as_bytes());
    for option in OPTIONS {
        mix(option.as_bytes());
    }
    for header in &sources.headers {
        mix(header.text.as_bytes());
    }
    mix(file.text.as_bytes());
    key
}

/// The code behind its checksum, or nothing when the file is damaged.
fn unseal(bytes: Vec<u8>) -> Option<Vec<u8>> {
    let (sum, code) = bytes.split_first_chunk::<4>()?;
    (crc32fast::hash(code) == u32::from_le_bytes(*sum)).then(|| code.to_vec())
}

/// Writes beside the place and renames, so that another process never reads half a file.
fn keep(folder: &Path, path: &Path, code: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let thread = format!("{:?}", std::thread::current().id());
    let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
    let beside = path.with_extension(format!("{}-{thread}.new", std::process::id()));
    let written = std::fs::File::create(&beside).and_then(|mut out| {
        out.write_all(&crc32fast::hash(code).to_le_bytes())?;
        out.write_all(code)?;
        std::fs::rename(&beside, path)
    });
    if written.is_err() {
        // What was written of it is of no use; that it could not be written is what counts.
        let _ = std::fs::remove_file(&beside);
    }
    written
}
