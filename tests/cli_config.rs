//! Configuration, model config and metrics: what is accepted, what is refused and in which words.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clap::Parser;
use mp_train::config::error::ConfigError;
use mp_train::config::file::ConfigFile;
use mp_train::config::layers::Layers;
use mp_train::config::model::ModelConfig;
use mp_train::config::raw::RawConfig;
use mp_train::config::run::{
    AdapterSection, Device, LossNormalisation, LrSchedule, Precision, ProductSums, Quantization,
    Recompute, Resume, RunConfig, ScheduleKind,
};
use mp_train::report::StepReport;
use mp_train::report::metrics::{Metrics, STEPS};

#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Flags {
    #[command(flatten)]
    raw: RawConfig,
}

const REQUIRED: &str = "\
[model]
path = \"m\"
[data]
train = \"rows.jsonl\"
[run]
max_steps = 30
";

/// What `toml` (a file called run.toml) and `flags` mean together.
fn resolve(toml: &str, flags: &[&str]) -> Result<RunConfig, ConfigError> {
    let flags = Flags::try_parse_from([&["test"], flags].concat())
        .unwrap()
        .raw;
    let file = Some(ConfigFile::parse(Path::new("run.toml"), toml)?);
    Layers { flags, file }.resolve()
}

/// `REQUIRED` with `line` put under `[section]`; the line is then line 2 of the file.
fn with(section: &str, line: &str) -> String {
    let header = format!("[{section}]\n");
    match REQUIRED.contains(&header) {
        true => {
            let (before, after) = REQUIRED.split_once(&header).unwrap();
            format!("{header}{line}\n{}{before}", after.replacen('[', "\n[", 1))
        }
        false => format!("{header}{line}\n{REQUIRED}"),
    }
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = resolve(REQUIRED, &[]).unwrap();
    assert_eq!(config.model.path, PathBuf::from("m"));
    assert_eq!(config.model.precision, Precision::F32);
    let AdapterSection::Lora(lora) = &config.adapter else {
        unreachable!("lora is the default")
    };
    assert_eq!((lora.r, lora.lora_alpha, lora.lora_dropout), (8, 32.0, 0.0));
    assert_eq!(lora.target_modules, ["query_key_value"]);
    assert_eq!(lora.init_adapter, None);
    assert!(config.data.shuffle);
    let optimizer = &config.optimizer;
    assert_eq!(optimizer.learning_rate, 1e-4);
    assert_eq!(optimizer.lr_schedule, LrSchedule::Linear);
    assert_eq!((optimizer.warmup_steps, optimizer.weight_decay), (0, 0.0));
    assert_eq!(
        (optimizer.beta1, optimizer.beta2, optimizer.eps),
        (0.9, 0.999, 1e-8)
    );
    assert_eq!(
        (optimizer.max_grad_norm, optimizer.max_skipped_steps),
        (1.0, 20)
    );
    assert_eq!(optimizer.loss_normalisation, LossNormalisation::PerToken);
    assert_eq!(config.pipeline.devices, [Device::Cpu]);
    assert_eq!(config.pipeline.balance, None);
    assert_eq!(
        config.pipeline.schedule,
        ScheduleKind::OneForwardOneBackward
    );
    assert_eq!(config.pipeline.recompute, Recompute::Auto);
    assert_eq!(
        config.pipeline.threads,
        std::thread::available_parallelism().unwrap().get()
    );
    assert_eq!(config.run.output, PathBuf::from("output"));
    assert_eq!(
        (
            config.run.micro_batch_size,
            config.run.gradient_accumulation
        ),
        (1, 8)
    );
    assert_eq!((config.run.save_steps, config.run.save_total_limit), (0, 3));
    assert_eq!((config.run.seed, config.run.log_steps), (42, 1));
    assert_eq!(config.run.resume, Resume::No);
}

#[test]
fn defaults_follow_kind_and_devices() {
    let prefix = resolve(REQUIRED, &["--kind", "prefix"]).unwrap();
    let AdapterSection::Prefix(section) = &prefix.adapter else {
        unreachable!("asked for")
    };
    assert_eq!(
        (section.pre_seq_len, section.prefix_projection),
        (128, false)
    );
    assert_eq!(section.prefix_dropout, 0.1);
    assert_eq!(prefix.optimizer.learning_rate, 2e-2);
    let full = resolve(REQUIRED, &["--kind", "full", "--devices", "cpu,cpu,cpu"]).unwrap();
    assert_eq!(full.optimizer.learning_rate, 1e-5);
    assert_eq!(full.run.gradient_accumulation, 8);
    let cuda = resolve(&with("pipeline", "devices = [0, \"1\"]"), &[]).unwrap();
    assert_eq!(cuda.pipeline.devices, [Device::Cuda(0), Device::Cuda(1)]);
    assert_eq!(cuda.model.precision, Precision::F16);
}

