//! The model folder: its configuration, tensors and tokenizer, and what is to be trained of it.

use super::{About, EXAMPLES, Finding, Report, Severity};
use crate::adapter::files;
use crate::checkpoint::ModelFolder;
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, RunConfig};
use crate::data::tokenizer::GlmTokenizer;
use crate::model::trainables::Trainables;
use crate::model::{ModelError, quantised, weights};
use crate::pipeline::prepare::open_tokenizer;

/// What of the model could be read.
pub(super) struct Model {
    /// Its configuration, held as the run will.
    pub config: ModelConfig,
    /// Whether embedding and lm_head are one matrix.
    tied: bool,
}

/// Looks at `config.json` and at the name, shape and type of every tensor; `None` where there is no
/// configuration to go by.
pub(super) fn check(report: &mut Report, run: &RunConfig) -> Option<Model> {
    let path = &run.model.path;
    let mut config = match ModelConfig::from_json_file(&path.join("config.json")) {
        Ok(config) => config,
        Err(error) => {
            report.problem(About::Model, error);
            return None;
        }
    };
    let mut tied = config.tie_word_embeddings;
    match ModelFolder::open(path) {
        Err(error) => report.problem(About::Model, error),
        Ok(folder) => {
            let problems = weights::problems(&folder, &config);
            if problems.is_empty() {
                match weights::check(&folder, &config) {
                    Ok(source) => {
                        tied = source.tied;
                        if let Some(warning) = source.warning {
                            report.warning(About::Model, warning);
                        }
                    }
                    Err(error) => report.problem(About::Model, error),
                }
            }
            tensors(report, problems);
        }
    }
    match quantised::chosen(run.model.quantization, config.quantization, path) {
        Ok(chosen) => config.quantization = chosen,
        Err(error) => report.problem(About::Model, error),
    }
    let parameters: usize = weights::own_tensors(&config, tied)
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    report.fact(
        About::Model,
        format!(
            "{} blocks of {}, vocabulary {}, {parameters} parameters, rows of up to {} tokens",
            config.num_layers, config.hidden_size, config.vocab_size, config.max_sequence_length
        ),
    );
    Some(Model { config, tied })
}

/// Tensors that are wrong, of those of one kind the first few.
fn tensors(report: &mut Report, problems: Vec<ModelError>) {
    let is_each = |problem: &ModelError| {
        matches!(
            problem,
            ModelError::WrongShape { .. } | ModelError::WrongElements { .. }
        )
    };
    let (each, whole): (Vec<_>, Vec<_>) = problems.into_iter().partition(is_each);
    if let [only] = &each[..] {
        report.problem(About::Model, only);
    } else if !each.is_empty() {
        report.findings.push(Finding {
            severity: Severity::Problem,
            about: About::Model,
            count: each.len(),
            message: format!("{} tensors are not what config.json says", each.len()),
            examples: each
                .iter()
                .take(EXAMPLES)
                .map(ToString::to_string)
                .collect(),
        });
    }
    for problem in whole {
        report.problem(About::Model, problem);
    }
}

/// Looks at the tokenizer, by itself and beside the model; `None` where there is none that could be used.
pub(super) fn tokenizer(
    report: &mut Report,
    run: &RunConfig,
    model: Option<&Model>,
) -> Option<GlmTokenizer> {
    let mut warnings = Vec::new();
    let opened = open_tokenizer(&run.model.path, &model?.config, &mut warnings);
    for warning in warnings {
        report.warning(About::Tokenizer, warning);
    }
    match opened {
        Ok(Some(tokenizer)) => {
            let text = format!("{}, {} ids", tokenizer.generation(), tokenizer.size());
            report.fact(About::Tokenizer, text);
            Some(tokenizer)
        }
        Ok(None) => None,
        Err(error) => {
            report.problem(About::Tokenizer, error);
            None
        }
    }
}

/// Looks at what is to be trained, and at the adapter that it starts from.
pub(super) fn adapter(report: &mut Report, run: &RunConfig, model: &Model) -> Option<Trainables> {
    let trainables = match Trainables::new(&model.config, &run.adapter, model.tied) {
        Ok(trainables) => trainables,
        Err(error) => {
            report.problem(About::Adapter, error);
            return None;
        }
    };
    let specs = trainables.specs();
    let start = match &trainables.adapter {
        Some(AdapterSection::Lora(lora)) => lora
            .init_adapter
            .as_ref()
            .map(|folder| files::read_lora(folder, lora, specs)),
        Some(AdapterSection::Prefix(prefix)) => prefix
            .init_adapter
            .as_ref()
            .map(|folder| files::read_prefix(folder, prefix, specs)),
        Some(AdapterSection::Full(_)) | None => None,
    };
    if let Some(Err(error)) = start {
        report.problem(About::Adapter, error);
    }
    report.fact(
        About::Adapter,
        format!("{} parameters are trained", trainables.count()),
    );
    Some(trainables)
}
