//! How a training run of the reference was set up, from either form of manifest.

use mp_train::config::run::{LossNormalisation, LrSchedule, OptimizerSection};
use serde_json::Value;

use super::Outcome;
use super::case::{Case, setting};
use super::manifest::Form;

/// A run of optimiser steps.
pub struct Series {
    /// Its results are `{lead}.loss` and so on.
    pub lead: &'static str,
    pub optimizer: OptimizerSection,
    /// Steps that the learning rate is laid out for.
    pub total_steps: u64,
    /// The micro-batches of each step, by their places in the case.
    pub index: Vec<Vec<usize>>,
    /// Whether weight decay falls on every tensor alike, without the exceptions that the Trainer makes.
    pub one_group: bool,
    /// Whether it is the run of its case that GPUs repeat in other layouts too: micro-batches, clipping.
    pub laid_out: bool,
}

/// The runs of a case.
pub fn of_case(case: &Case) -> Outcome<Vec<Series>> {
    match case.form {
        Form::Named => Ok(vec![named(case)?]),
        Form::Listed => listed(case),
    }
}

fn named(case: &Case) -> Outcome<Series> {
    let (shape, index) = case.input("train.micro_index")?;
    let accumulation: usize = case.hyper("gradient_accumulation")?;
    if shape != [case.hyper("steps")?, accumulation] {
        return Err(format!("train.micro_index of shape {shape:?}").into());
    }
    let index: Vec<usize> = index
        .into_iter()
        .map(usize::try_from)
        .collect::<Result<_, _>>()?;
    let schedule = match &case.hyper::<String>("schedule")?[..] {
        "linear warmup then cosine to 0" => LrSchedule::Cosine,
        "linear warmup then linear to 0" => LrSchedule::Linear,
        "linear warmup then constant" => LrSchedule::Constant,
        words => return Err(format!("the schedule `{words}` is not known").into()),
    };
    let warmup = case.hyper("warmup_steps")?;
    Ok(Series {
        lead: "train",
        optimizer: OptimizerSection {
            max_grad_norm: case.hyper("max_grad_norm")?,
            ..optimizer(&case.settings, schedule, warmup)?
        },
        total_steps: case.hyper("total_steps")?,
        index: index.chunks(accumulation).map(<[_]>::to_vec).collect(),
        one_group: false,
        laid_out: true,
    })
}

fn listed(case: &Case) -> Outcome<Vec<Series>> {
    let settings = &case.settings;
    let parts = ["train", "trainer_style"];
    let parts = parts.into_iter().filter(|part| settings[part].is_object());
    let mut all = parts
        .map(|part| part_of(part, &settings[part], "micro_batches_per_step"))
        .collect::<Outcome<Vec<_>>>()?;
    if all.is_empty() {
        all.push(part_of("train", settings, "gradient_accumulation")?);
    }
    if case.expects("token_weighted.loss") {
        let mut weighted = part_of("token_weighted", settings, "gradient_accumulation")?;
        weighted.optimizer.loss_normalisation = LossNormalisation::PerToken;
        weighted.laid_out = false;
        all.push(weighted);
    }
    Ok(all)
}

/// A run by its settings; step s takes micro-batches `k s`, `k s + 1`, .. of `k` to a step.
fn part_of(lead: &'static str, settings: &Value, accumulation: &str) -> Outcome<Series> {
    let steps: usize = setting(settings, "steps")?;
    let accumulation: usize = setting(settings, accumulation)?;
    let (schedule, warmup) = schedule(&setting::<String>(settings, "schedule")?)?;
    if let Some(said) = settings["warmup_steps"]
        .as_u64()
        .filter(|&said| said != warmup)
    {
        return Err(format!("{said} steps of warm-up, or {warmup}").into());
    }
    let one_group = match (&settings["no_decay"], settings["optimizer"].as_str()) {
        (Value::String(words), _) if words == "parameters with 'bias' in the name" => false,
        (Value::Null, None | Some("torch.optim.AdamW, one parameter group")) => true,
        (words, optimizer) => {
            return Err(format!("weight decay by {words} in {optimizer:?} is not known").into());
        }
    };
    Ok(Series {
        lead,
        optimizer: OptimizerSection {
            max_grad_norm: clip(&settings["clip"])?,
            ..optimizer(settings, schedule, warmup)?
        },
        total_steps: steps as u64,
        index: (0..steps)
            .map(|step| (step * accumulation..(step + 1) * accumulation).collect())
            .collect(),
        one_group,
        laid_out: accumulation > 1,
    })
}

/// What all runs say alike; the Trainer of the reference averages the means of micro-batches.
fn optimizer(
    settings: &Value,
    lr_schedule: LrSchedule,
    warmup_steps: u64,
) -> Outcome<OptimizerSection> {
    // The Trainer's own where the run is in its style and does not say.
    let silent = |key: &str| settings["no_decay"].is_string() && settings[key].is_null();
    let [beta1, beta2] = match silent("betas") {
        true => [0.9, 0.999],
        false => setting(settings, "betas")?,
    };
    let eps = match silent("eps") {
        true => 1e-8,
        false => setting(settings, "eps")?,
    };
    Ok(OptimizerSection {
        learning_rate: setting(settings, "lr")?,
        lr_schedule,
        warmup_steps,
        weight_decay: setting(settings, "weight_decay")?,
        beta1,
        beta2,
        eps,
        max_grad_norm: 0.0,
        loss_normalisation: LossNormalisation::PerMicroBatch,
        initial_loss_scale: 65_536.0,
        max_skipped_steps: 1,
    })
}

/// The curve and the steps of warm-up, from the manifest's words for them.
fn schedule(words: &str) -> Outcome<(LrSchedule, u64)> {
    // "(step s uses ..)" explains what stands before it.
    let (words, _) = words.split_once(" (").unwrap_or((words, ""));
    let number = |text: &str| text.parse::<u64>().ok();
    let cosine = words.strip_prefix("linear warm-up over ");
    let cosine = cosine.and_then(|rest| rest.strip_suffix(" steps from 0, then half cosine to 0"));
    let linear = words.strip_prefix("warm-up ");
    let linear = linear.and_then(|rest| rest.strip_suffix(" steps, then linear to 0"));
    match (words, cosine.and_then(number), linear.and_then(number)) {
        (_, Some(warmup), _) => Ok((LrSchedule::Cosine, warmup)),
        (_, _, Some(warmup)) => Ok((LrSchedule::Linear, warmup)),
        ("linear to 0, no warm-up", ..) => Ok((LrSchedule::Linear, 0)),
        ("constant", ..) => Ok((LrSchedule::Constant, 0)),
        _ => Err(format!("the schedule `{words}` is not known").into()),
    }
}

/// The norm to clip to: a number, a sentence that begins with one, or nothing; 0 is no clipping.
fn clip(said: &Value) -> Outcome<f32> {
    let unknown = || format!("clipping by {said} is not known");
    match said {
        Value::Null => Ok(0.0),
        Value::Number(norm) => Ok(norm.as_f64().ok_or_else(unknown)? as f32),
        Value::String(words) => {
            let rest = words.strip_prefix("global norm ").ok_or_else(unknown)?;
            let (norm, rule) = rest.split_once(": ").ok_or_else(unknown)?;
            match rule == "gradients times min(1, 1/(norm+1e-6))" {
                true => Ok(norm.parse()?),
                false => Err(unknown().into()),
            }
        }
        _ => Err(unknown().into()),
    }
}
