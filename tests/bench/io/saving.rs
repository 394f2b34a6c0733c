//! What a checkpoint costs the steps around it.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use mp_train::config::model::ModelConfig;
use mp_train::config::run::RunConfig;
use mp_train::report::Event;
use mp_train::train;

use crate::figures::Report;
use crate::loading::write_model;

const EVERY: u64 = 12;

/// A whole model of 25.8 M parameters, 310 MB of state; rows of 12 tokens.
fn write_run(folder: &Path, steps: u64) -> RunConfig {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b/model");
    let model = folder.join("model");
    fs::create_dir_all(&model).unwrap();
    let text = fs::read_to_string(base.join("config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (key, value) in [
        ("hidden_size", 512),
        ("inner_hidden_size", 2_048),
        ("vocab_size", 25_600),
    ] {
        json[key] = value.into();
    }
    json["tie_word_embeddings"] = true.into();
    fs::write(model.join("config.json"), json.to_string()).unwrap();
    let config = ModelConfig::from_json_file(&model.join("config.json")).unwrap();
    write_model(&model.join("model.safetensors"), &config);
    let row = |row: usize| {
        let text = (0..8).map(|t| 5 + (row * 31 + t * 7) % 150);
        let mut ids: Vec<usize> = text.collect();
        ids.extend([191, 194, 7, 195]);
        let label = |(t, id): (usize, &usize)| if t <= 8 { -100 } else { *id as i64 };
        let labels: Vec<i64> = ids.iter().enumerate().map(label).collect();
        format!("{{\"input_ids\": {ids:?}, \"labels\": {labels:?}}}\n")
    };
    fs::write(
        folder.join("rows.jsonl"),
        (0..64).map(row).collect::<String>(),
    )
    .unwrap();
    let toml = format!(
        "[model]\npath = {model:?}\nprecision = \"f32\"\n[adapter]\nkind = \"full\"\n[data]\ntrain = {rows:?}\n\
         [pipeline]\ndevices = [\"cpu\"]\n[run]\noutput = {output:?}\nmax_steps = {steps}\n\
         save_steps = {EVERY}\nsave_total_limit = 1\nmicro_batch_size = 1\n",
        rows = folder.join("rows.jsonl"),
        output = folder.join("output"),
    );
    let path = folder.join("run.toml");
    fs::write(&path, toml).unwrap();
    RunConfig::from_file(&path).unwrap()
}

pub fn steps(report: &mut Report, folder: &Path) {
    let folder = folder.join("saving");
    let steps = EVERY * (report.runs as u64 + 2);
    let config = write_run(&folder, steps);
    // From one step's report to the next.
    let (mut usual, mut behind_save, mut writing) = (Vec::new(), Vec::new(), Vec::new());
    let (mut last, mut due) = (Instant::now(), None);
    let mut reporter = |event: Event| match event {
        Event::Step(step) => {
            let seconds = last.elapsed().as_secs_f64();
            last = Instant::now();
            match (step.step - 1) % EVERY {
                // The first ones touch their memory.
                _ if step.step <= EVERY => {}
                0 => behind_save.push(seconds),
                _ => usual.push(seconds),
            }
            if step.step.is_multiple_of(EVERY) {
                due = Some(Instant::now());
            }
        }
        Event::CheckpointSaved { .. } => {
            writing.extend(due.take().map(|due: Instant| due.elapsed().as_secs_f64()));
        }
        _ => {}
    };
    train::run(&config, &mut reporter, &AtomicBool::new(false)).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    let figures = [
        ("a step".to_owned(), usual),
        ("a step behind one that is saved".to_owned(), behind_save),
        (
            "from the end of a step to its checkpoint".to_owned(),
            writing,
        ),
    ];
    report.add(
        "saving a whole model of 25.8 M parameters",
        1.0,
        "step",
        &figures,
    );
}
