//! Runs on text, through the program: every kind of file, runs that are cut off in the middle of an
//! epoch, validation, bad rows, what TensorBoard reads, and the template that goes with an adapter.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "text_run/events.rs"]
mod events;
#[path = "text_run/model.rs"]
mod model;
#[path = "run/program.rs"]
mod program;

use program::{Ended, interrupt, lines, mp_train, succeed};

/// A LoRA run on one text file.
struct Setup {
    folder: TempDir,
    rows: PathBuf,
    flags: Vec<String>,
}

impl Setup {
    fn new(name: &str, bytes: impl AsRef<[u8]>, flags: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rows = folder.path().join(name);
        fs::write(&rows, bytes).unwrap();
        let flags = flags.split_whitespace().map(str::to_owned).collect();
        Setup {
            folder,
            rows,
            flags,
        }
    }

    fn output(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, output: &Path) -> Command {
        let mut command = mp_train(&self.flags);
        command
            .args(["--max-source-length", "64", "--max-target-length", "64"])
            .args(["--learning-rate", "5e-3", "--threads", "2"])
            .arg("--model")
            .arg(model::untrained())
            .arg("--train")
            .arg(&self.rows)
            .arg("--output")
            .arg(output);
        command
    }

    fn train(&self, name: &str) -> (Ended, PathBuf) {
        let output = self.output(name);
        (succeed(&mut self.command(&output)), output)
    }
}

/// Numbered rows of different lengths.
fn questions(count: usize) -> Vec<(String, String)> {
    let row = |number: usize| {
        let more = "and again ".repeat(number * 7 % 5);
        (
            format!("What is number {number}? {more}"),
            format!("It is {} {more}", number * 13 % 97),
        )
    };
    (0..count).map(row).collect()
}

fn prompt_response(count: usize) -> String {
    let row = |(prompt, response)| format!("{}\n", json!({"prompt": prompt, "response": response}));
    questions(count).into_iter().map(row).collect()
}

/// Conversations of three turns, a system message in front of every other one.
fn sharegpt(count: usize) -> String {
    let turns = questions(count * 3);
    let row = |(number, turns): (usize, &[(String, String)])| {
        let messages: Vec<_> = turns
            .iter()
            .flat_map(|(question, answer)| {
                [
                    json!({ "from": "human", "value": question }),
                    json!({ "from": "gpt", "value": answer }),
                ]
            })
            .collect();
        let system = if number % 2 == 0 { "" } else { "Count." };
        json!({ "conversations": messages, "system": system })
    };
    let rows: Vec<_> = turns.chunks(3).enumerate().map(row).collect();
    serde_json::to_string_pretty(&rows).unwrap()
}

fn read_rows(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Rows of metrics.jsonl, wall time apart.
fn metrics(output: &Path) -> Vec<Value> {
    let mut rows = read_rows(&output.join("metrics.jsonl"));
    for row in &mut rows {
        assert!(row.as_object_mut().unwrap().remove("seconds").is_some());
    }
    rows
}

/// Files of the adapter, by name.
fn adapter(output: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(output.join("adapter")).unwrap();
    let file = |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read(path).unwrap())
    };
    entries.map(|entry| file(entry.unwrap().path())).collect()
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn every_kind_of_file_is_trained_on() {
    let alpaca: Vec<_> = questions(12)
        .into_iter()
        .map(|(instruction, output)| {
            json!({ "instruction": instruction, "input": "", "output": output })
        })
        .collect();
    let alpaca = serde_json::to_string_pretty(&alpaca).unwrap();
    let turns: String = questions(12)
        .into_iter()
        .map(|(prompt, response)| {
            let history = json!([["Hello", "Good day"]]);
            let row = json!({ "prompt": prompt, "response": response, "history": history });
            format!("{row}\n")
        })
        .collect();
    let table: String = questions(12)
        .into_iter()
        .map(|(question, answer)| format!("\"{question}, {answer}\"\r\n"))
        .collect();
    let table = format!("\u{feff}sentence\r\n{table}");
    let packed = gzip(&prompt_response(12));
    let chats = fs::read("tests/data/text/parquet/chats_zstd.parquet").unwrap();
    let shared = sharegpt(6);
    let files: [(&str, &[u8], &str); 6] = [
        ("alpaca.json", alpaca.as_bytes(), "alpaca"),
        ("turns.jsonl", turns.as_bytes(), "prompt_response"),
        ("table.csv", table.as_bytes(), "plain_text"),
        ("rows.jsonl.gz", &packed, "prompt_response"),
        ("chats.parquet", &chats, "messages"),
        ("sharegpt.json", shared.as_bytes(), "sharegpt"),
    ];
    for (name, bytes, template) in files {
        let flags = format!(
            "--template {template} --max-steps 3 --gradient-accumulation 4 --bad-rows skip \
             --max-length 128"
        );
        let setup = Setup::new(name, bytes, &flags);
        let (_, output) = setup.train("output");
        let rows = metrics(&output);
        assert_eq!(rows.len(), 3, "{name}");
        // A random model of 760 ids knows nothing: about ln 760.
        let loss = rows[0]["loss"].as_f64().unwrap();
        assert!((6.0..7.5).contains(&loss), "{name}: {loss}");
        let template_file = fs::read_to_string(output.join("adapter/template.toml")).unwrap();
        assert!(template_file.contains(template), "{name}: {template_file}");
    }
}

