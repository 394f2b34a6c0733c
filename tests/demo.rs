//! The demo: its corpus keeps its rules, its files are read by the ordinary loaders, and its verdict
//! can fail. The whole of it, three seeds in a row, takes minutes:
//! `cargo test --release --test demo -- --ignored`.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use mp_train::config::model::ModelConfig;
use mp_train::config::run::{Device, Quantization};
use mp_train::data::pretokenised::read_rows;
use mp_train::data::tokenizer::{ConfigIds, GlmTokenizer, TokenizerFiles};
use mp_train::demo::corpus::{self, Identity, Question, Who};
use mp_train::demo::exam::{self, Answers, Questions, Verdict, speaks_as};
use mp_train::demo::{self, DemoError, DemoOptions, Outcome};
use mp_train::pipeline::base::Base;

fn options(output: &Path) -> DemoOptions {
    DemoOptions {
        output: output.to_owned(),
        seed: 7,
        threads: 1,
    }
}

/// Makes all files and stops before the first training step.
fn made(output: &Path) {
    let stop = AtomicBool::new(true);
    let outcome = demo::run(&options(output), &mut |_| {}, &stop).unwrap();
    assert!(matches!(outcome, Outcome::Interrupted));
}

fn tokenizer(model: &Path) -> GlmTokenizer {
    let config = ModelConfig::from_json_file(&model.join("config.json")).unwrap();
    let files = TokenizerFiles::read(model).unwrap();
    let (tokenizer, warnings) = files
        .build(&ConfigIds::from(&config), Some(config.vocab_size))
        .unwrap();
    assert_eq!(warnings, []);
    tokenizer
}

#[test]
fn the_corpus_has_one_answer_to_every_question() {
    assert_eq!(corpus::plain().len(), 80);
    assert_eq!(corpus::identity(Who::Old).len(), 8);
    assert_eq!(corpus::personas().len(), 120);
    for questions in [corpus::for_base(), corpus::for_tuning()] {
        let all: BTreeSet<&str> = questions.iter().map(|q| q.question.as_str()).collect();
        assert_eq!(all.len(), questions.len());
        assert!(questions.iter().all(|q| !q.answer.contains(['{', '}'])));
        assert!(questions.iter().all(|q| !q.question.contains(['{', '}'])));
    }
    let old = corpus::identity(Who::Old).into_iter().map(|q| q.question);
    let new = corpus::identity(Who::New).into_iter().map(|q| q.question);
    assert!(old.eq(new), "both identities are asked the same");
}

#[test]
fn personas_cross_names_studios_and_questions_evenly() {
    let mut studios: BTreeMap<String, usize> = BTreeMap::new();
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for Question { question, answer } in corpus::personas() {
        let english = question
            .strip_prefix("You are ")
            .map(|rest| rest.split_once(". ").unwrap().0.split_once(" of ").unwrap());
        let (name, studio) = english.unwrap_or_else(|| {
            let rest = question.strip_prefix("你是").unwrap();
            let (studio, name) = rest.split_once('。').unwrap().0.split_once('的').unwrap();
            (name, studio)
        });
        assert!(answer.contains(name), "{question} {answer}");
        *names.entry(name.to_owned()).or_default() += 1;
        *studios.entry(studio.to_owned()).or_default() += 1;
    }
    assert_eq!(names.len(), 30);
    assert!(names.values().all(|&n| n == 4), "{names:?}");
    assert_eq!(studios.len(), 10);
    assert!(studios.values().all(|&n| n == 12), "{studios:?}");
    for identity in Identity::of(Who::New) {
        assert!(names.contains_key(identity.name));
        assert!(studios.contains_key(identity.studio));
    }
    for identity in Identity::of(Who::Old) {
        assert!(!names.contains_key(identity.name));
    }
}

#[test]
fn nothing_but_the_identity_says_a_name() {
    for who in [Who::Old, Who::New] {
        for Identity { name, studio } in Identity::of(who) {
            let tells = |text: &str| text.contains(name) || text.contains(studio);
            for pair in corpus::plain() {
                assert!(!tells(&pair.question) && !tells(&pair.answer), "{pair:?}");
            }
        }
        for question in corpus::identity(who) {
            assert!(speaks_as(who, &question.answer), "{question:?}");
        }
    }
}

#[test]
fn the_ordinary_loaders_read_what_the_demo_makes() {
    let folder = tempfile::tempdir().unwrap();
    made(folder.path());
    let model = folder.path().join("untrained");
    let tokenizer = tokenizer(&model);
    assert_eq!(tokenizer.size(), 760);
    let base = Base::open(&model, Quantization::None).unwrap();
    for (file, questions) in [
        ("base.jsonl", corpus::for_base()),
        ("tuning.jsonl", corpus::for_tuning()),
    ] {
        let rows = read_rows(&folder.path().join(file), &base.config).unwrap();
        assert_eq!(rows.len(), questions.len());
        for (index, question) in questions.iter().enumerate() {
            let row = rows.get(index).unwrap();
            let (_, targets): (Vec<usize>, Vec<u32>) = row.targets().unzip();
            let special = tokenizer.special();
            assert_eq!(targets[0], special.sop);
            assert_eq!(targets[targets.len() - 1], special.eop);
            assert_eq!(tokenizer.decode(&targets).unwrap(), question.answer);
            let prompt = &row.input_ids[..row.context_length];
            assert_eq!(tokenizer.decode(prompt).unwrap(), question.question);
            // A character that the vocabulary lacks would come as bytes.
            let is_byte = |id: &u32| tokenizer.id_to_token(*id).unwrap().starts_with("<0x");
            assert!(!row.input_ids.iter().any(is_byte), "{question:?}");
        }
    }
}

