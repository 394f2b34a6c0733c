//! LoRA adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`, or `.bin`.
//!
//! Whatever ranks and scales the modules of a folder have, in memory they have one rank and one scale:
//! a smaller rank is filled up with zeros, which training leaves zero, and a smaller scale goes into B.
//! Written are the fields of PEFT 0.11, so that `PeftModel.from_pretrained` loads the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::adapter_config::{self, AdapterConfig, ModuleScale, Targets};
use super::safetensors::write_safetensors;
use super::{CheckpointError, HostTensor, durable, open_tensor_file, read_all};

/// The configuration of an adapter in PEFT's form.
pub const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// Most modules of an adapter: many times what the largest model has.
const MAX_MODULES: usize = 16_384;

/// What a LoRA adapter is, the same for all its modules.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFileConfig {
    /// Rank: rows of A, columns of B.
    pub r: usize,
    /// The product B A counts with the factor `lora_alpha / r`.
    pub lora_alpha: f32,
    /// Share of the input of A dropped in training.
    pub lora_dropout: f32,
    /// Which linear layers carry an adapter, as the last parts of their module names.
    pub target_modules: Vec<String>,
    /// The model the adapter was trained on: a folder or a hub name.
    pub base_model_name_or_path: Option<String>,
    /// What PEFT calls the task, `CAUSAL_LM` for language models.
    pub task_type: Option<String>,
}

/// A LoRA adapter folder in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFiles {
    /// Its configuration.
    pub config: LoraFileConfig,
    /// `base_model.model.{module}.lora_A.weight` `[r, in]` and `...lora_B.weight` `[out, r]`.
    pub tensors: BTreeMap<String, HostTensor>,
}

impl LoraFiles {
    /// Reads an adapter folder.
    ///
    /// # Errors
    /// A file is missing or damaged, the adapter is no plain LoRA, or tensors and configuration do not
    /// fit together.
    pub fn read(folder: &Path) -> Result<Self, CheckpointError> {
        if !folder.is_dir() {
            return Err(CheckpointError::NotAFolder {
                path: folder.to_owned(),
                wanted: "a LoRA adapter folder as PEFT writes it",
            });
        }
        let config_path = folder.join(CONFIG_FILE);
        let said = AdapterConfig::read(&config_path)?;
        let tensor_path = TENSOR_FILES
            .iter()
            .map(|name| folder.join(name))
            .find(|path| path.symlink_metadata().is_ok())
            .ok_or_else(|| CheckpointError::NoWeights {
                path: folder.to_owned(),
                looked_for: TENSOR_FILES.join(", "),
            })?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in read_all(open_tensor_file(&tensor_path)?.as_ref())? {
            let plain = without_adapter_name(&name);
            if tensors.insert(plain, tensor).is_some() {
                let reason = format!("'{name}' is there with and without '.default'");
                return Err(CheckpointError::mismatch(&tensor_path, reason));
            }
        }
        check_pairs(&tensor_path, &tensors)?;
        let modules = modules(&tensors);
        if modules.len() > MAX_MODULES {
            let reason = format!("it has adapters for {} modules", modules.len());
            return Err(CheckpointError::mismatch(&tensor_path, reason));
        }
        let mut scales = BTreeMap::new();
        for module in modules {
            if !said.wants(&module) {
                let reason = format!(
                    "it has tensors for '{module}', which the configuration (target_modules, \
                     layers_to_transform) leaves out"
                );
                return Err(CheckpointError::mismatch(&tensor_path, reason));
            }
            let scale = said.scale_of(&config_path, &module)?;
            scales.insert(module, scale);
        }
        check_ranks(&tensor_path, &tensors, |module| {
            scales.get(module).map_or(0, |scale| scale.r)
        })?;
        let (r, lora_alpha) = make_uniform(&tensor_path, &mut tensors, &scales)?;
        let target_modules = match said.targets {
            Targets::Names(names) if !said.narrowed => names,
            Targets::Names(_) | Targets::Pattern(_) => scales.into_keys().collect(),
        };
        Ok(Self {
            config: LoraFileConfig {
                r,
                lora_alpha,
                lora_dropout: said.lora_dropout,
                target_modules,
                base_model_name_or_path: said.base_model_name_or_path,
                task_type: said.task_type,
            },
            tensors,
        })
    }

