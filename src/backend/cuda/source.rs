//! The kernels' sources, part of the binary; or read from a folder, for work on the kernels.

use std::borrow::Cow;
use std::path::Path;

use super::error::CudaError;

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../kernels/", $name)))),*]
    };
}

/// Files that others include.
const HEADERS: [(&str, &str); 7] = embedded![
    "common.cuh",
    "half.cuh",
    "pieces.cuh",
    "mma.cuh",
    "random.cuh",
    "spans.cuh",
    "attention.cuh",
];

/// Files that are compiled, one module each.
const MODULES: [(&str, &str); 13] = embedded![
    "rows.cu",
    "elementwise.cu",
    "norm.cu",
    "linear.cu",
    "adapter.cu",
    "rotary.cu",
    "attention_forward.cu",
    "attention_backward.cu",
    "dropout.cu",
    "loss.cu",
    "optim.cu",
    "quant.cu",
    "synthetic.cu",
];

/// Name of a folder to read the sources from instead.
pub(super) const FOLDER_VARIABLE: &str = "MP_TRAIN_KERNEL_SOURCES";

/// One file.
pub(super) struct SourceFile {
    pub name: &'static str,
    pub text: Cow<'static, str>,
}

/// All sources.
pub(super) struct Sources {
    pub headers: Vec<SourceFile>,
    pub modules: Vec<SourceFile>,
}

impl Sources {
    /// The embedded ones, or those of the folder that was named.
    ///
    /// # Errors
    /// A file of that folder cannot be read.
    pub fn read() -> Result<Self, CudaError> {
        let folder = std::env::var_os(FOLDER_VARIABLE);
        let folder = folder.as_deref().map(Path::new);
        let all = |files: &[(&'static str, &'static str)]| {
            files
                .iter()
                .map(|&(name, text)| {
                    let text = match folder {
                        None => Cow::Borrowed(text),
                        Some(folder) => {
                            let path = folder.join(name);
                            std::fs::read_to_string(&path)
                                .map(Cow::Owned)
                                .map_err(|reason| CudaError::Source { path, reason })?
                        }
                    };
                    Ok(SourceFile { name, text })
                })
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Sources {
            headers: all(&HEADERS)?,
            modules: all(&MODULES)?,
        })
    }
}