#[test]
fn all_turns_of_conversations_are_trained_on_or_the_last_alone() {
    let flags = "--template sharegpt --epochs 2 --gradient-accumulation 1";
    let setup = Setup::new("chats.json", sharegpt(4), flags);
    let train = |name: &str, more: &[&str]| {
        let output = setup.output(name);
        (succeed(setup.command(&output).args(more)), output)
    };
    let (_, all) = train("all", &["--max-length", "150"]);
    let losses = |output: &Path| -> Vec<f64> {
        let rows = metrics(output);
        rows.iter()
            .map(|row| row["loss"].as_f64().unwrap())
            .collect()
    };
    // A row for each of three turns, twice.
    let trained = losses(&all);
    assert_eq!(trained.len(), 24);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&trained[12..]) < mean(&trained[..12]), "{trained:?}");
    let template = fs::read_to_string(all.join("adapter/template.toml")).unwrap();
    for words in [
        "kind = \"sharegpt\"",
        "train_on_turns = \"all\"",
        "max_length = 150",
    ] {
        assert!(template.contains(words), "{template}");
    }

    let (_, last) = train("last", &["--train-on-turns", "last"]);
    assert_eq!(losses(&last).len(), 8);

    // What did not fit is said.
    let (ended, _) = train("short", &["--max-length", "60"]);
    let told = "conversations are too long; their oldest turns are dropped";
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
}

/// The run left alone, and the run stopped in the middle of its second epoch whose cache is then
/// thrown away, end as one.
#[track_caller]
fn interrupted_as_if_not(flags: &str) {
    let setup = Setup::new(
        "rows.jsonl",
        prompt_response(37),
        &format!(
            "--template prompt_response --shuffle true --seed 11 --epochs 6 \
             --gradient-accumulation 2 --lora-dropout 0.1 {flags}"
        ),
    );
    let (_, alone) = setup.train("alone");
    let expected = metrics(&alone);
    let per_epoch = expected.len() / 6;
    assert!(per_epoch >= 3, "{} steps", expected.len());

    let output = setup.output("interrupted");
    let stop = per_epoch + per_epoch / 2;
    let metrics_file = output.join("metrics.jsonl");
    let mut command = setup.command(&output);
    let ended = interrupt(&mut command, Signal::TERM, || lines(&metrics_file) >= stop);
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let done = metrics(&output).len();
    assert!(stop <= done && done < expected.len(), "{done}");
    assert!(!output.join("adapter").exists());

    fs::remove_dir_all(output.join("cache")).unwrap();
    succeed(setup.command(&output).arg("--resume"));
    // Losses of every micro-batch, so the same rows in the same order.
    assert_eq!(metrics(&output), expected);
    assert!(adapter(&output) == adapter(&alone));
}

#[test]
fn stopped_within_an_epoch_and_resumed_without_its_cache() {
    interrupted_as_if_not("--micro-batch-size 3");
}

#[test]
fn stopped_within_an_epoch_of_token_budgets_and_length_buckets() {
    interrupted_as_if_not("--micro-batch-tokens 120 --bucket-by-length true");
}

