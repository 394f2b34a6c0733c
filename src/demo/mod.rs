//! `mp-train demo`: the whole way on one small example, from nothing to a model that was taught who
//! it is.
//!
//! A tiny GLM with random weights learns 80 questions and answers in English and Chinese, and its
//! own name. Then a LoRA and a P-Tuning v2 run, each over two CPU stages, give it another name while
//! it keeps the other answers. All models are asked as they stand on disk.

pub mod corpus;
mod error;
pub mod exam;
mod files;
pub mod findings;
mod model;
mod recipe;
mod rows;
mod table;
mod texts;
pub mod tokenizer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

use self::corpus::Who;
pub use self::error::DemoError;
use self::exam::{Questions, Verdict};
use self::files::Folder;
use self::findings::{Finding, Findings};
use self::recipe::{ONE_STAGE, Recipe, TWO_STAGES};
use crate::checkpoint::run_state::write_json;
use crate::config::run::RunConfig;
use crate::report;
use crate::train;

/// How the demo is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DemoOptions {
    /// The folder that it works in.
    pub output: PathBuf,
    /// Key of all random numbers.
    pub seed: u64,
    /// CPU threads, of all stages together.
    pub threads: usize,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A part of the demo begins: what it does, in a line.
    Part(String),
    /// A training run says something.
    Training(report::Event),
}

/// How the demo ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// All models were asked.
    Finished(Box<Findings>),
    /// A signal came first.
    Interrupted,
}

/// Runs the demo and says what happens through `show`. Whether the models learned something is in
/// the findings, not in the error.
///
/// # Errors
/// The folder is somebody else's or cannot be written; a run or an asking failed.
pub fn run(
    options: &DemoOptions,
    show: &mut dyn FnMut(Event),
    stop: &AtomicBool,
) -> Result<Outcome, DemoError> {
    let folder = Folder::take(&options.output)?;
    let recipe = Recipe::new(&folder, options);
    let questions = Questions::new();

    show(Event::Part(
        "1/4 making a tokenizer, a tiny GLM with random weights, questions and answers".to_owned(),
    ));
    make(&folder, options)?;

    show(Event::Part(
        "2/4 training the whole model, until it answers".to_owned(),
    ));
    let Some(seconds) = train(&recipe.base, show, stop)? else {
        return Ok(Outcome::Interrupted);
    };
    tokenizer::copy(&folder.untrained(), &folder.base_model())?;
    let model = folder.base_model();
    let answers = exam::ask(&model, None, ONE_STAGE, &questions, options)?;
    let base = Finding {
        verdict: Verdict::of_base(&questions, &answers),
        answers,
        seconds,
    };

    show(Event::Part(
        "3/4 LoRA over two CPU stages: a new name".to_owned(),
    ));
    let Some(seconds) = train(&recipe.lora, show, stop)? else {
        return Ok(Outcome::Interrupted);
    };
    let adapter = folder.lora().join("adapter");
    let lora = tuned(&model, &adapter, seconds, &questions, options)?;

    show(Event::Part(
        "4/4 P-Tuning v2 over two CPU stages: the same, another way".to_owned(),
    ));
    let Some(seconds) = train(&recipe.prefix, show, stop)? else {
        return Ok(Outcome::Interrupted);
    };
    let adapter = folder.prefix().join("adapter");
    let prefix = tuned(&model, &adapter, seconds, &questions, options)?;

    let findings = Findings {
        questions,
        base,
        lora,
        prefix,
    };
    write_json(
        &folder.file("answers.json"),
        &json!({
            "questions": findings.questions,
            "base": findings.base.answers,
            "lora": findings.lora.answers,
            "ptuning": findings.prefix.answers,
        }),
    )?;
    Ok(Outcome::Finished(Box::new(findings)))
}

/// Writes the untrained model with its tokenizer, and the rows of all runs.
fn make(folder: &Folder, options: &DemoOptions) -> Result<(), DemoError> {
    let (for_base, for_tuning) = (corpus::for_base(), corpus::for_tuning());
    let texts = [for_base.clone(), for_tuning.clone()].concat();
    let tokenizer = tokenizer::write(&folder.untrained(), &texts)?;
    model::write(&folder.untrained(), &tokenizer, options.seed)?;
    rows::write(&folder.file("base.jsonl"), &tokenizer, &for_base)?;
    rows::write(&folder.file("tuning.jsonl"), &tokenizer, &for_tuning)?;
    let readable = json!({
        "plain": corpus::plain(),
        "old identity (base)": corpus::identity(Who::Old),
        "personas (base)": corpus::personas(),
        "new identity (tuning)": corpus::identity(Who::New),
    });
    Ok(write_json(&folder.file("questions.json"), &readable)?)
}

/// Trains; the seconds it took, or nothing when a signal ended it.
fn train(
    config: &RunConfig,
    show: &mut dyn FnMut(Event),
    stop: &AtomicBool,
) -> Result<Option<f64>, DemoError> {
    if stop.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let started = Instant::now();
    let mut reporter = |event| show(Event::Training(event));
    Ok(match train::run(config, &mut reporter, stop)? {
        train::Outcome::Finished => Some(started.elapsed().as_secs_f64()),
        train::Outcome::InterruptedBeforeStart | train::Outcome::Interrupted { .. } => None,
    })
}

fn tuned(
    model: &Path,
    adapter: &Path,
    seconds: f64,
    questions: &Questions,
    options: &DemoOptions,
) -> Result<Finding, DemoError> {
    let answers = exam::ask(model, Some(adapter), TWO_STAGES, questions, options)?;
    Ok(Finding {
        verdict: Verdict::of_tuned(questions, &answers),
        answers,
        seconds,
    })
}
