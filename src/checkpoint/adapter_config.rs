//! `adapter_config.json` of a LoRA adapter, as PEFT and its users write it.
//!
//! It is read field by field: what this program can honour is taken, what would change the numbers
//! without this program knowing how is refused by name, and so is a field that nobody here has heard of
//! and that says something.

use std::collections::BTreeSet;
use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value, json};

use super::adapter_files::{LoraFileConfig, is_target};
use super::input_file::read_json;
use super::{CheckpointError, durable};

/// Fields that must be absent, null, false or empty, because anything else changes what the adapter
/// computes in a way that is not implemented here.
const UNSUPPORTED: [&str; 16] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "enable_lora",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "ensure_weight_tying",
];

/// Fields that are read, and fields that say how the adapter was made and not what it computes.
const KNOWN: [&str; 26] = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "bias",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "base_model_name_or_path",
    // PEFT sets it to false on a linear layer, whatever the file says.
    "fan_in_fan_out",
    "auto_mapping",
    "revision",
    "inference_mode",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "runtime_config",
    "qalora_group_size",
    "peft_version",
    "merge_weights",
];

/// Ways to start that leave the base model as it is. PiSSA, LoftQ and the like change it.
const INITIALS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Longest pattern over module names, and the largest machine made of one, in bytes.
const MAX_PATTERN: usize = 10_000;
const MAX_PATTERN_SIZE: usize = 1 << 20;

/// Most names in a list, and most patterns with a rank or an alpha of their own: many times what the
/// largest model has modules.
const MAX_NAMES: usize = 16_384;
const MAX_OVERRIDES: usize = 1_024;

/// Largest rank.
const MAX_RANK: u64 = 65_536;

/// Which modules carry an adapter.
pub(super) enum Targets {
    /// Those whose name, or the last parts of it, is one of these.
    Names(Vec<String>),
    /// Those whose whole name the pattern matches; where it is one that only Python understands, those
    /// that have tensors.
    Pattern(Option<Regex>),
}

/// Settings of single modules, by a pattern over their names, in the order of the file.
struct Overrides<T>(Vec<(Key, T)>);

/// A key of `rank_pattern` or `alpha_pattern`.
struct Key {
    text: String,
    /// As PEFT up to 0.13 matches it.
    older: Regex,
    /// As later versions match it.
    newer: Regex,
}

/// What `adapter_config.json` says, for each module if need be.
pub(super) struct AdapterConfig {
    /// Which modules carry an adapter.
    pub targets: Targets,
    /// Whether modules are left out, so that the names in `targets` say more than there is.
    pub narrowed: bool,
    /// Share of the input of A dropped in training.
    pub lora_dropout: f32,
    /// The model the adapter was trained on.
    pub base_model_name_or_path: Option<String>,
    /// What PEFT calls the task.
    pub task_type: Option<String>,
    r: usize,
    lora_alpha: f32,
    use_rslora: bool,
    ranks: Overrides<usize>,
    alphas: Overrides<f32>,
    layers: Option<BTreeSet<u64>>,
    layer_lists: Vec<String>,
}

/// Rank and scale of one module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ModuleScale {
    /// Rank.
    pub r: usize,
    /// The product B A counts with this factor.
    pub scale: f64,
}

impl AdapterConfig {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let map = read_json(path)?;
        Fields { path, map }.into_config()
    }

    /// Whether PEFT would put an adapter on this module.
    pub fn wants(&self, module: &str) -> bool {
        let targeted = match &self.targets {
            Targets::Names(names) => is_target(names, module),
            Targets::Pattern(Some(pattern)) => pattern.is_match(module),
            Targets::Pattern(None) => true,
        };
        targeted
            && self.layers.as_ref().is_none_or(|layers| {
                self.layer_of(module)
                    .is_some_and(|layer| layers.contains(&layer))
            })
    }

    /// The number of the block a module belongs to: the last number in its name, or the one behind a
    /// name of `layers_pattern`.
    fn layer_of(&self, module: &str) -> Option<u64> {
        let parts: Vec<&str> = module.split('.').collect();
        let places = (1..parts.len().saturating_sub(1)).rev();
        let number = |place: usize| parts[place].parse().ok();
        let fits =
            |list: &str| self.layer_lists.is_empty() || self.layer_lists.iter().any(|l| l == list);
        places
            .filter(|&place| fits(parts[place - 1]))
            .find_map(number)
    }

    /// Rank and scale of a module.
    ///
    /// # Errors
    /// Versions of PEFT do not agree about it.
    pub fn scale_of(&self, path: &Path, module: &str) -> Result<ModuleScale, CheckpointError> {
        let newer = (self.ranks.newer(module), self.alphas.newer(module));
        // Older versions take the first key of both that matches, and look it up in both.
        let keys = self.ranks.keys().chain(self.alphas.keys());
        let mut keys = keys.filter(|key| key.older.is_match(module));
        let first = keys.next();
        let older = first.map_or((None, None), |key| {
            (self.ranks.get(&key.text), self.alphas.get(&key.text))
        });
        let with_defaults = |(r, alpha): (Option<usize>, Option<f32>)| {
            (r.unwrap_or(self.r), alpha.unwrap_or(self.lora_alpha))
        };
        let (r, alpha) = with_defaults(newer);
        if with_defaults(older) != (r, alpha) {
            return Err(CheckpointError::Setting {
                path: path.to_owned(),
                field: "rank_pattern",
                found: "ambiguous together with alpha_pattern".to_owned(),
                remedy: format!(
                    "Older and newer versions of PEFT read them differently for '{module}': give \
                     both the same keys, so that one key matches a module"
                ),
            });
        }
        let width = match self.use_rslora {
            true => (r as f64).sqrt(),
            false => r as f64,
        };
        Ok(ModuleScale {
            r,
            scale: f64::from(alpha) / width,
        })
    }
}

