//! Defaults and checks, key by key.

use std::path::PathBuf;

use super::byte_size::ByteSize;
use super::error::ConfigError;
use super::layers::{Layers, setting};
use super::paths::Paths;
use super::raw::AdapterKind;
use super::run::{
    AdapterSection, BadRowPolicy, DataSection, Device, FullSection, LoraSection, LossNormalisation,
    LrSchedule, ModelSection, OptimizerSection, PipelineSection, Precision, PrefixSection,
    ProductSums, Quantization, Recompute, Resume, RunConfig, RunSection, STALL_TIMEOUT,
    ScheduleKind, TemplateKind, TrainedTurns, TransportKind,
};
use super::setting::{Setting, Value};

/// Upper bounds far beyond any use, so that no product of two settings overflows.
const MAX_STEPS: u64 = 1_000_000_000_000;
const MAX_COUNT: usize = 1_000_000;
const MAX_RANK: usize = 65_536;
const MAX_STAGES: usize = 1_024;
/// The same at any number of stages, so that a run means the same on all of them and can go on there;
/// with m micro-batches over p stages the bubble is (p - 1) / (m + p - 1), 11 % for two.
const GRADIENT_ACCUMULATION: usize = 8;
/// TOML has no greater integers, and the resolved configuration is saved as TOML.
const MAX_INTEGER: u64 = i64::MAX as u64;

pub(super) fn resolve(typed: &Layers) -> Result<RunConfig, ConfigError> {
    // What depends on another section comes after it: the number of stages, the kind, the steps.
    let pipeline = pipeline(typed)?;
    let adapter = adapter(typed)?;
    let model = model(typed, &pipeline.devices, &adapter)?;
    let data = data(typed)?;
    let run = run(typed)?;
    let optimizer = optimizer(typed, &adapter, run.max_steps)?;
    Ok(RunConfig {
        model,
        adapter,
        data,
        optimizer,
        pipeline,
        run,
    })
}

fn model(
    typed: &Layers,
    devices: &[Device],
    adapter: &AdapterSection,
) -> Result<ModelSection, ConfigError> {
    let precision = setting!(typed, model.precision)
        .or(default_precision(devices))
        .any();
    Ok(ModelSection {
        path: path(setting!(typed, model.path).required("\"models/chatglm-6b\"")?)?,
        precision,
        quantization: setting!(typed, model.quantization)
            .or(Quantization::None)
            .check(
                "none with adapter.kind = \"full\": weights that are trained are not quantised",
                |quantization| {
                    *quantization == Quantization::None
                        || !matches!(adapter, AdapterSection::Full(_))
                },
            )?,
        rotary_table: setting!(typed, model.rotary_table)
            .or(precision.rotary_table())
            .any(),
        product_sums: product_sums(
            setting!(typed, model.product_sums),
            precision,
            devices,
            adapter,
        )?,
    })
}

/// f16 where it means anything: products of halves on GPUs, with weights that are frozen.
fn product_sums(
    given: Setting<ProductSums>,
    precision: Precision,
    devices: &[Device],
    adapter: &AdapterSection,
) -> Result<ProductSums, ConfigError> {
    let value = given.or(ProductSums::F32);
    if value.value == ProductSums::F32 {
        return Ok(value.any());
    }
    let (on_gpus, frozen) = (
        precision == Precision::F16 && !devices.contains(&Device::Cpu),
        !matches!(adapter, AdapterSection::Full(_)),
    );
    let allowed = match on_gpus {
        false => "f32 on the CPU and with precision = \"f32\": only GPUs sum in f16",
        true => "f32 with adapter.kind = \"full\": sums in f16 are for weights that are frozen",
    };
    value.check(allowed, |_| on_gpus && frozen)
}

/// f32 where the CPU computes, f16 where all stages are GPUs.
pub(super) fn default_precision(devices: &[Device]) -> Precision {
    match devices.contains(&Device::Cpu) {
        true => Precision::F32,
        false => Precision::F16,
    }
}