    /// Writes an adapter folder, creating it if need be; the configuration comes last.
    ///
    /// # Errors
    /// Tensors and configuration do not fit together, or a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), CheckpointError> {
        check_pairs(folder, &self.tensors)?;
        check_ranks(folder, &self.tensors, |_| self.config.r)?;
        for module in modules(&self.tensors) {
            if !is_target(&self.config.target_modules, &module) {
                let targets = &self.config.target_modules;
                let reason =
                    format!("'{module}' is a module that target_modules {targets:?} leaves out");
                return Err(CheckpointError::mismatch(folder, reason));
            }
        }
        durable::create_folder(folder)?;
        write_safetensors(&folder.join(TENSOR_FILES[0]), &self.tensors)?;
        adapter_config::write(&folder.join(CONFIG_FILE), &self.config)
    }

    /// The modules that carry an adapter, with A and B.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &HostTensor, &HostTensor)> {
        self.tensors.iter().filter_map(|(name, a)| {
            let (module, half) = split_name(name)?;
            let b = self.tensors.get(&tensor_name(module, 'B'))?;
            (half == 'A').then_some((module, a, b))
        })
    }
}

/// Whether `target_modules` names a module: by its whole name or by the last parts of it, as in PEFT.
pub fn is_target(target_modules: &[String], module: &str) -> bool {
    target_modules.iter().any(|target| {
        let lead = module.strip_suffix(target.as_str());
        lead.is_some_and(|lead| lead.is_empty() || lead.ends_with('.'))
    })
}

/// Each tensor must be half of an A and B pair: PEFT would leave out what does not fit without a word.
fn check_pairs(path: &Path, tensors: &BTreeMap<String, HostTensor>) -> Result<(), CheckpointError> {
    let wrong = |reason: String| Err(CheckpointError::mismatch(path, reason));
    if tensors.is_empty() {
        return wrong("it holds no tensors".to_owned());
    }
    for (name, tensor) in tensors {
        let Some((module, half)) = split_name(name) else {
            return wrong(format!(
                "'{name}' is not the weight of a LoRA A or B of a linear layer"
            ));
        };
        if tensor.shape.len() != 2 || tensor.shape.contains(&0) {
            return wrong(format!("'{name}' has shape {:?}", tensor.shape));
        }
        if !tensor.dtype.is_float() {
            return wrong(format!("'{name}' has element type {}", tensor.dtype));
        }
        let partner = tensor_name(module, if half == 'A' { 'B' } else { 'A' });
        if !tensors.contains_key(&partner) {
            return wrong(format!("'{name}' is there but not '{partner}'"));
        }
    }
    Ok(())
}

/// A and B of each module must have the rank that the configuration gives it.
fn check_ranks(
    path: &Path,
    tensors: &BTreeMap<String, HostTensor>,
    rank_of: impl Fn(&str) -> usize,
) -> Result<(), CheckpointError> {
    for (name, tensor) in tensors {
        let Some((module, half)) = split_name(name) else {
            continue;
        };
        let (found, said) = (tensor.shape[rank_axis(half)], rank_of(module));
        if found != said {
            let reason = format!("'{name}' has rank {found}, the configuration says {said}");
            return Err(CheckpointError::mismatch(path, reason));
        }
    }
    Ok(())
}

/// The most times that an adapter may grow when all modules get the largest rank.
const MAX_GROWTH: usize = 64;