#[test]
fn epochs_say_how_many_steps_there_are() {
    // 4 micro-batches of 3, 3, 3 and 1 rows; 3 times 4 of them, 5 to a step.
    let setup = Setup::new(
        "rows.jsonl",
        prompt_response(10),
        "--template prompt_response --epochs 3 --micro-batch-size 3 --gradient-accumulation 5",
    );
    let (_, output) = setup.train("output");
    assert_eq!(metrics(&output).len(), 3);
}

#[test]
fn a_share_of_the_rows_is_kept_for_validation() {
    let setup = Setup::new(
        "rows.jsonl",
        prompt_response(20),
        "--template prompt_response --max-steps 6 --gradient-accumulation 4 \
         --validation-split 0.2 --eval-steps 2",
    );
    let (_, output) = setup.train("output");
    let rows = read_rows(&output.join("validation.jsonl"));
    let steps: Vec<_> = rows.iter().map(|row| row["step"].as_u64()).collect();
    assert_eq!(steps, [Some(2), Some(4), Some(6)]);
    let losses: Vec<_> = rows.iter().map(|row| row["loss"].as_f64()).collect();
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{rows:?}");

    let scalars = events::scalars(&output);
    let kept = &scalars["validation/loss"];
    let expected: Vec<_> = rows
        .iter()
        .map(|row| {
            let loss = row["loss"].as_f64().unwrap();
            (row["step"].as_u64().unwrap(), loss as f32)
        })
        .collect();
    assert_eq!(*kept, expected);
}

#[test]
fn tensorboard_reads_what_the_metrics_say() {
    let setup = Setup::new(
        "rows.jsonl",
        prompt_response(10),
        "--template prompt_response --max-steps 5 --gradient-accumulation 2",
    );
    let (_, output) = setup.train("output");
    let scalars = events::scalars(&output);
    for (tag, key) in [
        ("train/loss", "loss"),
        ("train/grad_norm", "grad_norm"),
        ("train/learning_rate", "learning_rate"),
    ] {
        let number = |row: &Value| {
            let value = row[key].as_f64().unwrap();
            (row["step"].as_u64().unwrap(), value as f32)
        };
        let expected: Vec<_> = metrics(&output).iter().map(number).collect();
        assert_eq!(expected.len(), 5);
        assert_eq!(scalars[tag], expected, "{tag}");
    }
}

#[test]
fn bad_rows_are_left_out_and_counted() {
    let mut rows = prompt_response(6);
    rows.push_str("{\"prompt\": \"no answer\"}\n{\"prompt\": [1], \"response\": \"a\"}\n");
    rows.push_str(&prompt_response(2));
    let flags = "--template prompt_response --max-steps 2 --gradient-accumulation 2";
    let setup = Setup::new("rows.jsonl", rows, &format!("{flags} --bad-rows skip"));
    let (ended, _) = setup.train("output");
    for word in ["2 rows are left out", "rows.jsonl:7", "rows.jsonl:8"] {
        assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
    }
}

#[test]
fn the_template_goes_with_the_adapter_and_asks_the_questions() {
    let alpaca = "{\"frage\": \"Say a word.\", \"antwort\": \"Word.\"}\n";
    let setup = Setup::new(
        "rows.jsonl",
        alpaca.repeat(4),
        "--template prompt_response --prompt-column frage --response-column antwort \
         --max-steps 40 --gradient-accumulation 1 --micro-batch-size 4 --r 16",
    );
    let (_, output) = setup.train("output");
    let prompts = setup.folder.path().join("prompts.jsonl");
    fs::write(&prompts, "{\"frage\": \"Say a word.\"}\n").unwrap();
    let generate = |adapter: bool| {
        let mut command = mp_train(["generate", "--max-new-tokens", "12", "--threads", "2"]);
        command
            .arg("--model")
            .arg(model::untrained())
            .arg("--input")
            .arg(&prompts);
        if adapter {
            command.arg("--adapter").arg(output.join("adapter"));
        }
        command
    };
    // Only the saved template knows of a column called frage.
    program::fail(&mut generate(false), 2, &["prompts.jsonl:1", "frage"]);
    let ended = succeed(&mut generate(true));
    let row: Value = serde_json::from_str(ended.stdout.trim_end()).unwrap();
    assert_eq!(row["frage"], "Say a word.");
    assert!(row["answer"].is_string(), "{row}");
}