fn adapter(typed: &Layers) -> Result<AdapterSection, ConfigError> {
    let kind = setting!(typed, adapter.kind).or(AdapterKind::Lora).any();
    let name = match kind {
        AdapterKind::Lora => "\"lora\"",
        AdapterKind::Prefix => "\"prefix\"",
        AdapterKind::Full => "\"full\"",
    };
    let r = setting!(typed, adapter.r);
    let lora_alpha = setting!(typed, adapter.lora_alpha);
    let lora_dropout = setting!(typed, adapter.lora_dropout);
    let target_modules = setting!(typed, adapter.target_modules);
    let pre_seq_len = setting!(typed, adapter.pre_seq_len);
    let prefix_projection = setting!(typed, adapter.prefix_projection);
    let prefix_dropout = setting!(typed, adapter.prefix_dropout);
    let init_adapter = setting!(typed, adapter.init_adapter);
    if kind != AdapterKind::Lora {
        r.not_with(name, "\"lora\"")?;
        lora_alpha.not_with(name, "\"lora\"")?;
        lora_dropout.not_with(name, "\"lora\"")?;
        target_modules.not_with(name, "\"lora\"")?;
    }
    if kind != AdapterKind::Prefix {
        pre_seq_len.not_with(name, "\"prefix\"")?;
        prefix_projection.not_with(name, "\"prefix\"")?;
        prefix_dropout.not_with(name, "\"prefix\"")?;
    }
    if kind == AdapterKind::Full {
        init_adapter.not_with(name, "\"lora\" or \"prefix\"")?;
    }
    let init_adapter = init_adapter.typed.map(path).transpose()?;
    Ok(match kind {
        AdapterKind::Lora => AdapterSection::Lora(LoraSection {
            r: r.or(8).between(1, MAX_RANK)?,
            lora_alpha: lora_alpha.or(32.0).above_zero()?,
            lora_dropout: lora_dropout.or(0.0).below_one()?,
            target_modules: target_modules
                .or(vec!["query_key_value".to_owned()])
                .check(
                    "a list of linear layers, each once, such as [\"query_key_value\", \"dense\"]",
                    |names| are_module_names(names),
                )?,
            init_adapter,
        }),
        AdapterKind::Prefix => AdapterSection::Prefix(PrefixSection {
            pre_seq_len: pre_seq_len.or(128).between(1, MAX_RANK)?,
            prefix_projection: prefix_projection.or(false).any(),
            prefix_dropout: prefix_dropout.or(0.1).below_one()?,
            init_adapter,
        }),
        AdapterKind::Full => AdapterSection::Full(FullSection {}),
    })
}

/// Names by their form; whether the model has such layers is known when the model is.
fn are_module_names(names: &[String]) -> bool {
    let is_name = |name: &String| {
        !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
    };
    let is_first = |i: usize| !names[..i].contains(&names[i]);
    !names.is_empty() && names.iter().all(is_name) && (0..names.len()).all(is_first)
}