impl<T: Copy> Overrides<T> {
    fn keys(&self) -> impl Iterator<Item = &Key> {
        self.0.iter().map(|(key, _)| key)
    }

    fn newer(&self, module: &str) -> Option<T> {
        let found = self.0.iter().find(|(key, _)| key.newer.is_match(module));
        found.map(|(_, value)| *value)
    }

    fn get(&self, text: &str) -> Option<T> {
        let found = self.0.iter().find(|(key, _)| key.text == text);
        found.map(|(_, value)| *value)
    }
}

/// Writes the configuration as PEFT 0.11.1 does, keys and target modules sorted.
pub(super) fn write(path: &Path, config: &LoraFileConfig) -> Result<(), CheckpointError> {
    let targets: BTreeSet<&String> = config.target_modules.iter().collect();
    let fields = json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": shortest(config.lora_alpha),
        "lora_dropout": decimal(config.lora_dropout),
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "task_type": config.task_type,
        "use_dora": false,
        "use_rslora": false,
    });
    durable::write_json(path, &fields)
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

/// A pattern of the size that module names need; `None` where it is none that is understood here.
fn pattern(text: &str) -> Option<Regex> {
    if text.len() > MAX_PATTERN {
        return None;
    }
    let mut builder = regex::RegexBuilder::new(text);
    builder.size_limit(MAX_PATTERN_SIZE).build().ok()
}

/// The fields of an `adapter_config.json` and where they stand.
struct Fields<'a> {
    path: &'a Path,
    map: Map<String, Value>,
}

