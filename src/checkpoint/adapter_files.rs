//! LoRA adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A configuration is read field by field, and whatever would change the numbers without this program
//! knowing how is refused by name. Written are the fields of PEFT 0.11, so that
//! `PeftModel.from_pretrained` loads the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::input_file::read_json;
use super::safetensors::write_safetensors;
use super::{CheckpointError, HostTensor, durable, open_tensor_file, read_all};

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// Fields that must be absent, null, false or empty, because anything else changes what the adapter
/// computes in a way that is not implemented here.
const UNSUPPORTED: [&str; 15] = [
    "use_dora",
    "use_rslora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "layers_to_transform",
    "enable_lora",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "exclude_modules",
];

/// What `adapter_config.json` says about a LoRA adapter.
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
        let fields = Fields {
            path: &config_path,
            map: read_json(&config_path)?,
        };
        let tensor_path = TENSOR_FILES
            .iter()
            .map(|name| folder.join(name))
            .find(|path| path.symlink_metadata().is_ok())
            .ok_or_else(|| CheckpointError::NoWeights {
                path: folder.to_owned(),
                looked_for: TENSOR_FILES.join(", "),
            })?;
        let tensors = read_all(open_tensor_file(&tensor_path)?.as_ref())?;
        let files = Self {
            config: fields.into_config(&tensors)?,
            tensors,
        };
        files.check(&tensor_path)?;
        Ok(files)
    }

    /// Writes an adapter folder, creating it if need be; the configuration comes last.
    ///
    /// # Errors
    /// Tensors and configuration do not fit together, or a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), CheckpointError> {
        self.check(folder)?;
        durable::create_folder(folder)?;
        write_safetensors(&folder.join(TENSOR_FILES[0]), &self.tensors)?;
        durable::write_json(&folder.join(CONFIG_FILE), &self.config.to_peft())
    }

    /// Each tensor must be half of an A and B pair of the rank in the configuration, on a module that
    /// the configuration targets: PEFT would leave out what does not fit without a word.
    fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        let wrong = |reason: String| Err(CheckpointError::mismatch(path, reason));
        if self.tensors.is_empty() {
            return wrong("it holds no tensors".to_owned());
        }
        let r = self.config.r;
        for (name, tensor) in &self.tensors {
            let Some((module, half)) = split_name(name) else {
                return wrong(format!(
                    "'{name}' is not the weight of a LoRA A or B of a linear layer"
                ));
            };
            if !self.config.targets(module) {
                return wrong(format!(
                    "'{name}' is on a module that target_modules {:?} leaves out",
                    self.config.target_modules
                ));
            }
            let (rank, other) = match (half, tensor.shape.as_slice()) {
                ('A', &[rank, _]) => (rank, 'B'),
                ('B', &[_, rank]) => (rank, 'A'),
                _ => return wrong(format!("'{name}' has shape {:?}", tensor.shape)),
            };
            if rank != r {
                return wrong(format!(
                    "'{name}' has rank {rank}, the configuration says {r}"
                ));
            }
            if !tensor.dtype.is_float() {
                return wrong(format!("'{name}' has element type {}", tensor.dtype));
            }
            let partner = tensor_name(module, other);
            if !self.tensors.contains_key(&partner) {
                return wrong(format!("'{name}' is there but not '{partner}'"));
            }
        }
        Ok(())
    }
}

/// `base_model.model.{module}.lora_{half}.weight`.
fn tensor_name(module: &str, half: char) -> String {
    format!("base_model.model.{module}.lora_{half}.weight")
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

impl LoraFileConfig {
    /// Whether a module is among the targets: the last parts of its name are one of them.
    fn targets(&self, module: &str) -> bool {
        self.target_modules.iter().any(|target| {
            let lead = module.strip_suffix(target.as_str());
            lead.is_some_and(|lead| lead.is_empty() || lead.ends_with('.'))
        })
    }

    /// The configuration as PEFT 0.11.1 writes it, keys and target modules sorted.
    fn to_peft(&self) -> Value {
        let targets: BTreeSet<&String> = self.target_modules.iter().collect();
        json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_alpha": shortest(self.lora_alpha),
            "lora_dropout": decimal(self.lora_dropout),
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": {},
            "revision": null,
            "target_modules": targets,
            "task_type": self.task_type,
            "use_dora": false,
            "use_rslora": false,
        })
    }
}

/// The `f64` whose decimal digits are those of the `f32`: 0.1 and not 0.10000000149.
fn decimal(value: f32) -> f64 {
    value
        .to_string()
        .parse()
        .unwrap_or_else(|_| f64::from(value))
}