#[test]
fn sums_in_f16_are_for_frozen_weights_on_gpus() {
    let sums = |flags: &[&str]| {
        let asked = ["--product-sums", "f16"];
        resolve(REQUIRED, &[&asked, flags].concat()).map(|config| config.model.product_sums)
    };
    assert_eq!(
        resolve(REQUIRED, &["--devices", "0"])
            .unwrap()
            .model
            .product_sums,
        ProductSums::F32
    );
    for kind in ["lora", "prefix"] {
        let sums = sums(&["--devices", "0,1", "--kind", kind]).unwrap();
        assert_eq!(sums, ProductSums::F16);
    }
    for (flags, word) in [
        (&["--devices", "cpu"][..], "on the CPU"),
        (&["--devices", "cpu", "--precision", "f16"], "on the CPU"),
        (
            &["--devices", "0", "--precision", "f32"],
            "precision = \"f32\"",
        ),
        (
            &["--devices", "0", "--kind", "full"],
            "adapter.kind = \"full\"",
        ),
    ] {
        let error = sums(flags).unwrap_err().to_string();
        assert!(
            error.contains("--product-sums \"f16\": must be f32"),
            "{error}"
        );
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn flags_override_the_file() {
    let file = with("optimizer", "learning_rate = 1\nlr_schedule = \"cosine\"");
    let flags = [
        "--lr",
        "3e-5",
        "--max-steps",
        "7",
        "--model",
        "other",
        "--balance",
        "3,4",
    ];
    let more = [
        "--devices",
        "cpu,cpu",
        "--shuffle",
        "false",
        "--memory-per-device",
        "2GiB",
    ];
    let config = resolve(&file, &[&flags[..], &more[..]].concat()).unwrap();
    assert_eq!(config.optimizer.learning_rate, 3e-5);
    assert_eq!(config.optimizer.lr_schedule, LrSchedule::Cosine);
    assert_eq!(config.run.max_steps, Some(7));
    assert_eq!(config.model.path, PathBuf::from("other"));
    assert_eq!(config.pipeline.balance, Some(vec![3, 4]));
    assert!(!config.data.shuffle);
    assert_eq!(config.pipeline.memory_per_device, Some(2 << 30));
    // A flag also replaces a value in the file that would be refused.
    let wrong = with("optimizer", "learning_rate = -1");
    assert!(resolve(&wrong, &[]).is_err());
    assert!(resolve(&wrong, &["--lr", "1e-3"]).is_ok());
}

#[test]
fn resume_has_three_forms() {
    for (flags, expected) in [
        (&["--resume"][..], Resume::Latest),
        (
            &["--resume", "output/checkpoint-5"],
            Resume::From("output/checkpoint-5".into()),
        ),
        (&[], Resume::No),
    ] {
        assert_eq!(resolve(REQUIRED, flags).unwrap().run.resume, expected);
    }
    let file = with("run", "resume = \"latest\"");
    assert_eq!(resolve(&file, &[]).unwrap().run.resume, Resume::Latest);
    assert_eq!(
        resolve(&file, &["--resume", "no"]).unwrap().run.resume,
        Resume::No
    );
}

#[test]
fn wrong_files_are_refused_in_words() {
    let cases: &[(&str, &str, &str)] = &[
        (
            "optimizer",
            "leraning_rate = 1e-4",
            "run.toml:2: [optimizer] has no key `leraning_rate`; did you mean `learning_rate`?",
        ),
        (
            "adapter",
            "learning_rate = 1e-4",
            "run.toml:2: [adapter] has no key `learning_rate`; it belongs under [optimizer]",
        ),
        (
            "adapter",
            "bananas = 1",
            "run.toml:2: [adapter] has no key `bananas`; it has kind, r, lora_alpha",
        ),
        (
            "optimiser",
            "eps = 1",
            "run.toml:1: there is no section [optimiser]; did you mean [optimizer]?",
        ),
        (
            "zoo",
            "eps = 1",
            "there is no section [zoo]; there are [model] [adapter] [data]",
        ),
        (
            "optimizer",
            "learning_rate = -1e-4",
            "run.toml:2: [optimizer] learning_rate = -1e-4: must be a finite number above 0",
        ),
        (
            "optimizer",
            "learning_rate = 0",
            "learning_rate = 0: must be a finite number above 0",
        ),
        (
            "optimizer",
            "learning_rate = nan",
            "learning_rate = nan: must be a finite number above 0",
        ),
        (
            "optimizer",
            "learning_rate = inf",
            "learning_rate = inf: must be a finite number above 0",
        ),
        (
            "optimizer",
            "learning_rate = \"1e-4\"",
            "[optimizer] learning_rate = \"1e-4\": invalid type: string \"1e-4\", expected a number",
        ),
        (
            "optimizer",
            "lr_schedule = \"cosin\"",
            "[optimizer] lr_schedule = \"cosin\": unknown variant `cosin`, expected one of `constant`, `linear`, `cosine`",
        ),
        (
            "optimizer",
            "warmup_steps = 31",
            "warmup_steps = 31: must be at most run.max_steps, which is 30",
        ),
        (
            "optimizer",
            "warmup_steps = -1",
            "warmup_steps = -1: invalid value: integer `-1`, expected a whole number, 0 or more",
        ),
        (
            "optimizer",
            "weight_decay = -0.1",
            "weight_decay = -0.1: must be a finite number, 0 or more",
        ),
        (
            "optimizer",
            "weight_decay = nan",
            "weight_decay = nan: must be a finite number, 0 or more",
        ),
        (
            "optimizer",
            "beta1 = 1.0",
            "beta1 = 1.0: must be a number from 0 to below 1",
        ),
        (
            "optimizer",
            "beta2 = nan",
            "beta2 = nan: must be a number from 0 to below 1",
        ),
        (
            "optimizer",
            "eps = 0.0",
            "eps = 0.0: must be a finite number above 0",
        ),
        (
            "optimizer",
            "eps = 1e-60",
            "eps = 1e-60: must be a finite number above 0",
        ),
        (
            "optimizer",
            "max_grad_norm = -1",
            "max_grad_norm = -1: must be a finite number, 0 or more",
        ),
        (
            "optimizer",
            "max_skipped_steps = 0",
            "max_skipped_steps = 0: must be from 1 to",
        ),
        (
            "adapter",
            "r = 0",
            "run.toml:2: [adapter] r = 0: must be from 1 to 65536",
        ),
        (
            "adapter",
            "r = 8.5",
            "r = 8.5: invalid type: floating point `8.5`, expected a whole number, 0 or more",
        ),
        (
            "adapter",
            "lora_alpha = 1e39",
            "lora_alpha = 1e39: must be a finite number above 0",
        ),
        (
            "adapter",
            "lora_dropout = 1.0",
            "lora_dropout = 1.0: must be a number from 0 to below 1",
        ),
        (
            "adapter",
            "target_modules = []",
            "target_modules = []: must be a list of linear layers, each once",
        ),
        (
            "adapter",
            "target_modules = [\"dense\", \"dense\"]",
            "must be a list of linear layers, each once",
        ),
        (
            "adapter",
            "target_modules = [\"a b\"]",
            "target_modules = [\"a b\"]: must be a list of linear layers",
        ),
        (
            "adapter",
            "target_modules = \"dense\"",
            "expected a list such as",
        ),
        (
            "adapter",
            "kind = \"prefix\"\nr = 8",
            "run.toml:3: [adapter] r = 8: this key belongs to kind \"lora\", but adapter.kind is \"prefix\"",
        ),
        (
            "adapter",
            "pre_seq_len = 8",
            "this key belongs to kind \"prefix\", but adapter.kind is \"lora\"",
        ),
        (
            "adapter",
            "kind = \"full\"\ninit_adapter = \"a\"",
            "belongs to kind \"lora\" or \"prefix\", but adapter.kind is \"full\"",
        ),
        (
            "adapter",
            "kind = \"prefix\"\npre_seq_len = 0",
            "pre_seq_len = 0: must be from 1 to",
        ),
        (
            "adapter",
            "kind = \"prefix\"\nprefix_dropout = -0.1",
            "prefix_dropout = -0.1: must be a number from 0 to below 1",
        ),
        (
            "pipeline",
            "devices = []",
            "devices = []: must be a list of 1 to 1024 devices",
        ),
        (
            "pipeline",
            "devices = [\"gpu\"]",
            "run.toml:2: [pipeline] devices = [\"gpu\"]: `gpu` is no device: use `cpu` or a CUDA device number",
        ),
        ("pipeline", "devices = [-1]", "`-1` is no device"),
        (
            "pipeline",
            "balance = [1, 2]",
            "balance = [1, 2]: must be one number of blocks, 1 or more, for each of the 1 devices",
        ),
        (
            "pipeline",
            "balance = [0]",
            "balance = [0]: must be one number of blocks, 1 or more",
        ),
        (
            "pipeline",
            "threads = 0",
            "threads = 0: must be from 1 to 4096",
        ),
        (
            "pipeline",
            "memory_per_device = \"12 bananas\"",
            "expected bytes such as 12GiB or 800MB, found `12 bananas`",
        ),
        (
            "pipeline",
            "memory_per_device = 5",
            "memory_per_device = 5: must be 1 MiB or more",
        ),
        (
            "run",
            "micro_batch_size = 0",
            "micro_batch_size = 0: must be from 1 to",
        ),
        (
            "run",
            "gradient_accumulation = 0",
            "gradient_accumulation = 0: must be from 1 to",
        ),
        ("run", "log_steps = 0", "log_steps = 0: must be from 1 to"),
        ("run", "seed = 99999999999999999999", "run.toml:2: "),
        ("run", "output = \"\"", "output = \"\": must be a path"),
        (
            "run",
            "resume = \"\"",
            "resume = \"\": must be no, latest or a checkpoint folder",
        ),
        (
            "data",
            "shuffle = 1",
            "shuffle = 1: invalid type: integer `1`, expected true or false",
        ),
        (
            "model",
            "precision = \"bf16\"",
            "precision = \"bf16\": unknown variant `bf16`, expected `f32` or `f16`",
        ),
        ("model", "precision = ", "run.toml:2: "),
        ("adapter", "r = 8\nr = 9", "run.toml:3: duplicate key"),
    ];
    for (section, line, message) in cases {
        let error = resolve(&with(section, line), &[]).unwrap_err().to_string();
        assert!(
            error.contains(message),
            "[{section}] {line}\n  gave   {error}\n  wanted {message}"
        );
        assert!(error.starts_with("run.toml:"), "{error}");
    }
    for (text, message) in [
        (
            "model = \"m\"",
            "run.toml:1: `model` is a section: write [model] on a line of its own",
        ),
        (
            "\nmax_steps = 3",
            "run.toml:2: `max_steps` belongs under [run]",
        ),
        (
            "",
            "model.path is not set: give --model \"models/chatglm-6b\", or `path = \"models/chatglm-6b\"` under [model]",
        ),
        (
            "[model]\npath = \"m\"\n[run]\nmax_steps = 3",
            "data.train is not set: give --train",
        ),
        (
            "[model]\npath = \"m\"\n[data]\ntrain = \"t\"",
            "run.max_steps is not set: give --max-steps 1000, or `max_steps = 1000` under [run]",
        ),
    ] {
        let error = resolve(text, &[]).unwrap_err().to_string();
        assert!(
            error.contains(message),
            "{text}\n  gave   {error}\n  wanted {message}"
        );
    }
}

#[test]
fn wrong_flags_are_refused_by_name() {
    for (flags, message) in [
        (
            &["--lr", "-1"][..],
            "--learning-rate -1.0: must be a finite number above 0",
        ),
        (&["--lr", "nan"], "--learning-rate nan: must be"),
        (
            &["--balance", "1,2"],
            "--balance [1, 2]: must be one number of blocks",
        ),
        (
            &["--target-modules", ""],
            "--target-modules [\"\"]: must be a list of linear layers",
        ),
        (
            &["--pre-seq-len", "4"],
            "--pre-seq-len 4: this key belongs to kind \"prefix\"",
        ),
        (
            &["--seed", "18446744073709551615"],
            "--seed 18446744073709551615: must be from 0 to",
        ),
        (&["--max-steps", "0"], "--max-steps 0: must be from 1 to"),
        (
            &["--max-steps", "3", "--warmup-steps", "4"],
            "--warmup-steps 4: must be at most",
        ),
    ] {
        let error = resolve(REQUIRED, flags).unwrap_err().to_string();
        assert!(
            error.contains(message),
            "{flags:?}\n  gave   {error}\n  wanted {message}"
        );
    }
    for (flags, message) in [
        (
            ["--r", "abc"],
            "invalid value 'abc' for '--r <N>': expected a whole number, 0 or more",
        ),
        (["--eps", "x"], "'--eps <X>': expected a number"),
        (
            ["--devices", "cpu,gpu"],
            "`gpu` is no device: use `cpu` or a CUDA device number",
        ),
        (["--kind", "qlora"], "invalid value 'qlora'"),
        (
            ["--memory-per-device", "lots"],
            "expected bytes such as 12GiB",
        ),
    ] {
        let error = Flags::try_parse_from([&["test"], &flags[..]].concat())
            .err()
            .unwrap();
        assert!(
            error.to_string().contains(message),
            "{flags:?} gave {error}"
        );
    }
}

#[test]
fn printed_configurations_read_back_the_same() {
    for flags in [
        &[][..],
        &[
            "--lr",
            "1.2345678901234567e-4",
            "--lora-alpha",
            "0.1",
            "--eps",
            "1.1e-7",
        ],
        &[
            "--kind",
            "prefix",
            "--prefix-dropout",
            "0.3",
            "--prefix-projection",
            "true",
        ],
        &[
            "--kind",
            "full",
            "--resume",
            "output/checkpoint-7",
            "--seed",
            "9223372036854775807",
        ],
        &[
            "--devices",
            "cpu,cpu",
            "--balance",
            "1,3",
            "--memory-per-device",
            "3GB",
            "--resume",
        ],
        &["--kind", "prefix", "--quantization", "int4"],
        &[
            "--devices",
            "0,1",
            "--schedule",
            "gpipe",
            "--recompute",
            "attention_free",
        ],
        &[
            "--output",
            "with \"quotes\" and \\ and \n a line",
            "--init-adapter",
            "ä/b",
        ],
    ] {
        let config = resolve(REQUIRED, flags).unwrap();
        let printed = config.to_toml().unwrap();
        assert_eq!(resolve(&printed, &[]).unwrap(), config, "{printed}");
        assert_eq!(
            toml::from_str::<RunConfig>(&printed).unwrap(),
            config,
            "{printed}"
        );
    }
}

#[test]
fn the_golden_configuration_resolves() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/lora-golden.toml");
    let config = RunConfig::from_file(&path).unwrap();
    assert_eq!(config.pipeline.devices, [Device::Cpu; 3]);
    assert_eq!(config.run.max_steps, Some(30));
    assert_eq!(
        config.optimizer.loss_normalisation,
        LossNormalisation::PerMicroBatch
    );
}

#[test]
fn every_configuration_that_is_shipped_resolves_and_says_how_it_is_run() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let config = RunConfig::from_file(&path).unwrap_or_else(|error| unreachable!("{error}"));
        let text = fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(text.starts_with("# "), "{name} begins with what it is for");
        assert!(text.contains(&format!("configs/{name}")), "{name}");
        assert!(config.run.output.starts_with("output"), "{name}");
        names.push(name);
    }
    names.sort();
    let shipped = [
        "full.toml",
        "lora-adgen.toml",
        "lora-alpaca.toml",
        "lora-chat.toml",
        "lora-golden.toml",
        "lora-identity.toml",
        "ptuning-adgen.toml",
    ];
    assert_eq!(names, shipped);
}

