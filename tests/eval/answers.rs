//! Answers, their scores and what is written of them.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;

use mp_train::checkpoint::HostTensor;
use mp_train::eval::scores::Scores;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::setup::{Ended, Setup, ended, parse, text};

/// Runs `mp-train eval` on a file of rows.
pub fn evaluate(setup: &Setup, data: &Path, flags: &[&str]) -> Ended {
    let mut command = setup.command("eval");
    ended(
        command
            .arg("--data")
            .arg(data)
            .args(flags)
            .output()
            .unwrap(),
    )
}

const NAMES: [&str; 4] = ["bleu-4", "rouge-1", "rouge-2", "rouge-l"];

fn scores(row: &Value) -> [f64; 4] {
    NAMES.map(|name| row[name].as_f64().unwrap())
}

#[test]
fn answers_are_those_of_generate_and_scored_against_the_labels() {
    let setup = Setup::new();
    // Without these columns: the template beside the adapter names them.
    let template =
        "[template]\nkind = \"prompt_response\"\nprompt = \"content\"\nresponse = \"summary\"\n";
    let adapter = setup.adapter("adapter_lora_qkv", Some(template));
    let adapter = ["--adapter", adapter.to_str().unwrap()];
    let short = ["--max-new-tokens", "16", "--no-stop-at-eop"];
    let questions = ["who are you?", "why", "一丁丂", "name a colour", "7 8"];
    let asked: Vec<Value> = questions
        .iter()
        .map(|question| json!({ "content": question }))
        .collect();
    let answers = setup.answers(&asked, &[&adapter[..], &short].concat());
    // The first two answers are what is expected, the others are not.
    let label = |n: usize| match n {
        0 | 1 => text(&answers[n]).to_owned(),
        n => format!("{}{}", questions[n], &text(&answers[n])[..3]),
    };
    let rows: Vec<Value> = (0..questions.len())
        .map(|n| json!({ "content": questions[n], "summary": label(n) }))
        .collect();
    let data = setup.rows("adgen.jsonl", &rows);
    let mut files = Vec::new();
    for devices in ["cpu", "cpu,cpu,cpu"] {
        let [predictions, summary] = ["predictions.jsonl", "summary.json"]
            .map(|name| setup.folder.path().join(format!("{devices}-{name}")));
        let place = [
            "--quiet",
            "--devices",
            devices,
            "--predictions",
            predictions.to_str().unwrap(),
            "--output",
            summary.to_str().unwrap(),
        ];
        let ended = evaluate(&setup, &data, &[&adapter[..], &short, &place].concat());
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        let found = fs::read_to_string(&predictions).unwrap();
        let written: Value = serde_json::from_str(&fs::read_to_string(&summary).unwrap()).unwrap();
        for (n, row) in parse(&found).iter().enumerate() {
            let tokenizer = setup.tokenizer();
            let plain = |text: &str| {
                tokenizer
                    .decode_as_reference(&tokenizer.encode(text))
                    .unwrap()
            };
            assert_eq!(row["prompt"], plain(questions[n]));
            assert_eq!(row["label"], plain(&label(n)).trim());
            let answer: Vec<u32> =
                serde_json::from_value(answers[n]["new_tokens"].clone()).unwrap();
            let answer = tokenizer.decode_as_reference(&answer).unwrap();
            assert_eq!(row["prediction"], answer.trim());
            let expected = Scores::of(answer.trim(), row["label"].as_str().unwrap());
            let expected = [
                expected.bleu4,
                expected.rouge1,
                expected.rouge2,
                expected.rouge_l,
            ];
            assert_eq!(scores(row), expected);
            match n {
                0 | 1 => assert!(scores(row).iter().all(|score| *score > 99.9), "{row}"),
                _ => assert!(scores(row).iter().all(|score| *score < 80.0), "{row}"),
            }
        }
        let rows = parse(&found);
        assert_eq!(rows.len(), questions.len());
        for (i, name) in NAMES.into_iter().enumerate() {
            let mean = rows.iter().map(|row| scores(row)[i]).sum::<f64>() / rows.len() as f64;
            let told = written["answers"][name].as_f64().unwrap();
            assert!((told - mean).abs() < 1e-9, "{written}");
            let line = format!("{:<11} {told:>9.4}\n", name.to_uppercase());
            assert!(ended.stdout.contains(&line), "{}", ended.stdout);
        }
        assert_eq!(written["answers"]["cut_off"], rows.len());
        assert_eq!(written["answers"]["empty_predictions"], 0);
        assert_eq!(written["sampling"]["temperature"], 0.0);
        assert!(ended.stdout.contains("5 answers cut off at their longest"));
        files.push((found, written, ended.stdout));
    }
    assert_eq!(files[0], files[1], "one stage and three differ");
}

