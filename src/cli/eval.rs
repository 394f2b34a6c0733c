//! `mp-train eval`.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use serde::Serialize;

use super::args::EvalArgs;
use super::failure::{Failure, FailureClass};
use super::generate::{greedy_unless_asked, options, sampling};
use super::prompts::Answers;
use super::train::with_data_hint;
use super::{print, signals};
use crate::config::generate::Sampling;
use crate::config::run::BadRowPolicy;
use crate::data::text_rows::BadRows;
use crate::eval::{Columns, EvalError, EvalOptions, Evaluation, Outcome, Prediction};
use crate::pipeline::base::StartError;
use crate::report::Event;
use crate::report::progress::{Progress, Style};

/// What `--output` holds: what was measured, and of what.
#[derive(Serialize)]
struct Summary<'a> {
    model: &'a Path,
    adapter: Option<&'a Path>,
    data: &'a [std::path::PathBuf],
    #[serde(flatten)]
    evaluation: &'a Evaluation,
    #[serde(skip_serializing_if = "Option::is_none")]
    sampling: Option<SamplingSummary>,
}

/// How answers were generated.
#[derive(Serialize)]
struct SamplingSummary {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    repetition_penalty: f64,
    seed: u64,
    max_new_tokens: Option<usize>,
}

impl SamplingSummary {
    fn of(sampling: &Sampling, max_new_tokens: Option<usize>) -> Self {
        SamplingSummary {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
            max_new_tokens,
        }
    }
}

pub(super) fn run(args: &EvalArgs) -> Result<(), Failure> {
    let sampling = sampling(&args.sampling, greedy_unless_asked(&args.sampling))?;
    let options = EvalOptions {
        model: options(&args.model, sampling)?,
        max_new_tokens: args.max_new_tokens.map(|n| n as usize),
        data: args.data.0.clone(),
        columns: Columns {
            prompt: args.prompt_column.clone(),
            input: args.input_column.clone(),
            response: args.response_column.clone(),
            history: args.history_column.clone(),
            max_source_length: args.max_source_length.map(|n| n as usize),
            max_target_length: args.max_target_length.map(|n| n as usize),
        },
        bad_rows: match args.bad_rows {
            Some(BadRowPolicy::Skip) => BadRows::Skip,
            Some(BadRowPolicy::Fatal) | None => BadRows::Fatal,
        },
        max_rows: args.max_rows.map(|n| n as usize),
        loss_only: args.loss_only,
    };
    let is_stdout = |path: &Option<_>| path.as_deref() == Some(Path::new("-"));
    if is_stdout(&args.predictions) && is_stdout(&args.output) {
        let both = "--predictions and --output cannot both go to standard output";
        return Err(Failure::user(both));
    }
    // Files that cannot be written are told before hours of work.
    let create = |path: &Option<_>| path.as_deref().map(Answers::create).transpose();
    let mut predictions = create(&args.predictions)?;
    let output = create(&args.output)?;
    let stop = signals::stop_flag().map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    let mut failed: Option<io::Error> = None;
    let mut emit = |prediction: &Prediction| {
        if let Some(Err(error)) = predictions.as_mut().map(|file| file.write_json(prediction)) {
            failed.get_or_insert(error);
            stop.store(true, Ordering::Relaxed);
        }
    };
    let mut progress = Progress::new(io::stderr(), Style::for_stderr(args.quiet), 1);
    let mut reporter = |event: Event| progress.show(&event);
    let outcome = crate::eval::run(&options, &mut reporter, &mut emit, &stop);
    drop(progress);
    let evaluation = match (outcome, failed) {
        (Err(error), _) => return Err(error.into()),
        // A reader that has seen enough (`| head`) is no error.
        (Ok(_), Some(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
        (Ok(_), Some(error)) => {
            return Err(Failure::new(FailureClass::Machine, &error)
                .hint("the predictions could not be written: check the free space"));
        }
        (Ok(Outcome::Interrupted), None) => {
            return Err(Failure::interrupted(
                "stopped before the last row was evaluated; nothing is saved",
            ));
        }
        (Ok(Outcome::Finished(evaluation)), None) => evaluation,
    };
    if let Some(file) = predictions {
        file.finish()?;
    }
    if let Some(mut file) = output {
        let written = file.write_json(&Summary {
            model: &args.model.model,
            adapter: args.model.adapter.as_deref(),
            data: &options.data,
            sampling: (!args.loss_only)
                .then(|| SamplingSummary::of(&options.model.sampling, options.max_new_tokens)),
            evaluation: &evaluation,
        });
        written.map_err(|error| Failure::new(FailureClass::Machine, &error))?;
        file.finish()?;
    }
    let table = table(&evaluation);
    match is_stdout(&args.predictions) || is_stdout(&args.output) {
        // Standard output belongs to a program then.
        true => eprint!("{table}"),
        false => print(&table)?,
    }
    Ok(())
}

/// What was measured, for a person.
fn table(evaluation: &Evaluation) -> String {
    let mut text = format!(
        "{} rows, {} target tokens\nloss        {:>9.4}\nperplexity  {:>9.4}\n",
        evaluation.rows, evaluation.target_tokens, evaluation.loss, evaluation.perplexity,
    );
    let Some(answers) = &evaluation.answers else {
        return text;
    };
    let mean = &answers.mean;
    for (name, value) in [
        ("BLEU-4", mean.bleu4),
        ("ROUGE-1", mean.rouge1),
        ("ROUGE-2", mean.rouge2),
        ("ROUGE-L", mean.rouge_l),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<11} {value:>9.4}");
    }
    for (count, what) in [
        (answers.empty_predictions, "empty answers, each worth 0"),
        (
            answers.empty_labels,
            "rows whose label has no text, each worth 0",
        ),
        (
            answers.cut_off,
            "answers cut off at their longest (--max-new-tokens)",
        ),
    ] {
        if count > 0 {
            let _ = writeln!(text, "{count} {what}");
        }
    }
    text
}

impl From<EvalError> for Failure {
    fn from(error: EvalError) -> Self {
        let failure = Failure::new(error.class(), &error);
        match &error {
            EvalError::Data(data) | EvalError::Start(StartError::Data(data)) => {
                with_data_hint(failure, data)
            }
            _ => failure,
        }
    }
}