#[test]
fn files_that_are_no_configuration_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("long.toml");
    fs::write(&long, vec![b'#'; (1 << 20) + 1]).unwrap();
    let binary = folder.path().join("binary.toml");
    fs::write(&binary, [0xff, 0xfe]).unwrap();
    for path in [
        &long,
        &binary,
        &folder.path().to_owned(),
        &folder.path().join("absent"),
    ] {
        let error = ConfigFile::read(path).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
    }
}

/// A `config.json` of the first generation; `edit` changes it.
fn model_json(edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) -> String {
    let text = r#"{"model_type": "chatglm", "bos_token_id": 194, "eos_token_id": 195,
        "mask_token_id": 190, "gmask_token_id": 191, "pad_token_id": 3, "hidden_size": 64,
        "num_attention_heads": 4, "num_layers": 3, "max_sequence_length": 2048, "vocab_size": 200}"#;
    let mut json = serde_json::from_str(text).unwrap();
    edit(&mut json);
    serde_json::to_string(&json).unwrap()
}

#[test]
fn a_model_config_is_read_with_its_defaults() {
    let config = ModelConfig::from_json(&model_json(|_| ())).unwrap();
    assert_eq!(
        (config.vocab_size, config.hidden_size, config.num_layers),
        (200, 64, 3)
    );
    assert_eq!((config.inner_hidden_size, config.head_dim), (256, 16));
    assert_eq!(config.norm_epsilon, 1e-5);
    assert!(config.tie_word_embeddings);
    let context = config.context_ids.unwrap();
    assert_eq!(context.bos_token_id, 194);
    assert_eq!(config.eos_token_ids, [195]);
    assert_eq!((context.mask_token_id, context.gmask_token_id), (190, 191));
    assert_eq!(config.pad_token_id, Some(3));
    assert_eq!(
        (config.pre_seq_len, config.prefix_projection),
        (None, false)
    );
    let given = ModelConfig::from_json(&model_json(|json| {
        for (key, value) in [
            ("inner_hidden_size", 100.into()),
            ("tie_word_embeddings", false.into()),
            ("pre_seq_len", 6.into()),
            ("prefix_projection", true.into()),
            ("quantization_bit", 4.into()),
            ("quantization_embeddings", false.into()),
            ("position_encoding_2d", true.into()),
            ("layernorm_epsilon", 1e-6.into()),
        ] {
            json.insert(key.to_owned(), value);
        }
    }))
    .unwrap();
    assert_eq!(
        (given.inner_hidden_size, given.tie_word_embeddings),
        (100, false)
    );
    assert_eq!(
        (given.pre_seq_len, given.prefix_projection),
        (Some(6), true)
    );
    assert_eq!(given.norm_epsilon, 1e-6);
    assert_eq!(config.quantization, Quantization::None);
    assert_eq!(given.quantization, Quantization::Int4);
    for (bits, quantization) in [(0, Quantization::None), (8, Quantization::Int8)] {
        let text = model_json(|json| {
            json.insert("quantization_bit".to_owned(), bits.into());
        });
        let config = ModelConfig::from_json(&text).unwrap();
        assert_eq!(config.quantization, quantization);
    }
    let embeddings = ModelConfig::from_json(&model_json(|json| {
        json.insert("quantization_bit".to_owned(), 4.into());
        json.insert("quantization_embeddings".to_owned(), true.into());
    }));
    let message = embeddings.unwrap_err();
    assert!(
        message.contains("`quantization_embeddings` is true"),
        "{message}"
    );
    assert!(message.contains("--quantization"), "{message}");
}