/// Gives all modules the largest rank and the largest scale; returns rank and alpha.
fn make_uniform(
    path: &Path,
    tensors: &mut BTreeMap<String, HostTensor>,
    scales: &BTreeMap<String, ModuleScale>,
) -> Result<(usize, f32), CheckpointError> {
    let r = scales.values().map(|scale| scale.r).max().unwrap_or(1);
    let by_size = |a: &f64, b: &f64| a.abs().total_cmp(&b.abs());
    let scale = scales.values().map(|scale| scale.scale).max_by(by_size);
    let scale = scale.unwrap_or(1.0);
    let (mut elements, mut grown) = (0_usize, 0_usize);
    for (name, tensor) in tensors.iter() {
        let half = split_name(name).map_or('A', |(_, half)| half);
        let other = tensor.shape[1 - rank_axis(half)];
        elements = elements.saturating_add(other.saturating_mul(tensor.shape[rank_axis(half)]));
        grown = grown.saturating_add(other.saturating_mul(r));
    }
    if grown > elements.saturating_mul(MAX_GROWTH) {
        let reason = format!(
            "with the largest rank, {r}, in all modules it would be more than {MAX_GROWTH} times as \
             large"
        );
        return Err(CheckpointError::mismatch(path, reason));
    }
    for (name, tensor) in tensors {
        let Some((module, half)) = split_name(name) else {
            continue;
        };
        let Some(own) = scales.get(module) else {
            continue;
        };
        let factor = match half == 'B' && own.scale != scale {
            true => own.scale / scale,
            false => 1.0,
        };
        if own.r == r && factor == 1.0 {
            continue;
        }
        let values = tensor
            .to_f32()
            .map_err(|cause| cause.in_tensor(path, name))?;
        let values: Vec<f32> = values
            .into_iter()
            .map(|value| (f64::from(value) * factor) as f32)
            .collect();
        let (shape, values) = match half {
            'A' => (
                vec![r, tensor.shape[1]],
                widened(&values, values.len(), r * tensor.shape[1]),
            ),
            _ => (vec![tensor.shape[0], r], widened(&values, own.r, r)),
        };
        *tensor = HostTensor::from_f32(shape, &values)?;
    }
    Ok((r, (scale * r as f64) as f32))
}

/// Rows of `from` values, each filled up with zeros to `to`.
fn widened(values: &[f32], from: usize, to: usize) -> Vec<f32> {
    let zeros = || std::iter::repeat_n(0.0, to - from);
    let rows = values.chunks_exact(from);
    rows.flat_map(|row| row.iter().copied().chain(zeros()))
        .collect()
}

/// The axis of A or B that is as long as the rank.
fn rank_axis(half: char) -> usize {
    usize::from(half == 'B')
}

/// `base_model.model.{module}.lora_{half}.weight`.
fn tensor_name(module: &str, half: char) -> String {
    format!("base_model.model.{module}.lora_{half}.weight")
}

/// The name without that of the adapter, which a saved `state_dict()` has and PEFT's own files do not.
fn without_adapter_name(name: &str) -> String {
    match name.strip_suffix(".default.weight") {
        Some(lead) if lead.ends_with(".lora_A") || lead.ends_with(".lora_B") => {
            format!("{lead}.weight")
        }
        _ => name.to_owned(),
    }
}

/// The modules that have tensors.
fn modules(tensors: &BTreeMap<String, HostTensor>) -> BTreeSet<String> {
    let module = |name: &String| Some(split_name(name)?.0.to_owned());
    tensors.keys().filter_map(module).collect()
}

/// The module and the half, `A` or `B`, of a tensor name.
fn split_name(name: &str) -> Option<(&str, char)> {
    let rest = name.strip_prefix("base_model.model.")?;
    let (rest, half) = match rest.strip_suffix(".lora_A.weight") {
        Some(module) => (module, 'A'),
        None => (rest.strip_suffix(".lora_B.weight")?, 'B'),
    };
    (!rest.is_empty()).then_some((rest, half))
}
