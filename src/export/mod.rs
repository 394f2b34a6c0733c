//! `mp-train export`: what a training left behind, in the form that other programs load.
//!
//! A model with a LoRA adapter becomes one Hugging Face folder (`merged`), an adapter a PEFT folder
//! (`peft`), a prefix a checkpoint as THUDM's ptuning writes it (`thudm`). A folder appears under its
//! name only when it is complete, and a model goes through memory tensor by tensor.

mod error;
mod folder;
mod merged;
mod rows;
mod settings;
mod shards;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value};

pub use error::ExportError;
use folder::NewFolder;

use crate::adapter::files;
use crate::checkpoint::run_state::read_json;
use crate::checkpoint::{Dtype, LoraFiles, PrefixFiles};
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, Quantization};
use crate::data::template::TEMPLATE_FILE;
use crate::model::trainables::Trainables;

/// The configuration of a model.
const CONFIG_FILE: &str = "config.json";

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A whole model, a LoRA adapter added into its weights.
    Merged,
    /// The LoRA adapter alone, as PEFT writes it.
    Peft,
    /// The prefix alone, as THUDM's ptuning writes it.
    Thudm,
}

/// Storage of the weights of a whole model, by PyTorch's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum TorchDtype {
    /// IEEE binary32.
    Float32,
    /// IEEE binary16.
    Float16,
    /// bfloat16.
    Bfloat16,
}

impl TorchDtype {
    /// The element type in files.
    pub fn dtype(self) -> Dtype {
        match self {
            TorchDtype::Float32 => Dtype::F32,
            TorchDtype::Float16 => Dtype::F16,
            TorchDtype::Bfloat16 => Dtype::Bf16,
        }
    }
}

/// How to export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportOptions {
    /// The model folder.
    pub model: PathBuf,
    /// The adapter folder.
    pub adapter: Option<PathBuf>,
    /// The folder to make.
    pub output: PathBuf,
    /// What is written; by the adapter when absent.
    pub format: Option<Format>,
    /// Storage of a whole model's weights; that of its folder when absent.
    pub dtype: Option<TorchDtype>,
    /// Storage of a whole model's linear layers.
    pub quantization: Quantization,
    /// Most bytes of tensors in one file of a whole model.
    pub max_shard_size: u64,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Files of tensors.
    pub files: usize,
    /// Tensors in them.
    pub tensors: usize,
    /// Bytes of the tensors.
    pub bytes: u64,
    /// Linear layers that an adapter was added into.
    pub merged: usize,
    /// Whether the weights were codes before, so that merged ones were rounded twice.
    pub requantised: bool,
}

/// Writes the folder that `options` asks for. A set `stop` ends it between two tensors.
///
/// # Errors
/// Model, adapter or settings that do not fit together; a file that cannot be read or written; a
/// signal. Then there is no new folder.
pub fn run(options: &ExportOptions, stop: &AtomicBool) -> Result<Exported, ExportError> {
    let section = match &options.adapter {
        Some(folder) => Some(files::section_of(folder)?),
        None => None,
    };
    let format = format(options, section.as_ref())?;
    check_settings(options, format)?;
    let config = ModelConfig::from_json_file(&options.model.join(CONFIG_FILE))?;
    let json: Map<String, Value> = read_json(&options.model.join(CONFIG_FILE))?;
    // What does not fit the model is refused before anything is written.
    let trainables = match &section {
        Some(section) => Trainables::new(&config, section, false)?,
        None => Trainables::none(false),
    };
    let folder = NewFolder::create(&options.output)?;
    let exported = match (format, &options.adapter) {
        (Format::Merged, adapter) => {
            let adapter = adapter.as_deref().zip(section.as_ref());
            merged::write(options, &config, json, adapter, &folder, stop)?
        }
        (Format::Peft, Some(adapter)) => {
            let read = LoraFiles::read(adapter)?;
            files::take(adapter, trainables.specs(), &read.tensors)?;
            read.write(folder.temporary())?;
            of_adapter(read.tensors.values().map(|tensor| tensor.bytes.len()))
        }
        (Format::Thudm, Some(adapter)) => {
            let read = PrefixFiles::read(adapter)?;
            files::take(adapter, trainables.specs(), &read.tensors)?;
            read.write(folder.temporary(), json)?;
            of_adapter(read.tensors.values().map(|tensor| tensor.bytes.len()))
        }
        (Format::Peft | Format::Thudm, None) => return Err(ExportError::NoAdapter),
    };
    let source = options.adapter.as_ref().unwrap_or(&options.model);
    folder.copy_if_there(source, TEMPLATE_FILE)?;
    folder.finish()?;
    Ok(exported)
}

/// Counts of a folder with an adapter in it.
fn of_adapter(sizes: impl Iterator<Item = usize>) -> Exported {
    sizes.fold(
        Exported {
            files: 1,
            ..Exported::default()
        },
        |sum, bytes| Exported {
            tensors: sum.tensors + 1,
            bytes: sum.bytes + bytes as u64,
            ..sum
        },
    )
}

/// The format asked for, or the one that suits the adapter.
fn format(
    options: &ExportOptions,
    section: Option<&AdapterSection>,
) -> Result<Format, ExportError> {
    let suits = match section {
        Some(AdapterSection::Prefix(_)) => Format::Thudm,
        _ => Format::Merged,
    };
    match (options.format.unwrap_or(suits), section) {
        (Format::Merged, Some(AdapterSection::Prefix(_))) => Err(ExportError::PrefixMerged),
        (Format::Peft, Some(AdapterSection::Prefix(_))) => Err(ExportError::PrefixAsPeft),
        (Format::Thudm, Some(AdapterSection::Lora(_))) => Err(ExportError::LoraAsThudm),
        (Format::Peft | Format::Thudm, None) => Err(ExportError::NoAdapter),
        (format, _) => Ok(format),
    }
}

/// Refuses settings of a whole model where none is written, and codes beside anything but halves.
fn check_settings(options: &ExportOptions, format: Format) -> Result<(), ExportError> {
    let quantised = options.quantization != Quantization::None;
    if format != Format::Merged && (quantised || options.dtype.is_some()) {
        return Err(ExportError::NoWeightsToStore);
    }
    match options.dtype {
        Some(TorchDtype::Float32 | TorchDtype::Bfloat16) if quantised => {
            Err(ExportError::CodesBesideOthers)
        }
        _ => Ok(()),
    }
}