fn data(typed: &Layers) -> Result<DataSection, ConfigError> {
    let column = |setting: Setting<String>| setting.typed.map(Value::any);
    let some_paths = |paths: &Paths| {
        !paths.0.is_empty() && paths.0.iter().all(|path| !path.as_os_str().is_empty())
    };
    let template = setting!(typed, data.template)
        .or(TemplateKind::Alpaca)
        .any();
    let is_list = matches!(template, TemplateKind::Messages | TemplateKind::ShareGpt);
    let max_source_length = setting!(typed, data.max_source_length)
        .or(512)
        .between(2, MAX_COUNT)?;
    let max_target_length = setting!(typed, data.max_target_length)
        .or(512)
        .between(3, MAX_COUNT)?;
    Ok(DataSection {
        train: setting!(typed, data.train)
            .required("\"data/train.jsonl\"")?
            .check("a path or a list of paths", some_paths)?,
        shuffle: setting!(typed, data.shuffle).or(true).any(),
        validation: setting!(typed, data.validation)
            .or(Paths::default())
            .check("a path or a list of paths", |paths| {
                paths.0.is_empty() || some_paths(paths)
            })?,
        validation_split: setting!(typed, data.validation_split).or(0.0).below_one()?,
        template,
        prompt_column: column(setting!(typed, data.prompt_column)),
        input_column: column(setting!(typed, data.input_column)),
        response_column: column(setting!(typed, data.response_column)),
        history_column: column(setting!(typed, data.history_column)),
        round_for_empty_history: setting!(typed, data.round_for_empty_history)
            .or(false)
            .any(),
        messages_column: column(setting!(typed, data.messages_column)),
        role_key: column(setting!(typed, data.role_key)),
        content_key: column(setting!(typed, data.content_key)),
        system_column: column(setting!(typed, data.system_column)),
        train_on_turns: setting!(typed, data.train_on_turns)
            .or(match is_list {
                true => TrainedTurns::All,
                false => TrainedTurns::Last,
            })
            .any(),
        source_prefix: setting!(typed, data.source_prefix).or(String::new()).any(),
        max_source_length,
        max_target_length,
        max_length: setting!(typed, data.max_length)
            .or(max_source_length + max_target_length)
            .between(4, 2 * MAX_COUNT)?,
        parse_special: setting!(typed, data.parse_special).or(false).any(),
        bad_rows: setting!(typed, data.bad_rows).or(BadRowPolicy::Fatal).any(),
        bucket_by_length: setting!(typed, data.bucket_by_length).or(false).any(),
        cache: setting!(typed, data.cache).typed.map(path).transpose()?,
    })
}

fn optimizer(
    typed: &Layers,
    adapter: &AdapterSection,
    max_steps: Option<u64>,
) -> Result<OptimizerSection, ConfigError> {
    let learning_rate = match adapter {
        AdapterSection::Lora(_) => 1e-4,
        AdapterSection::Prefix(_) => 2e-2,
        AdapterSection::Full(_) => 1e-5,
    };
    Ok(OptimizerSection {
        learning_rate: setting!(typed, optimizer.learning_rate)
            .or(learning_rate)
            .above_zero()?,
        lr_schedule: setting!(typed, optimizer.lr_schedule)
            .or(LrSchedule::Linear)
            .any(),
        warmup_steps: warmup_steps(setting!(typed, optimizer.warmup_steps).or(0), max_steps)?,
        weight_decay: setting!(typed, optimizer.weight_decay)
            .or(0.0)
            .not_negative()?,
        beta1: setting!(typed, optimizer.beta1).or(0.9).below_one()?,
        beta2: setting!(typed, optimizer.beta2).or(0.999).below_one()?,
        eps: setting!(typed, optimizer.eps).or(1e-8).above_zero()?,
        max_grad_norm: setting!(typed, optimizer.max_grad_norm)
            .or(1.0)
            .not_negative()?,
        loss_normalisation: setting!(typed, optimizer.loss_normalisation)
            .or(LossNormalisation::PerToken)
            .any(),
        initial_loss_scale: setting!(typed, optimizer.initial_loss_scale)
            .or(65_536.0)
            .check("a power of two, 1 or more, such as 65536", |scale| {
                *scale >= 1.0 && scale.is_finite() && scale.log2().fract() == 0.0
            })?,
        max_skipped_steps: setting!(typed, optimizer.max_skipped_steps)
            .or(20)
            .between(1, 1_000_000)?,
    })
}

fn warmup_steps(value: Value<u64>, max_steps: Option<u64>) -> Result<u64, ConfigError> {
    match max_steps {
        Some(max_steps) => value.check(
            format!("at most run.max_steps, which is {max_steps}"),
            |steps| *steps <= max_steps,
        ),
        None => value.between(0, MAX_STEPS),
    }
}

