//! `mp-train bench` and `scripts/bench.sh` from outside, on the CPU and on pretend GPUs
//! (tests/cuda_emulator): what they write is held to `tests/bench/schema.json`, and what they refuse is
//! told in so many words. GPUs are skipped without g++; MP_TRAIN_REQUIRE_EMULATOR=1 makes that a failure.
#![allow(clippy::unwrap_used, dead_code)]

mod cuda_emulator;
#[path = "run/program.rs"]
mod program;
#[path = "bench/schema.rs"]
mod schema;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use cuda_emulator::Emulator;
use program::{fail, mp_train, run, succeed};
use schema::Schema;
use serde_json::{Map, Value, json};

/// Few steps of the smallest model.
const TINY: &str = "bench --size tiny --threads 2 --gradient-accumulation 4 --warm-up 1 --steps 2 \
                    --sequence-length 17";

fn tiny(more: &str) -> Command {
    mp_train(TINY.split_whitespace().chain(more.split_whitespace()))
}

fn schema() -> Schema {
    Schema::parse(include_str!("bench/schema.json"))
}

#[track_caller]
fn document(text: &str) -> Value {
    let document = serde_json::from_str(text).unwrap();
    let problems = schema().problems(&document);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    document
}

/// `scripts/bench.sh` as CI runs it, with this build of the program; what it wrote.
fn script(folder: &Path, devices: &str, adjust: impl FnOnce(&mut Command)) -> (String, Value) {
    let results = folder.join("bench.json");
    let mut command = Command::new("bash");
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench.sh"))
        .env("QUICK", "1")
        .env("BINARY", env!("CARGO_BIN_EXE_mp-train"))
        .env("DEVICES", devices)
        .env("RESULTS", &results);
    adjust(&mut command);
    let ended = succeed(&mut command);
    (
        ended.stdout,
        document(&fs::read_to_string(results).unwrap()),
    )
}

fn layouts(document: &Value) -> &Vec<Value> {
    document["layouts"].as_array().unwrap()
}

