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
use super::manifest::Form;
use super::single::Parts;
use super::{Golden, Outcome};

/// A run of greedy decoding that a case stores.
struct Asked {
    /// For the report.
    name: String,
    prompts: MicroBatch,
    /// Of the adapter.
    folder: Option<PathBuf>,
    /// The reference's tokens, `[prompts, steps]`.
    golden: Vec<u32>,
    steps: usize,
    one_by_one: Named,
    together: Named,
}

/// What the reference calls tokens and logits.
enum Named {
    /// `{lead}{tokens}` and `{lead}step_logits`, of all prompts.
    Whole { lead: String, tokens: &'static str },
    /// `generated.{prompt}` and `step_logits.{prompt}`.
    OfEach,
}

/// The runs of a case: `plain`, and one for each prefix; or the case is one run, whose prompts stand in
/// it one by one and once more padded.
fn asked(family: &Family, case: &Case) -> Outcome<Vec<Asked>> {
    let whole = |lead: &str, tokens| Named::Whole {
        lead: lead.to_owned(),
        tokens,
    };
    let golden = |name: &str| -> Outcome<(Vec<u32>, usize)> {
        let golden = case.expected(name)?;
        match golden.shape[..] {
            [_, steps] => Ok((golden.values.iter().map(|&id| id as u32).collect(), steps)),
            _ => Err(format!("{name} is no table").into()),
        }
    };
    if case.form == Form::Listed {
        let prompts = Stored::under(case, "batch.")?
            .left_padded(family, case)?
            .micro;
        for (index, sequence) in prompts.sequences.iter().enumerate() {
            let (_, alone) = case.input(&format!("prompt.{index}"))?;
            let ids = &prompts.input_ids[sequence.start..][..sequence.len];
            if !ids.iter().map(|&id| i64::from(id)).eq(alone) {
                return Err(format!("prompt.{index} is another in the batch").into());
            }
        }
        let (golden, steps) = golden("batch.generated")?;
        return Ok(vec![Asked {
            name: "asked".to_owned(),
            prompts,
            folder: case.folders.first().cloned(),
            golden,
            steps,
            one_by_one: Named::OfEach,
            together: whole("batch.", "generated"),
        }]);
    }
    let prompts = Stored::of(case)?.left_padded(family, case)?.micro;
    let runs = case.expected_names();
    let runs = runs.filter_map(|name| name.strip_suffix(".new_tokens"));
    let run = |run: &str| {
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
        let (golden, steps) = golden(&format!("{run}.new_tokens"))?;
        let lead = format!("{run}.");
        Ok(Asked {
            name: run.to_owned(),
            prompts: prompts.clone(),
            folder: folder.cloned(),
            golden,
            steps,
            one_by_one: whole(&lead, "new_tokens"),
            together: whole(&lead, "new_tokens"),
        })
    };
    runs.map(run).collect()
}

/// Each run, over every number of stages.
pub fn run<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    for asked in asked(family, case)? {
        let Asked {
            name,
            prompts,
            folder,
            golden,
            steps,
            one_by_one,
            together,
        } = &asked;
        let adapter = match folder {
            None => Adapter::none(),
            Some(folder) => Adapter::prefix(folder)?,
        };
        // In f16 a near tie goes either way, so the reference's choice is what the next step is fed.
        let forced = match B::PRECISION {
            Precision::F32 => None,
            Precision::F16 => Some(&golden[..]),
        };
        let vocab_size = family.config.vocab_size;
        let alone = alone::<B>(family, folder.as_ref(), prompts, *steps)?;
        let found = alone.found(one_by_one, vocab_size, forced);
        report.compare(case, &format!("{name}/one_by_one"), &found)?;
        let mut first: Option<Answers> = None;
        for stages in engine::stage_counts::<B>(family.config.num_layers) {
            let parts = Parts::new(family, &adapter);
            let answers = greedy::<B>(&parts, prompts, *steps, stages, forced)?;
            match &first {
                None => {
                    let found = answers.found(together, vocab_size, forced);
                    report.compare(case, &format!("{name}/together"), &found)?;
                    first = Some(answers);
                }
                Some(first) => {
                    let differs = (first.logits != answers.logits).then(|| "logits".to_owned());
                    report.same(&format!("{name}/bits/{stages}_stages"), differs);
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
    fn found(&self, named: &Named, vocab_size: usize, forced: Option<&[u32]>) -> FoundTensors {
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
        let found = |shape: &[usize], values: &[Option<f64>]| Found {
            shape: shape.to_vec(),
            values: values.to_vec(),
            recomputed: false,
        };
        match named {
            Named::Whole { lead, tokens } => FoundTensors::from([
                (format!("{lead}{tokens}"), found(&[prompts, steps], &ids)),
                (
                    format!("{lead}step_logits"),
                    found(&[prompts, steps, vocab_size], &logits),
                ),
            ]),
            Named::OfEach => {
                let ids = ids.chunks(steps).enumerate();
                let ids = ids.map(|(i, ids)| (format!("generated.{i}"), found(&[steps], ids)));
                let logits = logits.chunks(steps * vocab_size).enumerate();
                let shape = [steps, vocab_size];
                let logits =
                    logits.map(|(i, rows)| (format!("step_logits.{i}"), found(&shape, rows)));
                ids.chain(logits).collect()
            }
        }
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
    let error = Kind::Logits.half().value();
    let behind = logits[likeliest(logits) as usize] - logits[id as usize];
    f64::from(behind) <= 2.0 * error
}