#[test]
fn columns_and_lengths_can_be_named() {
    let setup = Setup::new();
    let rows = [
        json!({ "frage": "ab", "antwort": "cdefgh", "prompt": "x", "response": "y" }),
        json!({ "frage": "abcdefghi", "antwort": "z", "prompt": "x", "response": "y" }),
    ];
    let data = setup.rows("columns.jsonl", &rows);
    let predictions = |flags: &[&str]| {
        let few = ["--max-new-tokens", "2", "--predictions", "-"];
        let ended = evaluate(&setup, &data, &[&few[..], flags].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let rows = parse(&ended.stdout).into_iter();
        rows.map(|row| (row["prompt"].to_string(), row["label"].to_string()))
            .collect::<Vec<_>>()
    };
    let pair = |prompt: &str, label: &str| (format!("\"{prompt}\""), format!("\"{label}\""));
    assert_eq!(predictions(&[]), [pair("x", "y"), pair("x", "y")]);
    let columns = ["--prompt-column", "frage", "--response-column", "antwort"];
    assert_eq!(
        predictions(&columns),
        [pair("ab", "cdefgh"), pair("abcdefghi", "z")]
    );
    // A space stands before the text, gMASK behind it, sop and eop around the answer.
    let lengths = ["--max-source-length", "5", "--max-target-length", "6"];
    assert_eq!(
        predictions(&[&columns[..], &lengths].concat()),
        [pair("ab", "cde"), pair("abc", "z")]
    );
}

#[test]
fn an_empty_answer_is_worth_nothing_and_counted() {
    let setup = Setup::new();
    // The last norm makes every state the same, and of that eop is the likeliest.
    setup.change_tensors(|tensors| {
        let mut set = |name: &str, change: &dyn Fn(usize, f32) -> f32| {
            let tensor = tensors.get_mut(name).unwrap();
            let values = tensor.to_f32().unwrap().into_iter().enumerate();
            let values: Vec<f32> = values.map(|(i, value)| change(i, value)).collect();
            *tensor = HostTensor::from_f32(tensor.shape.clone(), &values).unwrap();
        };
        set("transformer.final_layernorm.weight", &|_, _| 0.0);
        set("transformer.final_layernorm.bias", &|_, _| 1.0);
        let eop = 195;
        set("lm_head.weight", &|i, value| match i / 64 == eop {
            true => 1.0,
            false => value,
        });
    });
    let rows = [
        json!({ "prompt": "a", "response": "b c" }),
        json!({ "prompt": "b", "response": " " }),
        json!({ "prompt": "c", "response": "d" }),
    ];
    let data = setup.rows("empty.jsonl", &rows);
    let ended = evaluate(&setup, &data, &["--output", "-"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(scores(&summary["answers"]), [0.0; 4]);
    assert_eq!(summary["answers"]["empty_predictions"], 3);
    assert_eq!(summary["answers"]["empty_labels"], 1);
    assert_eq!(summary["answers"]["cut_off"], 0);
    assert!(ended.stderr.contains("3 empty answers, each worth 0"));
    assert!(ended.stderr.contains("1 rows whose label has no text"));
}

#[test]
fn sampled_answers_are_repeated_by_their_seed() {
    let setup = Setup::new();
    let rows = ["a", "b", "c"].map(|text| json!({ "prompt": text, "response": text }));
    let data = setup.rows("sampled.jsonl", &rows);
    let predictions = |flags: &[&str]| {
        let few = ["--max-new-tokens", "12", "--predictions", "-"];
        let ended = evaluate(&setup, &data, &[&few[..], flags].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended.stdout
    };
    let drawn = ["--temperature", "0.95", "--top-k", "50", "--top-p", "0.7"];
    assert_eq!(predictions(&drawn), predictions(&drawn));
    assert_ne!(predictions(&drawn), predictions(&[]));
    let other = [&drawn[..], &["--seed", "7"]].concat();
    assert_ne!(predictions(&drawn), predictions(&other));
}

#[test]
fn a_signal_ends_it_and_leaves_no_file() {
    let setup = Setup::new();
    let row = json!({ "prompt": "a", "response": "b" });
    let data = setup.rows("long.jsonl", &vec![row; 2000]);
    let output = setup.folder.path().join("summary.json");
    let mut command = setup.command("eval");
    command
        .arg("--data")
        .arg(&data)
        .arg("--output")
        .arg(&output);
    command.args([
        "--predictions",
        "-",
        "--max-new-tokens",
        "40",
        "--no-stop-at-eop",
    ]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    answers.read_line(&mut first).unwrap();
    let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let mut rest = String::new();
    answers.read_to_string(&mut rest).unwrap();
    let ended = ended(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert!(
        ended
            .stderr
            .contains("interrupted: stopped before the last row")
    );
    assert!(rest.lines().count() < 1999, "it was over before the signal");
    let left = fs::read_dir(setup.folder.path()).unwrap();
    let left = left.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut left: Vec<String> = left.collect();
    left.sort();
    assert_eq!(left, ["long.jsonl", "model"]);
}
