//! The recipes for ADGEN: THUDM's settings, and evaluations that the program understands.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mp_train::config::run::{
    AdapterSection, LossNormalisation, LrSchedule, Quantization, RunConfig, TemplateKind,
};

use super::setup::ended;

fn recipe(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("configs")
        .join(name)
}

const RECIPES: [&str; 2] = ["lora-adgen.toml", "ptuning-adgen.toml"];

#[test]
fn settings_are_thudms() {
    for name in RECIPES {
        let config = RunConfig::from_file(&recipe(name)).unwrap();
        let run = &config.run;
        assert_eq!(
            run.micro_batch_size * run.gradient_accumulation,
            16,
            "{name}"
        );
        assert_eq!((run.max_steps, run.epochs), (Some(3000), None));
        assert_eq!(
            (config.data.max_source_length, config.data.max_target_length),
            (64, 64)
        );
        assert_eq!(config.data.template, TemplateKind::PromptResponse);
        assert_eq!(config.data.prompt_column.as_deref(), Some("content"));
        assert_eq!(config.data.response_column.as_deref(), Some("summary"));
        let optimizer = &config.optimizer;
        assert_eq!(optimizer.lr_schedule, LrSchedule::Linear);
        assert_eq!((optimizer.warmup_steps, optimizer.weight_decay), (0, 0.0));
        assert_eq!(optimizer.max_grad_norm, 1.0);
        assert_eq!(
            optimizer.loss_normalisation,
            LossNormalisation::PerMicroBatch
        );
        match &config.adapter {
            AdapterSection::Prefix(prefix) => {
                assert_eq!((prefix.pre_seq_len, prefix.prefix_projection), (128, false));
                assert_eq!(optimizer.learning_rate, 2e-2);
                assert_eq!(config.model.quantization, Quantization::Int4);
                assert_eq!((run.micro_batch_size, run.gradient_accumulation), (1, 16));
            }
            AdapterSection::Lora(lora) => {
                assert_eq!((lora.r, lora.lora_alpha, lora.lora_dropout), (8, 32.0, 0.1));
                assert_eq!(lora.target_modules, ["query_key_value"]);
                assert_eq!(optimizer.learning_rate, 5e-4);
                assert_eq!(config.model.quantization, Quantization::None);
                assert_eq!((run.micro_batch_size, run.gradient_accumulation), (16, 1));
            }
            AdapterSection::Full(_) => unreachable!("{name}"),
        }
    }
}

#[test]
fn the_evaluations_in_the_recipes_are_understood() {
    let folder = tempfile::tempdir().unwrap();
    for name in RECIPES {
        let text = fs::read_to_string(recipe(name)).unwrap();
        let config = RunConfig::from_file(&recipe(name)).unwrap();
        fs::create_dir_all(folder.path().join(&config.run.output)).unwrap();
        // The lines of a command go on behind a backslash.
        let text = text.replace("\\\n#", "");
        let commands = text
            .lines()
            .filter_map(|line| line.strip_prefix("#     mp-train eval "));
        let mut found = 0;
        for arguments in commands {
            let arguments: Vec<&str> = arguments.split_whitespace().collect();
            let value = |flag: &str| {
                let place = arguments.iter().position(|&argument| argument == flag);
                place.map(|place| Path::new(arguments[place + 1]))
            };
            assert_eq!(value("--model"), Some(config.model.path.as_path()));
            assert_eq!(
                value("--adapter"),
                Some(config.run.output.join("adapter").as_path())
            );
            assert_eq!(
                value("--data"),
                config.data.validation.0.first().map(PathBuf::as_path)
            );
            let mut command = Command::new(env!("CARGO_BIN_EXE_mp-train"));
            command
                .arg("eval")
                .args(&arguments)
                .current_dir(folder.path());
            // Usage is right: what is missing is the model.
            let told = ["models/chatglm-6b/config.json"];
            ended(command.output().unwrap()).is_refused(&told);
            found += 1;
        }
        assert!(found > 0, "{name} says how its result is evaluated");
    }
}
