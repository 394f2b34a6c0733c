//! Between tensors in files and trainable parameters: names, shapes and values are checked here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{AdapterError, ParameterSpec};
use crate::checkpoint::HostTensor;
use crate::checkpoint::adapter_files::{CONFIG_FILE, LoraFiles};
use crate::checkpoint::prefix_files::PrefixFiles;
use crate::config::run::{AdapterSection, LoraSection, PrefixSection};

/// Values of whole tensors, by name.
pub type WholeTensors = BTreeMap<String, Vec<f32>>;

/// Takes the tensors that `specs` ask for, each once, however many parts it is cut into.
///
/// # Errors
/// A tensor is missing, left over, of another shape, or holds a value that is not finite.
pub fn take(
    file: &Path,
    specs: &[ParameterSpec],
    tensors: &BTreeMap<String, HostTensor>,
) -> Result<WholeTensors, AdapterError> {
    let mut taken = WholeTensors::new();
    for spec in specs {
        if taken.contains_key(&spec.name) {
            continue;
        }
        let Some(tensor) = tensors.get(&spec.name) else {
            return Err(AdapterError::MissingTensor {
                file: file.to_owned(),
                name: spec.name.clone(),
                found: shortened(tensors.keys()),
            });
        };
        if tensor.shape != spec.shape {
            return Err(AdapterError::WrongShape {
                file: file.to_owned(),
                name: spec.name.clone(),
                found: tensor.shape.clone(),
                expected: spec.shape.clone(),
            });
        }
        let values = tensor.to_f32()?;
        if !values.iter().all(|value| value.is_finite()) {
            return Err(AdapterError::NotFinite {
                file: file.to_owned(),
                name: spec.name.clone(),
            });
        }
        taken.insert(spec.name.clone(), values);
    }
    match tensors.keys().find(|name| !taken.contains_key(*name)) {
        Some(name) => Err(AdapterError::ExtraTensor {
            file: file.to_owned(),
            name: name.clone(),
        }),
        None => Ok(taken),
    }
}

/// Puts the parts that `specs` describe together to whole tensors; `parts` in the same order.
///
/// # Errors
/// A part does not have as many values as its tensor.
pub fn put_together<'a>(
    specs: &[ParameterSpec],
    parts: impl IntoIterator<Item = &'a [f32]>,
) -> Result<BTreeMap<String, HostTensor>, AdapterError> {
    let mut whole: BTreeMap<&str, (&ParameterSpec, Vec<f32>)> = BTreeMap::new();
    for (spec, part) in specs.iter().zip(parts) {
        let len = spec.shape.iter().product();
        let (_, values) = whole
            .entry(&spec.name)
            .or_insert_with(|| (spec, vec![0.0; len]));
        spec.paste(values, part);
    }
    let tensor = |(name, (spec, values)): (&str, (&ParameterSpec, Vec<f32>))| {
        let tensor = HostTensor::from_f32(spec.shape.clone(), &values)?;
        Ok((name.to_owned(), tensor))
    };
    whole.into_iter().map(tensor).collect()
}

fn shortened<'a>(names: impl ExactSizeIterator<Item = &'a String>) -> String {
    const SHOWN: usize = 3;
    let count = names.len();
    let shown: Vec<&str> = names.take(SHOWN).map(String::as_str).collect();
    match count > SHOWN {
        true => format!("{} and {} more", shown.join(", "), count - SHOWN),
        false => shown.join(", "),
    }
}

/// What kind of adapter a folder holds and how it is set, by the file that says so; nothing is dropped.
///
/// # Errors
/// The folder cannot be read.
pub fn section_of(folder: &Path) -> Result<AdapterSection, AdapterError> {
    if folder.join(CONFIG_FILE).symlink_metadata().is_ok() {
        let config = LoraFiles::read(folder)?.config;
        return Ok(AdapterSection::Lora(LoraSection {
            r: config.r,
            lora_alpha: config.lora_alpha,
            lora_dropout: 0.0,
            target_modules: config.target_modules,
            init_adapter: None,
        }));
    }
    let prefix = PrefixFiles::read(folder)?;
    Ok(AdapterSection::Prefix(PrefixSection {
        pre_seq_len: prefix.pre_seq_len,
        prefix_projection: prefix.prefix_projection,
        prefix_dropout: 0.0,
        init_adapter: None,
    }))
}

/// Reads the adapter in a folder whose settings must be those of `section`.
///
/// # Errors
/// The folder cannot be read, or does not fit the settings or the model.
pub fn read(
    folder: &Path,
    section: &AdapterSection,
    specs: &[ParameterSpec],
) -> Result<WholeTensors, AdapterError> {
    match section {
        AdapterSection::Lora(lora) => read_lora(folder, lora, specs),
        AdapterSection::Prefix(prefix) => read_prefix(folder, prefix, specs),
        AdapterSection::Full(_) => Ok(WholeTensors::new()),
    }
}

/// Reads a PEFT folder whose settings must be those of the run.
///
/// # Errors
/// The folder cannot be read, or does not fit the settings or the model.
pub fn read_lora(
    folder: &Path,
    lora: &LoraSection,
    specs: &[ParameterSpec],
) -> Result<WholeTensors, AdapterError> {
    let read = LoraFiles::read(folder)?;
    let sorted = |modules: &[String]| {
        let mut modules = modules.to_vec();
        modules.sort();
        modules.join(", ")
    };
    let config = &read.config;
    let facts = [
        ("r", config.r.to_string(), lora.r.to_string()),
        (
            "lora_alpha",
            config.lora_alpha.to_string(),
            lora.lora_alpha.to_string(),
        ),
    ];
    agree(folder, facts)?;
    // Names can be said in many ways; what counts is which modules they are.
    let expected: BTreeSet<&String> = specs.iter().map(|spec| &spec.name).collect();
    if !read.tensors.keys().eq(expected) {
        let (there, here) = (&config.target_modules, &lora.target_modules);
        agree(folder, [("target_modules", sorted(there), sorted(here))])?;
    }
    take(folder, specs, &read.tensors)
}

/// Reads a prefix folder whose settings must be those of the run.
///
/// # Errors
/// The folder cannot be read, or does not fit the settings or the model.
pub fn read_prefix(
    folder: &Path,
    prefix: &PrefixSection,
    specs: &[ParameterSpec],
) -> Result<WholeTensors, AdapterError> {
    let read = PrefixFiles::read(folder)?;
    let facts = [
        (
            "pre_seq_len",
            read.pre_seq_len.to_string(),
            prefix.pre_seq_len.to_string(),
        ),
        (
            "prefix_projection",
            read.prefix_projection.to_string(),
            prefix.prefix_projection.to_string(),
        ),
    ];
    agree(folder, facts)?;
    take(folder, specs, &read.tensors)
}

fn agree<const N: usize>(
    folder: &Path,
    facts: [(&'static str, String, String); N],
) -> Result<(), AdapterError> {
    for (field, found, expected) in facts {
        if found != expected {
            return Err(AdapterError::Disagreement {
                file: folder.to_owned(),
                field,
                found,
                expected,
            });
        }
    }
    Ok(())
}