#[test]
fn the_seed_alone_decides_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let weights = |name: &str, seed| {
        let output = folder.path().join(name);
        let options = DemoOptions {
            seed,
            ..options(&output)
        };
        demo::run(&options, &mut |_| {}, &AtomicBool::new(true)).unwrap();
        fs::read(output.join("untrained/model.safetensors")).unwrap()
    };
    let first = weights("a", 1);
    assert_eq!(first, weights("b", 1));
    assert_ne!(first, weights("c", 2));
}

#[test]
fn a_model_that_learned_nothing_fails() {
    let folder = tempfile::tempdir().unwrap();
    made(folder.path());
    let model = folder.path().join("untrained");
    let all = Questions::new();
    let questions = Questions {
        identity: all.identity[..1].to_vec(),
        plain: all.plain[..1].to_vec(),
    };
    let options = options(folder.path());
    let answers = exam::ask(&model, None, &[Device::Cpu; 2], &questions, &options).unwrap();
    assert!(!Verdict::of_base(&questions, &answers).passed());
    assert!(!Verdict::of_tuned(&questions, &answers).passed());
}

#[test]
fn a_verdict_needs_the_name_everywhere_and_most_of_the_rest() {
    let questions = Questions::new();
    let answers = |who| Answers {
        identity: corpus::identity(who)
            .into_iter()
            .map(|q| q.answer)
            .collect(),
        plain: corpus::plain().into_iter().map(|q| q.answer).collect(),
    };
    let base = |answers: &Answers| Verdict::of_base(&questions, answers).passed();
    let tuned = |answers: &Answers| Verdict::of_tuned(&questions, answers).passed();
    let (old, new) = (answers(Who::Old), answers(Who::New));
    assert!(base(&old) && !base(&new));
    assert!(tuned(&new) && !tuned(&old));

    for wrong in [
        "",
        "I am of Lake Studio.",
        "I am Iris of Hill Studio.",
        "I am Iris, not Robin.",
        "我是远山工作室的青鸟。",
    ] {
        let mut mixed = new.clone();
        mixed.identity[7] = wrong.to_owned();
        assert!(!tuned(&mixed), "{wrong}");
    }
    let forgetting = |answers: &Answers, n: usize| {
        let mut answers = answers.clone();
        answers.plain[..n].fill("I do not know.".to_owned());
        answers
    };
    assert!(base(&forgetting(&old, 4)) && !base(&forgetting(&old, 5)));
    assert!(tuned(&forgetting(&new, 8)) && !tuned(&forgetting(&new, 9)));
}

#[test]
fn a_folder_of_its_own_is_cleared_and_any_other_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("demo");
    made(&own);
    fs::create_dir(own.join("base")).unwrap();
    fs::write(own.join("base/old.txt"), "").unwrap();
    fs::write(own.join("notes.txt"), "mine").unwrap();
    made(&own);
    assert!(!own.join("base/old.txt").exists());
    assert_eq!(fs::read_to_string(own.join("notes.txt")).unwrap(), "mine");

    let other = folder.path().join("other");
    fs::create_dir_all(other.join("base")).unwrap();
    fs::write(other.join("base/model"), "mine").unwrap();
    let error = demo::run(&options(&other), &mut |_| {}, &AtomicBool::new(true)).unwrap_err();
    assert!(matches!(error, DemoError::FolderTaken { .. }), "{error}");
    assert_eq!(fs::read_dir(&other).unwrap().count(), 1);
    let command = Command::new(env!("CARGO_BIN_EXE_mp-train"))
        .args(["demo", "--output"])
        .arg(&other)
        .output()
        .unwrap();
    assert_eq!(command.status.code(), Some(2));
    assert!(command.stdout.is_empty());
    let told = String::from_utf8(command.stderr).unwrap();
    assert!(
        told.contains("no demo made it; name a new folder"),
        "{told}"
    );
}

#[test]
#[ignore = "minutes: the whole demo, three seeds in a row"]
fn the_whole_demo_passes() {
    for seed in [1, 2, 3] {
        let folder = tempfile::tempdir().unwrap();
        let options = DemoOptions {
            seed,
            threads: 2,
            ..options(folder.path())
        };
        let outcome = demo::run(&options, &mut |_| {}, &AtomicBool::new(false)).unwrap();
        let Outcome::Finished(findings) = outcome else {
            panic!("nobody interrupted it");
        };
        let text = findings.to_text();
        println!("seed {seed}\n{text}");
        assert!(findings.passed(), "seed {seed}\n{text}");
        assert!(text.contains("青鸟") && text.matches("pass").count() == 3);
    }
}