impl Fields<'_> {
    fn into_config(self) -> Result<AdapterConfig, CheckpointError> {
        self.check_supported()?;
        let targets = self.target_modules()?;
        let layers = self.layers()?;
        let excluded = self.names("exclude_modules")?;
        Ok(AdapterConfig {
            narrowed: layers.is_some() || !excluded.is_empty(),
            targets,
            r: self.rank("r", self.get("r"))?,
            lora_alpha: self.number("lora_alpha", self.get("lora_alpha"))?,
            lora_dropout: self.dropout()?,
            use_rslora: self.flag("use_rslora")?,
            ranks: self.overrides("rank_pattern", |value| self.rank("rank_pattern", value))?,
            alphas: self.overrides("alpha_pattern", |value| self.number("alpha_pattern", value))?,
            layers,
            layer_lists: self.names("layers_pattern")?,
            base_model_name_or_path: self.text("base_model_name_or_path")?,
            task_type: self.text("task_type")?,
        })
    }

    fn check_supported(&self) -> Result<(), CheckpointError> {
        self.must_be(
            "peft_type",
            |value| value == "LORA",
            "Only LoRA adapters are read here",
        )?;
        self.must_be(
            "bias",
            |value| value.is_null() || value == "none",
            "Trained biases are not supported; train with bias = \"none\"",
        )?;
        self.must_be(
            "init_lora_weights",
            |value| match value {
                Value::String(name) => INITIALS.contains(&name.as_str()),
                Value::Null | Value::Bool(_) => true,
                _ => false,
            },
            "Such an adapter belongs to a changed base model; convert it to a plain one with PEFT",
        )?;
        for field in UNSUPPORTED {
            self.must_be(
                field,
                says_nothing,
                "This changes what the adapter computes and is not supported; train without it",
            )?;
        }
        self.flag("fan_in_fan_out")?;
        let known = |field: &str| KNOWN.contains(&field) || UNSUPPORTED.contains(&field);
        let mut unknown = self.map.iter().filter(|(field, _)| !known(field));
        match unknown.find(|(_, value)| !says_nothing(value)) {
            Some((field, value)) => Err(CheckpointError::UnknownSetting {
                path: self.path.to_owned(),
                field: field.chars().take(80).collect(),
                found: shown(value),
            }),
            None => Ok(()),
        }
    }

    /// The value of a field; an absent one counts as null.
    fn get(&self, field: &str) -> &Value {
        self.map.get(field).unwrap_or(&Value::Null)
    }

    fn refuse(&self, field: &'static str, remedy: impl Into<String>) -> CheckpointError {
        CheckpointError::Setting {
            path: self.path.to_owned(),
            field,
            found: shown(self.get(field)),
            remedy: remedy.into(),
        }
    }

    fn must_be(
        &self,
        field: &'static str,
        allowed: impl Fn(&Value) -> bool,
        remedy: &str,
    ) -> Result<(), CheckpointError> {
        match allowed(self.get(field)) {
            true => Ok(()),
            false => Err(self.refuse(field, remedy)),
        }
    }

    fn flag(&self, field: &'static str) -> Result<bool, CheckpointError> {
        match self.get(field) {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(*flag),
            _ => Err(self.refuse(field, "It must be true or false")),
        }
    }

    fn rank(&self, field: &'static str, value: &Value) -> Result<usize, CheckpointError> {
        let rank = value.as_u64().filter(|r| (1..=MAX_RANK).contains(r));
        rank.and_then(|r| usize::try_from(r).ok()).ok_or_else(|| {
            let remedy = format!("A rank must be a whole number from 1 to {MAX_RANK}");
            self.refuse(field, remedy)
        })
    }

    fn number(&self, field: &'static str, value: &Value) -> Result<f32, CheckpointError> {
        let number = value.as_f64().map(|value| value as f32);
        number
            .filter(|value| value.is_finite())
            .ok_or_else(|| self.refuse(field, "It must be a finite number"))
    }

    fn dropout(&self) -> Result<f32, CheckpointError> {
        let field = "lora_dropout";
        let remedy = "It must be a number from 0 to below 1";
        let share = match self.get(field) {
            Value::Null => Some(0.0),
            value => value.as_f64().map(|share| share as f32),
        };
        share
            .filter(|share| (0.0..1.0).contains(share))
            .ok_or_else(|| self.refuse(field, remedy))
    }

    fn text(&self, field: &'static str) -> Result<Option<String>, CheckpointError> {
        match self.get(field) {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            _ => Err(self.refuse(field, "It must be a text or null")),
        }
    }

    /// A list of names, one name, or nothing.
    fn names(&self, field: &'static str) -> Result<Vec<String>, CheckpointError> {
        let name = |value: &Value| value.as_str().map(str::to_owned);
        let names = match self.get(field) {
            Value::Null => Some(Vec::new()),
            Value::String(text) if text.is_empty() => Some(Vec::new()),
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(names) if names.len() <= MAX_NAMES => names.iter().map(name).collect(),
            _ => None,
        };
        names.ok_or_else(|| {
            self.refuse(
                field,
                "It must be a list of names, at most 16384, or a text",
            )
        })
    }

    fn target_modules(&self) -> Result<Targets, CheckpointError> {
        let field = "target_modules";
        if let Value::String(text) = self.get(field) {
            return Ok(Targets::Pattern(pattern(&format!("^(?:{text})$"))));
        }
        let names = self.names(field)?;
        match names.is_empty() || names.iter().any(String::is_empty) {
            true => Err(self.refuse(field, "It must be a list of module names, or a text")),
            false => Ok(Targets::Names(names)),
        }
    }

    /// The blocks that carry an adapter; `None` for all.
    fn layers(&self) -> Result<Option<BTreeSet<u64>>, CheckpointError> {
        let field = "layers_to_transform";
        let layers = match self.get(field) {
            Value::Null => return Ok(None),
            Value::Array(layers) if layers.is_empty() => return Ok(None),
            Value::Array(layers) => layers.iter().map(Value::as_u64).collect(),
            layer => layer.as_u64().map(|layer| BTreeSet::from([layer])),
        };
        let remedy = "It must be the number of a block, or a list of them";
        match layers {
            Some(layers) => Ok(Some(layers)),
            None => Err(self.refuse(field, remedy)),
        }
    }

    fn overrides<T>(
        &self,
        field: &'static str,
        value: impl Fn(&Value) -> Result<T, CheckpointError>,
    ) -> Result<Overrides<T>, CheckpointError> {
        let entries = match self.get(field) {
            Value::Null => return Ok(Overrides(Vec::new())),
            Value::Object(entries) if entries.len() <= MAX_OVERRIDES => entries,
            _ => {
                return Err(
                    self.refuse(field, "It must map module names, at most 1024, to numbers")
                );
            }
        };
        let entry = |(text, number): (&String, &Value)| {
            let older = pattern(&format!("^(?:.*\\.{text}$)"));
            let newer = pattern(&format!("^(?:(?:.*\\.)?(?:{text})$)"));
            let (Some(older), Some(newer)) = (older, newer) else {
                let remedy = format!("'{text}' is no pattern that is understood here");
                return Err(self.refuse(field, remedy));
            };
            let text = text.clone();
            Ok((Key { text, older, newer }, value(number)?))
        };
        let entries: Result<_, CheckpointError> = entries.iter().map(entry).collect();
        entries.map(Overrides)
    }
}

/// A value as a message shows it.
fn shown(value: &Value) -> String {
    const SHOWN: usize = 80;
    let text = value.to_string();
    match text.chars().count() > SHOWN {
        true => text.chars().take(SHOWN).chain("...".chars()).collect(),
        false => text,
    }
}

/// Whether a value is null, false or empty.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}
