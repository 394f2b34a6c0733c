//! Greedy decoding with a key/value cache.

use std::path::PathBuf;
use std::sync::Arc;

use mp_train::config::generate::GenerateOptions;
use mp_train::config::run::{Precision, RotaryPrecision};
use mp_train::data::batch::MicroBatch;
use mp_train::data::rows::PromptRow;
use mp_train::generate::Generator;
use mp_train::model::head::LogitsRows;
use mp_train::pipeline::base::Base;
use mp_train::pipeline::messages::{CachePlan, InferPlan};

use super::adapter::Adapter;
use super::batch::Stored;
use super::case::{Case, Family};
use super::compare::{Found, FoundTensors, Report};
use super::engine::{self, Configuration, Room};
use super::limits::Kind;
use super::single::Parts;
use super::{Golden, Outcome};

/// Each run that the case stores tokens of (`plain`, and one for each prefix), over every number of
/// stages.
pub fn run<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let stored = Stored::of(case)?;
    let prompts = stored.masked(case, &stored.non_pad(case)?)?.micro;
    let names: Vec<String> = case.expected_names().map(str::to_owned).collect();
    let runs = names
        .iter()
        .filter_map(|name| name.strip_suffix(".new_tokens"));
    for run in runs {
        let folder = match run {
            "plain" => None,
            // `ptuning` is told from `ptuning_projection` by the folder's name.
            run => {
                let name = format!("{run}_checkpoint");
                let mut folders = case.folders.iter();
                let folder = folders.find(|folder| folder.file_name() == Some(name.as_ref()));
                Some(folder.ok_or(format!("no folder for `{run}`"))?)
            }
        };
        let adapter = match folder {
            None => Adapter::none(),
            Some(folder) => Adapter::prefix(folder)?,
        };
        let golden = case.expected(&format!("{run}.new_tokens"))?;
        let steps = match golden.shape[..] {
            [_, steps] => steps,
            _ => return Err("new_tokens is no table".into()),
        };
        let golden: Vec<u32> = golden.values.iter().map(|&id| id as u32).collect();
        // In f16 a near tie goes either way, so the reference's choice is what the next step is fed.
        let forced = match B::PRECISION {
            Precision::F32 => None,
            Precision::F16 => Some(&golden[..]),
        };
        let alone = alone::<B>(family, folder, &prompts, steps)?;
        let found = alone.found(run, family.config.vocab_size, forced);
        report.compare(case, &format!("{run}/one_by_one"), &found)?;
        let mut first: Option<Answers> = None;
        for stages in engine::stage_counts::<B>(family.config.num_layers) {
            let parts = Parts::new(family, &adapter);
            let answers = greedy::<B>(&parts, &prompts, steps, stages, forced)?;
            match &first {
                None => {
                    let found = answers.found(run, family.config.vocab_size, forced);
                    report.compare(case, &format!("{run}/together"), &found)?;
                    first = Some(answers);
                }
                Some(first) => {
                    let differs = (first.logits != answers.logits).then(|| "logits".to_owned());
                    report.same(&format!("{run}/bits/{stages}_stages"), differs);
                }
            }
        }
    }
    Ok(())
}

/// What was chosen at each step, and the logits it was chosen from.
struct Answers {
    /// For each step an id for each prompt.
    ids: Vec<Vec<u32>>,
    /// For each step `[prompts, V]`.
    logits: Vec<Vec<f32>>,
}

impl Answers {
    /// By the names of the reference. `forced` are the tokens that the reference chose, `[prompts,
    /// steps]`, where these were fed or ought to have been: logits behind another token than these are
    /// those of another text, and left out; and where the reference's token is as likely as any but for
    /// the error that logits may have, it counts as chosen.
    fn found(&self, run: &str, vocab_size: usize, forced: Option<&[u32]>) -> FoundTensors {
        let (prompts, steps) = (self.ids.first().map_or(0, Vec::len), self.ids.len());
        let (mut ids, mut logits) = (Vec::new(), Vec::new());
        for prompt in 0..prompts {
            let mut same_text = true;
            for step in 0..steps {
                let id = self.ids[step][prompt];
                let row = &self.logits[step][prompt * vocab_size..(prompt + 1) * vocab_size];
                let known = row
                    .iter()
                    .map(|&logit| same_text.then_some(f64::from(logit)));
                logits.extend(known);
                let forced = forced.map(|forced| forced[prompt * steps + step]);
                let chosen = match forced {
                    Some(forced) if nearly_likeliest(row, forced) => forced,
                    Some(_) => likeliest(row),
                    None => id,
                };
                ids.push(same_text.then_some(f64::from(chosen)));
                same_text &= forced.is_none_or(|forced| forced == id);
            }
        }
        let new_tokens = Found {
            shape: vec![prompts, steps],
            values: ids,
            recomputed: false,
        };
        let step_logits = Found {
            shape: vec![prompts, steps, vocab_size],
            values: logits,
            recomputed: false,
        };
        FoundTensors::from([
            (format!("{run}.new_tokens"), new_tokens),
            (format!("{run}.step_logits"), step_logits),
        ])
    }
}

