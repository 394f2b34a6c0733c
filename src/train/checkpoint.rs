//! What a run saves and how it goes on: `checkpoint-N/` and the result.
//!
//! A checkpoint holds the adapter in the form that others read, `state.safetensors` (whole f32 tensors
//! `values/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, whatever the number of stages),
//! `trainer_state.json` and the resolved `config.toml`. Random numbers need no state of their own:
//! they are counted from the seed, the step and the place.

use std::collections::BTreeMap;
use std::fs;
use std::mem::take;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::writer::Saved;
use super::{TrainError, result_folder};
use crate::adapter::{ParameterState, files};
use crate::checkpoint::adapter_files::{LoraFileConfig, LoraFiles};
use crate::checkpoint::prefix_files::PrefixFiles;
use crate::checkpoint::safetensors::write_safetensors;
use crate::checkpoint::{CheckpointError, HostTensor, run_state};
use crate::config::run::{AdapterSection, Precision, Resume, RunConfig};
use crate::data::rows::Rows;
use crate::data::sampler::SamplerState;
use crate::data::template::{TEMPLATE_FILE, TemplateSettings};
use crate::model::trainables::Trainables;
use crate::optim::loss_scale::LossScale;
use crate::pipeline::base::Base;
use crate::pipeline::messages::{StepOutcome, StepPlan};
use crate::report::Event;
use crate::report::atomic_file::AtomicFile;

const TRAINER_STATE: &str = "trainer_state.json";
const TENSORS: &str = "state.safetensors";
const CONFIG: &str = "config.toml";
const ADAPTER: &str = "adapter";

/// What tells one set of training rows from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fingerprint {
    /// Number of rows.
    rows: usize,
    /// Number of tokens.
    tokens: usize,
    /// CRC-32 of all ids, labels, positions and context lengths.
    crc32: u32,
}

impl Fingerprint {
    /// The fingerprint of `rows`.
    pub fn of(rows: &Rows) -> Self {
        Fingerprint {
            rows: rows.len(),
            tokens: rows.tokens(),
            crc32: rows.checksum(),
        }
    }
}

/// How far a run has come, tensors apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TrainerState {
    /// Steps done, skipped ones included.
    pub step: u64,
    /// Updates applied.
    pub updates: u64,
    /// Loss scale.
    pub loss_scale: LossScale,
    /// Position in the data.
    pub data: SamplerState,
    /// Which data.
    pub fingerprint: Fingerprint,
}

impl TrainerState {
    /// A run that has not begun.
    pub fn new(loss_scale: LossScale, fingerprint: Fingerprint) -> Self {
        TrainerState {
            step: 0,
            updates: 0,
            loss_scale,
            data: SamplerState::default(),
            fingerprint,
        }
    }

    /// Records a step, after which the data goes on at `data`.
    pub fn advance(&mut self, outcome: &StepOutcome, data: SamplerState) {
        self.step += 1;
        self.updates += u64::from(outcome.applied);
        self.loss_scale.update(outcome.applied);
        self.data = data;
    }
}

/// A checkpoint that was read.
pub(super) struct Resumed {
    folder: PathBuf,
    config: RunConfig,
    /// How far it had come.
    pub trainer: TrainerState,
    /// Values and moments.
    pub tensors: BTreeMap<String, HostTensor>,
}

/// Reads the checkpoint that the configuration asks for.
pub(super) fn find(
    config: &RunConfig,
    reporter: &mut dyn FnMut(Event),
) -> Result<Option<Resumed>, TrainError> {
    let folder = match &config.run.resume {
        Resume::No => return Ok(None),
        Resume::From(folder) => folder.clone(),
        Resume::Latest => {
            let output = &config.run.output;
            let latest = run_state::latest_checkpoint(output)?;
            for (folder, reason) in &latest.skipped {
                let folder = folder.display();
                reporter(Event::Warning(format!("{folder} is passed over: {reason}")));
            }
            latest.path.ok_or_else(|| TrainError::NothingToResume {
                output: output.clone(),
            })?
        }
    };
    run_state::verify_checkpoint(&folder)?;
    Ok(Some(Resumed {
        config: RunConfig::from_file(&folder.join(CONFIG))?,
        trainer: run_state::read_json(&folder.join(TRAINER_STATE))?,
        tensors: run_state::read_tensors(&folder.join(TENSORS))?,
        folder,
    }))
}