#[test]
fn a_quantised_base_is_for_adapters() {
    for kind in ["lora", "prefix"] {
        let flags = ["--kind", kind, "--quantization", "int8"];
        let config = resolve(REQUIRED, &flags).unwrap();
        assert_eq!(config.model.quantization, Quantization::Int8);
    }
    let none = resolve(REQUIRED, &["--kind", "full", "--quantization", "none"]).unwrap();
    assert_eq!(none.model.quantization, Quantization::None);
    let refused = resolve(REQUIRED, &["--kind", "full", "--quantization", "int4"]);
    let message = refused.unwrap_err().to_string();
    for word in ["--quantization", "int4", "none", "adapter.kind = \"full\""] {
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn other_models_and_broken_configs_are_refused() {
    for (key, value, message) in [
        (
            "model_type",
            "\"llama\"",
            "model_type \"llama\" is no ChatGLM; this build trains ChatGLM-6B",
        ),
        ("model_type", "\"glm\"", "`intermediate_size` is missing"),
        ("model_type", "\"glm4\"", "GLM-4-0414"),
        ("model_type", "7", "no model_type"),
        ("padded_vocab_size", "65024", "`kv_channels` is missing"),
        (
            "quantization_bit",
            "2",
            "`quantization_bit` is 2; folders of 8 and of 4 bits are known: use a folder such as",
        ),
        (
            "position_encoding_2d",
            "false",
            "position_encoding_2d is false",
        ),
        (
            "vocab_size",
            "0",
            "`vocab_size` is 0; it must be a whole number from 1 to",
        ),
        (
            "vocab_size",
            "150",
            "`bos_token_id` is 194; it must be an id below vocab_size, 150",
        ),
        ("vocab_size", "null", "`vocab_size` is missing"),
        (
            "hidden_size",
            "64.5",
            "`hidden_size` is 64.5; it must be a whole number",
        ),
        ("hidden_size", "-64", "`hidden_size` is -64;"),
        ("hidden_size", "18446744073709551616", "`hidden_size` is"),
        (
            "hidden_size",
            "66",
            "hidden_size 66 is not a multiple of num_attention_heads 4",
        ),
        (
            "hidden_size",
            "96",
            "heads are 24 wide; this build computes heads of a multiple of 16",
        ),
        ("hidden_size", "576", "heads are 144 wide"),
        ("num_layers", "null", "`num_layers` is missing"),
        (
            "num_layers",
            "1000000",
            "`num_layers` is 1000000; it must be",
        ),
        ("num_attention_heads", "0", "`num_attention_heads` is 0;"),
        ("inner_hidden_size", "0", "`inner_hidden_size` is 0;"),
        (
            "gmask_token_id",
            "null",
            "`gmask_token_id` is missing; early ChatGLM-6B folders lack it",
        ),
        (
            "gmask_token_id",
            "190",
            "mask_token_id and gmask_token_id are both 190; they must differ",
        ),
        (
            "pad_token_id",
            "200",
            "`pad_token_id` is 200; it must be an id below vocab_size",
        ),
        (
            "layernorm_epsilon",
            "0",
            "`layernorm_epsilon` is 0; it must be above 0",
        ),
        ("layernorm_epsilon", "\"x\"", "`layernorm_epsilon` is \"x\""),
        (
            "tie_word_embeddings",
            "1",
            "`tie_word_embeddings` is 1; it must be true or false",
        ),
        ("pre_seq_len", "0", "`pre_seq_len` is 0;"),
        ("max_sequence_length", "[]", "`max_sequence_length` is [];"),
    ] {
        let text = model_json(|json| {
            json.insert(key.to_owned(), serde_json::from_str(value).unwrap());
        });
        let error = ModelConfig::from_json(&text).unwrap_err();
        assert!(
            error.contains(message),
            "{key} = {value}\n  gave   {error}\n  wanted {message}"
        );
    }
    for text in ["", "[]", "{", "{}"] {
        assert!(ModelConfig::from_json(text).is_err(), "{text:?}");
    }
    let absent = ModelConfig::from_json_file(Path::new("absent/config.json")).unwrap_err();
    assert!(absent.to_string().contains("absent/config.json"));
}

fn report(step: u64, loss: f32) -> StepReport {
    StepReport {
        step,
        max_steps: 9,
        loss,
        micro_losses: vec![loss, f32::NAN],
        learning_rate: 0.1 + 0.2,
        grad_norm: 1.0 / 3.0,
        clipped: false,
        skipped: false,
        loss_scale: 65_536.0,
        target_tokens: 5,
        tokens: 9,
        seconds: 0.25,
    }
}

#[test]
fn metrics_lose_no_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let losses = [
        5.777_138_f32,
        f32::from_bits(0x3f80_0001),
        f32::MIN_POSITIVE / 2.0,
        f32::MAX,
    ];
    let mut metrics = Metrics::open(folder.path(), STEPS, 0).unwrap();
    for (step, loss) in (1..).zip(losses) {
        metrics.append(&report(step, loss)).unwrap();
    }
    let text = fs::read_to_string(path).unwrap();
    for (row, loss) in text.lines().zip(losses) {
        let digits = |key: &str| {
            let (_, rest) = row.split_once(&format!("\"{key}\":")).unwrap();
            rest.split([',', '}', ']'])
                .next()
                .unwrap()
                .trim_start_matches('[')
                .to_owned()
        };
        // As a reader that knows f64 only, and as one that reads f32.
        assert_eq!(
            (digits("loss").parse::<f64>().unwrap() as f32).to_bits(),
            loss.to_bits()
        );
        assert_eq!(
            digits("loss").parse::<f32>().unwrap().to_bits(),
            loss.to_bits()
        );
        assert_eq!(
            digits("micro_losses").parse::<f32>().unwrap().to_bits(),
            loss.to_bits()
        );
        assert_eq!(digits("grad_norm").parse::<f32>().unwrap(), 1.0 / 3.0);
        assert_eq!(digits("learning_rate").parse::<f64>().unwrap(), 0.1 + 0.2);
        let row: serde_json::Value = serde_json::from_str(row).unwrap();
        assert!(row["micro_losses"][1].is_null());
        assert_eq!(row["target_tokens"], 5);
    }
    assert_eq!(text.lines().count(), losses.len());
}

#[test]
fn resuming_drops_later_and_torn_rows_and_keeps_the_rest_bytewise() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let mut metrics = Metrics::open(folder.path(), STEPS, 0).unwrap();
    for step in 1..=5 {
        metrics.append(&report(step, step as f32)).unwrap();
    }
    let before = fs::read_to_string(&path).unwrap();
    let first_three: String = before.split_inclusive('\n').take(3).collect();
    fs::write(&path, format!("{before}garbage\n{{\"step\":2")).unwrap();
    let mut metrics = Metrics::open(folder.path(), STEPS, 3).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), first_three);
    metrics.append(&report(4, 0.5)).unwrap();
    let after = fs::read_to_string(&path).unwrap();
    assert!(after.starts_with(&first_three));
    assert_eq!(after.lines().count(), 4);
    Metrics::open(folder.path(), STEPS, 0).unwrap();
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "",
        "a new run starts a new file"
    );
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        1,
        "no temporary file is left"
    );
    let error = Metrics::open(&folder.path().join("absent"), STEPS, 0).unwrap_err();
    assert!(error.to_string().contains("absent/metrics.jsonl"));
}