/// A whole number without a decimal point, as PEFT writes `lora_alpha`.
fn shortest(value: f32) -> Value {
    if value.fract() == 0.0 && value.abs() < 1.0e9 {
        json!(value as i64)
    } else {
        json!(decimal(value))
    }
}

/// The fields of an `adapter_config.json` and where they stand.
struct Fields<'a> {
    path: &'a Path,
    map: Map<String, Value>,
}

impl Fields<'_> {
    fn into_config(
        self,
        tensors: &BTreeMap<String, HostTensor>,
    ) -> Result<LoraFileConfig, CheckpointError> {
        self.must_be(
            "peft_type",
            &[json!("LORA")],
            "Only LoRA adapters are read here",
        )?;
        self.must_be(
            "bias",
            &[json!("none"), Value::Null],
            "Trained biases are not supported; train with bias = \"none\"",
        )?;
        self.must_be(
            "init_lora_weights",
            &[json!(true), json!(false), json!("gaussian"), Value::Null],
            "Such an adapter belongs to a changed base model; convert it to a plain one with PEFT",
        )?;
        for field in UNSUPPORTED {
            let remedy =
                "This changes what the adapter computes and is not supported; train without it";
            self.must_be(
                field,
                &[Value::Null, json!(false), json!({}), json!([]), json!("")],
                remedy,
            )?;
        }
        Ok(LoraFileConfig {
            r: self.rank()?,
            lora_alpha: self.number("lora_alpha", None, "a finite number", f32::is_finite)?,
            lora_dropout: self.number(
                "lora_dropout",
                Some(0.0),
                "a number from 0 to below 1",
                |share| (0.0..1.0).contains(&share),
            )?,
            target_modules: self.target_modules(tensors)?,
            base_model_name_or_path: self.text("base_model_name_or_path")?,
            task_type: self.text("task_type")?,
        })
    }

    /// The value of a field; an absent one counts as null.
    fn get(&self, field: &str) -> &Value {
        self.map.get(field).unwrap_or(&Value::Null)
    }

    fn refuse(&self, field: &'static str, remedy: impl Into<String>) -> CheckpointError {
        let mut found = self.get(field).to_string();
        if found.chars().count() > 80 {
            found = found.chars().take(80).chain("...".chars()).collect();
        }
        CheckpointError::Setting {
            path: self.path.to_owned(),
            field,
            found,
            remedy: remedy.into(),
        }
    }

    fn must_be(
        &self,
        field: &'static str,
        allowed: &[Value],
        remedy: &str,
    ) -> Result<(), CheckpointError> {
        if allowed.contains(self.get(field)) {
            Ok(())
        } else {
            Err(self.refuse(field, remedy))
        }
    }

    fn rank(&self) -> Result<usize, CheckpointError> {
        self.get("r")
            .as_u64()
            .filter(|r| (1..=65_536).contains(r))
            .and_then(|r| usize::try_from(r).ok())
            .ok_or_else(|| self.refuse("r", "It must be a whole number from 1 to 65536"))
    }

    fn number(
        &self,
        field: &'static str,
        default: Option<f32>,
        wanted: &str,
        valid: impl Fn(f32) -> bool,
    ) -> Result<f32, CheckpointError> {
        let value = match self.get(field) {
            Value::Null => default,
            value => value.as_f64().map(|value| value as f32),
        };
        value
            .filter(|&value| valid(value))
            .ok_or_else(|| self.refuse(field, format!("It must be {wanted}")))
    }

    fn text(&self, field: &'static str) -> Result<Option<String>, CheckpointError> {
        match self.get(field) {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            _ => Err(self.refuse(field, "It must be a text or null")),
        }
    }

    /// A list of names, or a single text. PEFT takes a text for a pattern over whole module names, so
    /// then the modules that really carry tensors say what it meant.
    fn target_modules(
        &self,
        tensors: &BTreeMap<String, HostTensor>,
    ) -> Result<Vec<String>, CheckpointError> {
        let remedy = "It must be a list of module names, or a text";
        match self.get("target_modules") {
            Value::String(_) => {
                let last_part = |module: &str| module.rsplit('.').next().map(str::to_owned);
                let names = tensors.keys().filter_map(|name| split_name(name));
                let targets: BTreeSet<_> = names.filter_map(|(m, _)| last_part(m)).collect();
                Ok(targets.into_iter().collect())
            }
            Value::Array(names) if !names.is_empty() => names
                .iter()
                .map(|name| name.as_str().filter(|name| !name.is_empty()))
                .map(|name| name.map(str::to_owned))
                .collect::<Option<_>>()
                .ok_or_else(|| self.refuse("target_modules", remedy)),
            _ => Err(self.refuse("target_modules", remedy)),
        }
    }
}
