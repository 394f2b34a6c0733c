//! Greedy decoding with a key/value cache.

use std::path::PathBuf;
use std::sync::Arc;

use mp_train::config::generate::GenerateOptions;
use mp_train::config::run::{Device, Precision, RotaryPrecision};
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
use super::single::Parts;
use super::{Golden, Outcome};

/// Each run that the case stores tokens of (`plain`, and one for each prefix), over every number of
/// stages.
pub fn run<B: Golden>(family: &Family, case: &Case, report: &mut Report) -> Outcome<()> {
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
        let steps = match case.expected(&format!("{run}.new_tokens"))?.shape[..] {
            [_, steps] => steps,
            _ => return Err("new_tokens is no table".into()),
        };
        let alone = alone(family, folder, &prompts, steps)?;
        let found = alone.found(run, family.config.vocab_size);
        report.compare(case, &format!("{run}/one_by_one"), &found)?;
        let mut first: Option<Answers> = None;
        for stages in engine::stage_counts(family.config.num_layers) {
            let parts = Parts::new(family, &adapter);
            let answers = greedy::<B>(&parts, &prompts, steps, stages)?;
            match &first {
                None => {
                    let found = answers.found(run, family.config.vocab_size);
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
    fn found(&self, run: &str, vocab_size: usize) -> FoundTensors {
        let (prompts, steps) = (self.ids.first().map_or(0, Vec::len), self.ids.len());
        let (mut ids, mut logits) = (Vec::new(), Vec::<f32>::new());
        for prompt in 0..prompts {
            for step in 0..steps {
                ids.push(self.ids[step][prompt]);
                let row = prompt * vocab_size..(prompt + 1) * vocab_size;
                logits.extend(&self.logits[step][row]);
            }
        }
        FoundTensors::from([
            (
                format!("{run}.new_tokens"),
                Found::whole([prompts, steps], &ids),
            ),
            (
                format!("{run}.step_logits"),
                Found::whole([prompts, steps, vocab_size], &logits),
            ),
        ])
    }
}

/// All prompts together, each with its own rows of the cache.
fn greedy<B: Golden>(
    parts: &Parts<'_>,
    prompts: &MicroBatch,
    steps: usize,
    stages: usize,
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
    for _ in 0..steps {
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
        let ids: Vec<u32> = rows.map(likeliest).collect();
        batch = batch.continued(&ids);
        answers.ids.push(ids);
        answers.logits.push(logits);
    }
    Ok(answers)
}

/// One prompt after another, as `mp-train generate` answers them.
fn alone(
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
        precision: Precision::F32,
        rotary_table: RotaryPrecision::F32,
        ..GenerateOptions::new(family.model_folder(), vec![Device::Cpu])
    };
    let base = Base::open(&options.model)?;
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
        generator.greedy(&prompt, steps, None, &mut |id, logits| {
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