fn mp_train(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mp-train"))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

#[test]
fn the_program_says_what_is_wrong_and_exits_with_2() {
    for (args, message) in [
        (&[][..], "hint: download the ChatGLM-6B folder"),
        (
            &["--devices", "cpu,cpu"],
            "error: no model to train: neither --model nor --config",
        ),
        (&["train"], "https://huggingface.co/THUDM/chatglm-6b"),
        (&["plan"], "no model to plan for"),
        (
            &["--train", "t", "--config", "absent.toml"],
            "error: cannot read absent.toml: No such file",
        ),
        (
            &["--model", "m", "--train", "t", "--max-steps", "-3"],
            "expected a whole number, 0 or more",
        ),
        (
            &[
                "--model",
                "m",
                "--train",
                "t",
                "--max-steps",
                "3",
                "--eps",
                "nan",
            ],
            "error: --eps nan: must be",
        ),
        (&["--trian", "t"], "'--train'"),
        (
            &["generate", "--model", "m", "--input", "absent.jsonl"],
            "error: absent.jsonl: No such file",
        ),
        (
            &["generate", "--model", "m", "--balance", "1,2"],
            "--balance has 2 numbers for 1 devices",
        ),
        (
            &["generate", "--model", "m", "--max-new-tokens", "0"],
            "0 is not in 1..=65536",
        ),
    ] {
        let output = mp_train(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(message), "{args:?} gave {stderr}");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn the_program_prints_a_configuration_that_it_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("printed.toml");
    let flags = [
        "--config",
        "configs/lora-golden.toml",
        "--print-config",
        "--lr",
        "2e-3",
    ];
    for command in [&flags[..], &[&["train"], &flags[..]].concat()] {
        let first = mp_train(command);
        assert_eq!(first.status.code(), Some(0));
        fs::write(&path, &first.stdout).unwrap();
        let again = mp_train(&["--config", path.to_str().unwrap(), "--print-config"]);
        assert_eq!(first.stdout, again.stdout);
        assert_eq!(
            RunConfig::from_file(&path).unwrap().optimizer.learning_rate,
            2e-3
        );
    }
}

#[test]
fn help_is_grouped_and_fits_a_screen_or_two() {
    let help = String::from_utf8(mp_train(&["--help"]).stdout).unwrap();
    for heading in [
        "Model:",
        "Adapter:",
        "Data:",
        "Optimizer:",
        "Pipeline:",
        "Run:",
    ] {
        assert!(help.contains(&format!("\n{heading}\n")), "{heading}");
    }
    assert!(
        help.lines().count() <= 110,
        "{} lines",
        help.lines().count()
    );
    assert!(
        help.lines().all(|line| line.chars().count() <= 100),
        "{help}"
    );
}