/// All prompts together, each with its own rows of the cache. The next step is fed what was chosen, or
/// the tokens of `forced`, `[prompts, steps]`.
fn greedy<B: Golden>(
    parts: &Parts<'_>,
    prompts: &MicroBatch,
    steps: usize,
    stages: usize,
    forced: Option<&[u32]>,
) -> Outcome<Answers> {
    let adapter = parts.adapter.clone();
    let room = Room {
        rows: prompts.tokens(),
        sequences: prompts.sequences.len(),
        micro_batches: 1,
    };
    let configuration = Configuration {
        stages,
        threads: stages,
        ..Configuration::PLAIN
    };
    let values = Arc::new(move |spec: &_| adapter.initial(spec));
    let mut engine = engine::start::<B>(parts, configuration, room, values)?;
    let mut cache = CachePlan {
        renew: Some(prompts.tokens() + steps * prompts.sequences.len()),
        starts: Vec::new(),
        filled: vec![0; prompts.sequences.len()],
    };
    for (index, sequence) in prompts.sequences.iter().enumerate() {
        cache.starts.push(sequence.start + index * steps);
    }
    let mut answers = Answers {
        ids: Vec::new(),
        logits: Vec::new(),
    };
    let mut batch = prompts.clone();
    for step in 0..steps {
        let logits = engine.infer(InferPlan {
            batch: batch.clone(),
            rows: LogitsRows::Last,
            cache: Some(cache.clone()),
        })?;
        for (filled, sequence) in cache.filled.iter_mut().zip(&batch.sequences) {
            *filled += sequence.len;
        }
        cache.renew = None;
        let rows = logits.chunks_exact(parts.family.config.vocab_size);
        let ids: Vec<u32> = match forced {
            None => rows.map(likeliest).collect(),
            Some(forced) => forced.iter().skip(step).step_by(steps).copied().collect(),
        };
        batch = batch.continued(&ids);
        answers.ids.push(ids);
        answers.logits.push(logits);
    }
    Ok(answers)
}

/// One prompt after another, as `mp-train generate` answers them.
fn alone<B: Golden>(
    family: &Family,
    adapter: Option<&PathBuf>,
    prompts: &MicroBatch,
    steps: usize,
) -> Outcome<Answers> {
    let mut answers = Answers {
        ids: vec![Vec::new(); steps],
        logits: vec![Vec::new(); steps],
    };
    let options = GenerateOptions {
        adapter: adapter.cloned(),
        precision: B::PRECISION,
        rotary_table: RotaryPrecision::F32,
        ..GenerateOptions::new(family.model_folder(), vec![B::DEVICE])
    };
    let base = Base::open(&options.model, options.quantization)?;
    let mut generator = Generator::start(&base, &options, prompts.max_len())?;
    for sequence in &prompts.sequences {
        let rows = sequence.start..sequence.start + sequence.len;
        let positions = prompts.position[rows.clone()].iter().copied();
        let prompt = PromptRow {
            input_ids: prompts.input_ids[rows.clone()].to_vec(),
            context_length: sequence.context_length,
            positions: positions
                .zip(prompts.block_position[rows].iter().copied())
                .collect(),
        };
        let mut step = 0;
        generator.greedy(&prompt, steps, &[], &mut |id, logits| {
            answers.ids[step].push(id);
            answers.logits[step].extend(logits);
            step += 1;
        })?;
    }
    Ok(answers)
}

fn likeliest(logits: &[f32]) -> u32 {
    let better = |best: usize, id: usize| if logits[id] > logits[best] { id } else { best };
    (0..logits.len()).fold(0, better) as u32
}

/// Whether an id's logit is the largest, but for the error that it and the largest may have in f16.
fn nearly_likeliest(logits: &[f32], id: u32) -> bool {
    let error = Kind::Logits.limit(Precision::F16).value();
    let behind = logits[likeliest(logits) as usize] - logits[id as usize];
    f64::from(behind) <= 2.0 * error
}