fn pipeline(typed: &Layers) -> Result<PipelineSection, ConfigError> {
    let devices = setting!(typed, pipeline.devices)
        .or(vec![Device::Cpu])
        .check(
            format!("a list of 1 to {MAX_STAGES} devices, such as [\"cpu\", \"cpu\"]"),
            |devices| (1..=MAX_STAGES).contains(&devices.len()),
        )?;
    let stages = devices.len();
    let balance = setting!(typed, pipeline.balance).typed.map(|balance| {
        balance.check(
            format!("one number of blocks, 1 or more, for each of the {stages} devices"),
            |blocks| blocks.len() == stages && blocks.iter().all(|n| (1..=MAX_COUNT).contains(n)),
        )
    });
    let memory = setting!(typed, pipeline.memory_per_device)
        .typed
        .map(|memory| {
            memory.check("1 MiB or more", |bytes| {
                (1 << 20..=MAX_INTEGER).contains(&bytes.0)
            })
        });
    let schedule = setting!(typed, pipeline.schedule)
        .or(ScheduleKind::OneForwardOneBackward)
        .any();
    Ok(PipelineSection {
        balance: balance.transpose()?,
        virtual_stages: virtual_stages(setting!(typed, pipeline.virtual_stages), schedule)?,
        schedule,
        recompute: setting!(typed, pipeline.recompute)
            .or(Recompute::Auto)
            .any(),
        threads: setting!(typed, pipeline.threads)
            .or(default_threads())
            .between(1, 4_096)?,
        memory_per_device: memory.transpose()?.map(|ByteSize(bytes)| bytes),
        transport: setting!(typed, pipeline.transport)
            .or(TransportKind::Auto)
            .any(),
        stall_timeout: setting!(typed, pipeline.stall_timeout)
            .or(STALL_TIMEOUT)
            .between(1, 86_400)?,
        devices,
    })
}

/// Two parts per stage halve the bubble; with one, interleaved is 1f1b.
fn virtual_stages(given: Setting<usize>, schedule: ScheduleKind) -> Result<usize, ConfigError> {
    let interleaved = schedule == ScheduleKind::Interleaved;
    given.or(if interleaved { 2 } else { 1 }).check(
        "1 or more, and 1 unless pipeline.schedule is \"interleaved\"",
        |count| (1..=MAX_COUNT).contains(count) && (interleaved || *count == 1),
    )
}

/// As many threads as the system says this process may run at once.
pub(super) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(4_096))
}

fn run(typed: &Layers) -> Result<RunSection, ConfigError> {
    let epochs = setting!(typed, run.epochs).typed;
    let max_steps = setting!(typed, run.max_steps);
    let (max_steps, epochs) = match epochs {
        Some(epochs) => {
            let alone = max_steps.typed.is_none();
            let allowed = "1 or more, and run.max_steps left out";
            let epochs = epochs.check(allowed, |n| alone && (1..=MAX_STEPS).contains(n))?;
            (None, Some(epochs))
        }
        None => (
            Some(max_steps.required("1000")?.between(1, MAX_STEPS)?),
            None,
        ),
    };
    Ok(RunSection {
        output: path(setting!(typed, run.output).or("output".into()))?,
        max_steps,
        epochs,
        micro_batch_size: setting!(typed, run.micro_batch_size)
            .or(1)
            .between(1, MAX_COUNT)?,
        micro_batch_tokens: setting!(typed, run.micro_batch_tokens)
            .typed
            .map(|tokens| tokens.between(1, MAX_COUNT))
            .transpose()?,
        gradient_accumulation: setting!(typed, run.gradient_accumulation)
            .or(GRADIENT_ACCUMULATION)
            .between(1, MAX_COUNT)?,
        save_steps: setting!(typed, run.save_steps)
            .or(0)
            .between(0, MAX_STEPS)?,
        save_total_limit: setting!(typed, run.save_total_limit)
            .or(3)
            .between(0, MAX_COUNT)?,
        seed: setting!(typed, run.seed).or(42).between(0, MAX_INTEGER)?,
        resume: setting!(typed, run.resume).or(Resume::No).check(
            "no, latest or a checkpoint folder",
            |resume| match resume {
                Resume::From(path) => !path.as_os_str().is_empty(),
                Resume::No | Resume::Latest => true,
            },
        )?,
        eval_steps: setting!(typed, run.eval_steps)
            .or(0)
            .between(0, MAX_STEPS)?,
        log_steps: setting!(typed, run.log_steps).or(1).between(1, MAX_STEPS)?,
    })
}

fn path(value: Value<PathBuf>) -> Result<PathBuf, ConfigError> {
    value.check("a path", |path| !path.as_os_str().is_empty())
}