impl Resumed {
    /// The file that [`Resumed::tensors`] come from.
    pub fn tensors_file(&self) -> PathBuf {
        self.folder.join(TENSORS)
    }

    /// Refuses to go on with other data, or as a run of another kind. What may differ: devices and
    /// everything about them, the length of the run, the optimiser's settings, the output folder.
    pub fn check(&self, config: &RunConfig, fingerprint: &Fingerprint) -> Result<(), TrainError> {
        let (then, now) = (&self.config, config);
        let mut facts = adapter_facts(&then.adapter, &now.adapter);
        let mut fact = |field: &str, then: &dyn Shown, now: &dyn Shown| {
            facts.push((field.to_owned(), then.shown(), now.shown()));
        };
        fact(
            "model.precision",
            &then.model.precision,
            &now.model.precision,
        );
        fact(
            "model.quantization",
            &then.model.quantization,
            &now.model.quantization,
        );
        fact(
            "model.rotary_table",
            &then.model.rotary_table,
            &now.model.rotary_table,
        );
        fact(
            "model.product_sums",
            &then.model.product_sums,
            &now.model.product_sums,
        );
        fact("data.shuffle", &then.data.shuffle, &now.data.shuffle);
        fact(
            "data.bucket_by_length",
            &then.data.bucket_by_length,
            &now.data.bucket_by_length,
        );
        let (then, now) = (&then.run, &now.run);
        fact(
            "run.micro_batch_tokens",
            &then.micro_batch_tokens,
            &now.micro_batch_tokens,
        );
        fact(
            "run.micro_batch_size",
            &then.micro_batch_size,
            &now.micro_batch_size,
        );
        fact(
            "run.gradient_accumulation",
            &then.gradient_accumulation,
            &now.gradient_accumulation,
        );
        fact("run.seed", &then.seed, &now.seed);
        let rows = |data: &Fingerprint| {
            let Fingerprint {
                rows,
                tokens,
                crc32,
            } = data;
            format!("{rows} rows of {tokens} tokens together (CRC-32 {crc32:08x})")
        };
        fact(
            "data.train",
            &rows(&self.trainer.fingerprint),
            &rows(fingerprint),
        );
        for (field, found, expected) in facts {
            if found != expected {
                return Err(TrainError::OtherRun {
                    checkpoint: self.folder.clone(),
                    field,
                    found,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// A value as a message shows it.
trait Shown {
    fn shown(&self) -> String;
}

impl<T: Serialize> Shown for T {
    fn shown(&self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Null) | Err(_) => "(not set)".to_owned(),
            Ok(serde_json::Value::String(text)) => text,
            Ok(value) => value.to_string(),
        }
    }
}

/// The settings of two adapters, each by its name.
fn adapter_facts(then: &AdapterSection, now: &AdapterSection) -> Vec<(String, String, String)> {
    let settings = |adapter: &AdapterSection| {
        let value = serde_json::to_value(without_origin(adapter)).unwrap_or_default();
        value.as_object().cloned().unwrap_or_default()
    };
    let (then, now) = (settings(then), settings(now));
    let added = now.keys().filter(|name| !then.contains_key(*name));
    let facts = then.keys().chain(added).map(|name| {
        let shown = |settings: &serde_json::Map<_, _>| settings.get(name).shown();
        (format!("adapter.{name}"), shown(&then), shown(&now))
    });
    facts.collect()
}

/// An adapter's settings without the folder it started from, which a resumed run no longer needs.
fn without_origin(adapter: &AdapterSection) -> AdapterSection {
    let mut adapter = adapter.clone();
    match &mut adapter {
        AdapterSection::Lora(lora) => lora.init_adapter = None,
        AdapterSection::Prefix(prefix) => prefix.init_adapter = None,
        AdapterSection::Full(_) => {}
    }
    adapter
}

/// Writes the resolved configuration into a folder and returns its path.
pub(super) fn write_config(config: &RunConfig, folder: &Path) -> Result<PathBuf, TrainError> {
    fs::create_dir_all(folder).map_err(write_error(folder))?;
    let path = folder.join(CONFIG);
    write_text(&path, &config.to_toml()?)?;
    Ok(path)
}

fn write_error(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |cause| CheckpointError::Write { path, cause }
}

fn write_text(path: &Path, text: &str) -> Result<(), CheckpointError> {
    let write = || {
        use std::io::Write;
        let mut file = AtomicFile::create(path)?;
        file.write_all(text.as_bytes())?;
        file.commit()
    };
    write().map_err(write_error(path))
}

/// What a run is, for those who save something of it.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub config: &'a RunConfig,
    pub trainables: &'a Trainables,
    pub base: &'a Base,
    /// What text rows became; nothing where the rows are token ids.
    pub template: Option<&'a TemplateSettings>,
}

/// Saves `checkpoint-{step}`. The three parts of the state are put together one after another, each giving
/// its memory back before the next.
pub(super) fn save(
    run: Run<'_>,
    state: &TrainerState,
    mut parameters: Vec<ParameterState>,
) -> Result<Saved, TrainError> {
    let Run {
        config, trainables, ..
    } = run;
    let mut whole = |part: fn(&mut ParameterState) -> Vec<f32>| {
        let parts: Vec<Vec<f32>> = parameters.iter_mut().map(part).collect();
        files::put_together(trainables.specs(), parts.iter().map(|part| &part[..]))
    };
    let values = whole(|parameter| take(&mut parameter.values))?;
    let exp_avg = whole(|parameter| take(&mut parameter.exp_avg))?;
    let exp_avg_sq = whole(|parameter| take(&mut parameter.exp_avg_sq))?;
    // A whole model is no adapter, and by far the largest thing that is saved.
    let adapter = (!trainables.is_full()).then(|| values.clone());
    let mut tensors = named("values", values);
    tensors.extend(named("exp_avg", exp_avg));
    tensors.extend(named("exp_avg_sq", exp_avg_sq));
    let toml = config.to_toml()?;
    let (output, limit) = (&config.run.output, config.run.save_total_limit);
    let saved = run_state::save_checkpoint(output, state.step, limit, |folder| {
        if let Some(adapter) = adapter {
            write_adapter(run, adapter, &folder.join(ADAPTER))?;
        }
        run_state::write_tensors(&folder.join(TENSORS), &tensors)?;
        run_state::write_json(&folder.join(TRAINER_STATE), state)?;
        write_text(&folder.join(CONFIG), &toml)
    });
    match saved {
        Ok(path) => Ok(Saved {
            path,
            warning: None,
        }),
        Err(error @ CheckpointError::Prune { .. }) => {
            let warning = Some(error.to_string());
            match error {
                CheckpointError::Prune { saved: path, .. } => Ok(Saved { path, warning }),
                other => Err(other.into()),
            }
        }
        Err(error) => Err(error.into()),
    }
}

fn named(part: &str, tensors: BTreeMap<String, HostTensor>) -> BTreeMap<String, HostTensor> {
    let name = |(name, tensor)| (format!("{part}/{name}"), tensor);
    tensors.into_iter().map(name).collect()
}

/// Writes the adapter in the form that others read: a PEFT folder, or a prefix as safetensors; and how
/// its rows were worded.
fn write_adapter(
    run: Run<'_>,
    tensors: BTreeMap<String, HostTensor>,
    folder: &Path,
) -> Result<(), CheckpointError> {
    let config = run.config;
    if let Some(template) = run.template {
        fs::create_dir_all(folder).map_err(write_error(folder))?;
        let path = folder.join(TEMPLATE_FILE);
        let text = toml::to_string(template).map_err(|error| CheckpointError::Unsavable {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        write_text(&path, &text)?;
    }
    match &run.trainables.adapter {
        Some(AdapterSection::Lora(lora)) => LoraFiles {
            config: LoraFileConfig {
                r: lora.r,
                lora_alpha: lora.lora_alpha,
                lora_dropout: lora.lora_dropout,
                target_modules: lora.target_modules.clone(),
                base_model_name_or_path: Some(config.model.path.display().to_string()),
                task_type: Some("CAUSAL_LM".to_owned()),
            },
            tensors,
        }
        .write(folder),
        Some(AdapterSection::Prefix(prefix)) => PrefixFiles {
            pre_seq_len: prefix.pre_seq_len,
            prefix_projection: prefix.prefix_projection,
            tensors,
            ignored: Vec::new(),
        }
        .write(folder, model_config_json(config)?),
        Some(AdapterSection::Full(_)) | None => write_model(run, tensors, folder),
    }
}

fn model_config_json(
    config: &RunConfig,
) -> Result<serde_json::Map<String, serde_json::Value>, CheckpointError> {
    run_state::read_json(&config.model.path.join("config.json"))
}

/// Writes a trained model as a Hugging Face folder, in the storage type of the run.
fn write_model(
    run: Run<'_>,
    tensors: BTreeMap<String, HostTensor>,
    folder: &Path,
) -> Result<(), CheckpointError> {
    let Run { config, base, .. } = run;
    fs::create_dir_all(folder).map_err(write_error(folder))?;
    let mut stored = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = match config.model.precision {
            Precision::F32 => tensor,
            Precision::F16 => HostTensor::from_f16(tensor.shape.clone(), &tensor.to_f16()?)?,
        };
        stored.insert(name, tensor);
    }
    write_safetensors(&folder.join("model.safetensors"), &stored)?;
    let mut json = model_config_json(config)?;
    let tied = base.head_source.tied;
    json.insert("tie_word_embeddings".to_owned(), json!(tied));
    let dtype = match config.model.precision {
        Precision::F32 => "float32",
        Precision::F16 => "float16",
    };
    json.insert("torch_dtype".to_owned(), json!(dtype));
    copy_tokenizer(&config.model.path, folder)?;
    run_state::write_json(&folder.join("config.json"), &json)
}

/// Copies what the tokenizer is read from, so that the new folder can be asked as it is.
fn copy_tokenizer(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    for name in ["ice_text.model", "tokenizer.model", "tokenizer_config.json"] {
        let (from, to) = (from.join(name), to.join(name));
        match fs::copy(&from, &to) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(write_error(&to)(error)),
        }
    }
    Ok(())
}

/// Writes what the run was for, and returns where.
pub(super) fn write_result(
    run: Run<'_>,
    parameters: &[ParameterState],
) -> Result<PathBuf, TrainError> {
    let values = parameters.iter().map(|state| &state.values[..]);
    let tensors = files::put_together(run.trainables.specs(), values)?;
    let folder = result_folder(&run.config.adapter, &run.config.run.output);
    write_adapter(run, tensors, &folder)?;
    Ok(folder)
}

/// Writes the micro-batches of a step that diverged as JSONL, one sequence a line.
pub(super) fn write_diverged_batch(output: &Path, plan: &StepPlan) -> Result<PathBuf, TrainError> {
    let path = output.join("diverged_batch.jsonl");
    let mut text = String::new();
    for batch in &plan.micro_batches {
        for sequence in &batch.sequences {
            let range = sequence.start..sequence.start + sequence.len;
            let mut labels = vec![-100_i64; sequence.len + 1];
            for target in &batch.targets {
                if range.contains(&(target.row as usize)) {
                    labels[target.row as usize - sequence.start + 1] = i64::from(target.id);
                }
            }
            labels.truncate(sequence.len);
            let row = json!({
                "input_ids": &batch.input_ids[range.clone()],
                "labels": labels,
                "context_length": sequence.context_length,
                "position_ids": [&batch.position[range.clone()], &batch.block_position[range]],
            });
            text.push_str(&row.to_string());
            text.push('\n');
        }
    }
    write_text(&path, &text)?;
    Ok(path)
}