/// Numbers that belong together.
fn check_numbers(layout: &Value) {
    let measured = &layout["measured"];
    let number = |path: &str| measured.pointer(path).and_then(Value::as_f64).unwrap();
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.abs().max(b.abs());
    let median = number("/step_seconds/median");
    assert!(number("/step_seconds/min") <= median && median <= number("/step_seconds/max"));
    assert!(near(
        number("/tokens_per_second") * median,
        number("/rows/tokens")
    ));
    assert!(near(
        number("/samples_per_second") * median,
        number("/rows/samples")
    ));
    assert!(near(
        number("/model_tflops") * 1e12 * median,
        number("/needed_flops/total")
    ));
    let stages = layout["devices"].as_array().unwrap().len();
    assert_eq!(measured["stages"].as_array().unwrap().len(), stages);
    let profile = &measured["profile"];
    assert_eq!(profile["work_seconds"].as_array().unwrap().len(), stages);
    for work in profile["work_seconds"].as_array().unwrap() {
        // Every kind of work that every stage has.
        for kind in ["products", "attention", "elementwise", "optimizer"] {
            assert!(work[kind].as_f64().unwrap() > 0.0, "{kind}: {work}");
        }
    }
    let of_stages = measured["stages"].as_array().unwrap().iter();
    let planned: u64 = of_stages
        .map(|of| of["planned_bytes"].as_u64().unwrap())
        .sum();
    let of_devices = measured["memory"].as_array().unwrap().iter();
    let of_devices: u64 = of_devices
        .map(|of| of["planned_bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(planned, of_devices);
}

#[test]
fn the_script_measures_every_layout_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let (table, document) = script(folder.path(), "cpu cpu", |_| {});
    let names: Vec<(u64, &str)> = layouts(&document)
        .iter()
        .map(|layout| {
            let layout = &layout["layout"];
            (
                layout["stages"].as_u64().unwrap(),
                layout["schedule"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        names,
        [(1, "1f1b"), (2, "1f1b"), (2, "gpipe"), (2, "interleaved")]
    );
    for layout in layouts(&document) {
        check_numbers(layout);
        let memory = &layout["measured"]["memory"];
        assert_eq!(
            memory.as_array().unwrap().len(),
            1,
            "both stages are on one device"
        );
        assert_eq!(memory[0]["measured_as"], "resident_rise");
    }
    // Every layout has the same weights, whichever stage made them.
    let loss = |at: usize| &layouts(&document)[at]["measured"]["last_loss"];
    assert!((1..4).all(|at| loss(at) == loss(0)));
    let bubble = |at: usize| &layouts(&document)[at]["measured"]["bubble_by_formula"];
    assert_eq!(bubble(0), 0.0);
    // (p - 1) / (m + p - 1) with 4 micro-batches, and with two parts per stage.
    assert_eq!(bubble(1), 0.2);
    assert_eq!(bubble(3), 1.0 / 9.0);
    // The commit of the working tree, where there is one.
    let head = Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "HEAD"])
        .output();
    if let Some(head) = head.ok().filter(|head| head.status.success()) {
        let commit = document["commit"].as_str().unwrap();
        assert!(commit.starts_with(String::from_utf8_lossy(&head.stdout).trim()));
    }
    for word in [
        "tokens/s",
        "bubble",
        "interleaved x 2",
        "products",
        "waiting",
        "TFLOP/s",
    ] {
        assert!(table.contains(word), "no {word:?} in\n{table}");
    }
}

#[test]
fn the_script_measures_every_layout_on_gpus() {
    let Some(emulator) = Emulator::build() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (_, document) = script(folder.path(), "0 1", |command| {
        emulator.command_env(command);
        command.env("EMULATOR_DEVICES", "2");
    });
    let machine = &document["machine"];
    assert_eq!(machine["gpus"].as_array().unwrap().len(), 2);
    assert_eq!(document["matmul"].as_array().unwrap().len(), 2);
    assert_eq!(document["matmul"][0]["precision"], "f16");
    assert_eq!(document["options"]["precision"], "f16");
    assert_eq!(layouts(&document).len(), 4);
    for layout in layouts(&document) {
        check_numbers(layout);
    }
    let two = &layouts(&document)[1]["measured"];
    assert_eq!(two["memory"].as_array().unwrap().len(), 2);
    assert_ne!(two["transport"], "");
}

#[test]
fn memory_of_a_gpu_is_what_it_rises_by_from_before_it_was_opened() {
    let Some(emulator) = Emulator::build() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    // Says 100 MiB when it is first asked, later 400.
    let smi = folder.path().join("nvidia-smi");
    let asked = folder.path().join("asked");
    let asked = asked.display();
    let text = format!(
        "#!/bin/sh\nname=$(cat {folder}/name)\nif [ -e {asked} ]; then used=400; else used=100; fi\n\
         : >{asked}\necho \"$name, $used, 570.1.2\"\n",
        folder = folder.path().display()
    );
    fs::write(&smi, text).unwrap();
    fs::set_permissions(&smi, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", folder.path().display());
    let measure = |name: &str| {
        fs::write(folder.path().join("name"), name).unwrap();
        let _ = fs::remove_file(folder.path().join("asked"));
        let mut command = tiny("--devices 0,0 --profile-steps 0 --json");
        emulator.command_env(&mut command);
        command
            .env("PATH", &path)
            .env_remove("CUDA_VISIBLE_DEVICES");
        document(&succeed(&mut command).stdout)
    };
    // Another name: whose memory that is is not clear, and CUDA is asked.
    let other = measure("NVIDIA Other");
    let memory = &layouts(&other)[0]["measured"]["memory"];
    assert_eq!(
        memory.as_array().unwrap().len(),
        1,
        "two stages share a GPU"
    );
    assert_eq!(memory[0]["measured_as"], "gpu_rise_by_cuda");
    let (planned, peak) = (&memory[0]["planned_bytes"], &memory[0]["peak_bytes"]);
    assert!(peak.as_u64() >= planned.as_u64(), "{memory}");
    let name = other["machine"]["gpus"][0]["name"].as_str().unwrap();
    let known = measure(name);
    assert_eq!(known["machine"]["driver"], "570.1.2");
    let memory = &layouts(&known)[0]["measured"]["memory"][0];
    assert_eq!(memory["measured_as"], "gpu_rise_by_nvidia_smi");
    assert_eq!(memory["peak_bytes"], 300 << 20);
    assert_eq!(layouts(&known)[0]["measured"]["profile"], Value::Null);
}

/// All objects of a document, by their place.
fn objects(value: &Value, place: String, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                objects(member, format!("{place}/{name}"), found);
            }
            found.push(place);
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                objects(item, format!("{place}/{index}"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn the_schema_refuses_what_is_wrong() {
    let schema = schema();
    let command = "--devices cpu,cpu --layouts 2,2:interleaved:3 --json";
    let ended = run(&mut tiny(command));
    let right = document(&ended.stdout);
    let at = |document: &Value, place: &str| -> Map<String, Value> {
        let object = document.pointer(place).unwrap();
        object.as_object().unwrap().clone()
    };
    let with = |place: &str, value: Value| {
        let mut wrong = right.clone();
        *wrong.pointer_mut(place).unwrap() = value;
        wrong
    };
    let mut places = Vec::new();
    objects(&right, String::new(), &mut places);
    assert!(places.len() > 25, "{places:?}");
    let mut let_through = Vec::new();
    for place in &places {
        let mut more = at(&right, place);
        more.insert("what_is_this".to_owned(), json!(1));
        if schema.is_valid(&with(place, Value::Object(more))) {
            let_through.push(format!("a member too many at {place}"));
        }
        for name in at(&right, place).keys() {
            let mut fewer = at(&right, place);
            fewer.remove(name);
            if schema.is_valid(&with(place, Value::Object(fewer))) {
                let_through.push(format!("{place} without {name}"));
            }
            let member = format!("{place}/{name}");
            if schema.is_valid(&with(&member, json!({"not": "this"}))) {
                let_through.push(format!("an object at {member}"));
            }
        }
    }
    for (place, value) in [
        ("/format", json!(2)),
        ("/date", json!("yesterday")),
        ("/options/size", json!("chatglm-7b")),
        ("/options/devices/0", json!("gpu")),
        ("/matmul", json!([])),
        ("/matmul/0/tflops", json!(0)),
        ("/layouts/0/layout/stages", json!(1.5)),
        ("/layouts/0/measured/step_seconds/all", json!([])),
        ("/layouts/0/measured/tokens_per_second", json!("fast")),
        ("/layouts/0/measured/last_loss", Value::Null),
        ("/layouts/0/measured/memory/0/measured_as", json!("guess")),
        ("/layouts/0/measured/profile/bubble", json!(1.5)),
        // Neither measured nor failed.
        ("/layouts/0/measured", Value::Null),
        ("/layouts/1/failure", Value::Null),
    ] {
        if schema.is_valid(&with(place, value.clone())) {
            let_through.push(format!("{value} at {place}"));
        }
    }
    assert!(let_through.is_empty(), "{}", let_through.join("\n"));
}

#[test]
fn a_layout_that_cannot_be_is_told_and_the_others_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("results.json");
    let mut command = tiny("--devices cpu,cpu --layouts 2:interleaved2:3,1:3 --output");
    command.arg(&results);
    let ended = run(&mut command);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(
        ended
            .stderr
            .contains("error: 1 of 2 layouts could not be measured")
    );
    assert!(ended.stdout.contains("not measured: "), "{}", ended.stdout);
    let document = document(&fs::read_to_string(results).unwrap());
    let [first, second] = &layouts(&document)[..] else {
        panic!("two layouts: {document}");
    };
    let reason = first["failure"]["reason"].as_str().unwrap();
    assert!(reason.contains("interleaved"), "{reason}");
    check_numbers(second);
    // Alone, it is the command's own error.
    let mut command = tiny("--devices cpu,cpu --layouts 2:interleaved2:3 --json");
    fail(&mut command, 2, &[reason]);
}

#[test]
fn rows_of_several_lengths_go_unpadded() {
    let mut listed = mp_train(
        "bench --size tiny --gradient-accumulation 4 --warm-up 0 --steps 1 --profile-steps 2"
            .split_whitespace()
            .chain("--devices cpu --micro-batch-size 2 --lengths 5,33,4 --json".split_whitespace()),
    );
    let listed = document(&succeed(&mut listed).stdout);
    let measured = &layouts(&listed)[0]["measured"];
    // 5 33, 4 5, 33 4, 5 33.
    let rows = &measured["rows"];
    assert_eq!(
        (&rows["samples"], &rows["tokens"]),
        (&json!(8), &json!(122))
    );
    assert_eq!(rows["padded_tokens"], 2 * (33 + 5 + 33 + 33));
    // Micro-batches that differ are not predicted.
    assert_eq!(measured["profile"]["prediction"], Value::Null);
    let mixed = document(&succeed(&mut tiny("--devices cpu --lengths mixed --json")).stdout);
    let again = document(&succeed(&mut tiny("--devices cpu --lengths mixed --json")).stdout);
    let rows = |document: &Value| layouts(document)[0]["measured"]["rows"].clone();
    assert_eq!(rows(&mixed), rows(&again));
    assert_eq!(
        mixed["options"]["lengths"],
        json!({"kind": "mixed", "longest": 17})
    );
    // Every kind of adapter trains on them.
    for adapter in ["--adapter prefix --pre-seq-len 3", "--adapter full"] {
        let command = format!("--devices cpu --lengths mixed --json {adapter}");
        check_numbers(&layouts(&document(&succeed(&mut tiny(&command)).stdout))[0]);
    }
}

#[test]
fn a_step_is_drawn_for_every_layout() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = tiny("--devices cpu,cpu --layouts 1,2:gpipe");
    command.current_dir(folder.path());
    command.args(["--timeline", "step.svg", "--trace", "step.json"]);
    succeed(&mut command);
    for layout in ["1-1f1b-4", "2-gpipe-4"] {
        let svg = fs::read_to_string(folder.path().join(format!("step.{layout}.svg"))).unwrap();
        assert!(
            svg.starts_with("<svg") && svg.contains("stage 0"),
            "{layout}"
        );
        assert_eq!(svg.contains("stage 1"), layout.starts_with('2'));
        let trace = fs::read_to_string(folder.path().join(format!("step.{layout}.json"))).unwrap();
        serde_json::from_str::<Value>(&trace).unwrap();
    }
    let mut command = tiny("--devices cpu --timeline one.svg");
    command.current_dir(folder.path());
    succeed(&mut command);
    assert!(folder.path().join("one.svg").exists());
    // Nothing half-written is left.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 5);
}

#[test]
fn products_summed_in_f16_are_named() {
    let Some(emulator) = Emulator::build() else {
        return;
    };
    let mut command = tiny("--devices 0 --product-sums f16 --json");
    emulator.command_env(&mut command);
    let document = document(&succeed(&mut command).stdout);
    assert_eq!(document["options"]["product_sums"], "f16");
    assert_eq!(document["matmul"][0]["product_sums"], "f16");
    check_numbers(&layouts(&document)[0]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (arguments, words) in [
        (
            "--devices cpu --product-sums f16",
            &["--product-sums f16 is for frozen weights on GPUs"][..],
        ),
        (
            "--devices 0 --adapter full --product-sums f16",
            &["--product-sums f16 is for frozen weights on GPUs"],
        ),
        ("--lengths 64,x", &["`x` is no length", "mixed"][..]),
        ("--lengths 64,,4", &["`` is no length"]),
        (
            "--lengths 3,64 --devices cpu",
            &["a row of 3 tokens", "to the 2048"],
        ),
        ("--lengths 64,9999 --devices cpu", &["a row of 9999 tokens"]),
        (
            "--sequence-length 9999 --devices cpu",
            &["a row of 9999 tokens"],
        ),
        (
            "--lengths mixed --sequence-length 2049 --devices cpu",
            &["a row of 2049 tokens"],
        ),
        ("--lengths 64 --sequence-length 8", &["give one of them"]),
        (
            "--layouts 2:gpip",
            &["`2:gpip` is no layout", "2:interleaved2:16"],
        ),
        (
            "--layouts 3 --devices cpu,cpu",
            &["3 stages", "--devices names 2"],
        ),
        ("--timeline a.svg --profile-steps 0", &["--profile-steps 0"]),
        ("--timeline nowhere/a.svg --devices cpu", &["nowhere/a.svg"]),
        ("--size chatglm-7b", &["chatglm-7b", "small"]),
        ("--devices cpu,0", &["cpu and GPUs together"]),
    ] {
        let words_of = arguments.split_whitespace();
        let mut command = mp_train(["bench", "--size", "tiny"]);
        if arguments.contains("--size") {
            command = mp_train(["bench"]);
        }
        fail(command.args(words_of), 2, words);
    }
}

#[test]
fn a_machine_without_a_gpu_is_told_how_to_measure_its_cpu() {
    let Some(emulator) = Emulator::build() else {
        return;
    };
    let mut command = tiny("--devices 0");
    emulator.command_env(&mut command);
    command.env("EMULATOR_DEVICES", "0");
    fail(&mut command, 2, &["--size small --devices cpu"]);
    let mut command = tiny("--devices 0,1");
    emulator.command_env(&mut command);
    fail(&mut command, 2, &["1"]);
}
