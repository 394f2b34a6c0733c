//! Sampled answers.

use serde_json::{Value, json};

use super::setup::{Setup, golden, ids};

const LONG: [&str; 3] = ["--max-new-tokens", "24", "--no-stop-at-eop"];

fn questions() -> Vec<Value> {
    ["hi", "hi", "who are you?"]
        .map(|prompt| json!({ "prompt": prompt }))
        .to_vec()
}

fn all_ids(answers: &[Value]) -> Vec<Vec<u32>> {
    answers.iter().map(ids).collect()
}

#[test]
fn the_same_seed_says_the_same_on_any_number_of_stages() {
    let setup = Setup::new();
    let prefix = golden("ptuning_checkpoint").to_str().unwrap().to_owned();
    for adapter in [&[][..], &["--adapter", &prefix]] {
        let sampled = |seed: &str, devices: &str| {
            let flags = ["--temperature", "1.3", "--top-k", "60", "--top-p", "0.95"];
            let place = ["--seed", seed, "--devices", devices];
            let flags = [&flags[..], &LONG, &place, adapter].concat();
            all_ids(&setup.answers(&questions(), &flags))
        };
        let first = sampled("1", "cpu");
        assert_eq!(first, sampled("1", "cpu"));
        assert_eq!(first, sampled("1", "cpu,cpu,cpu"));
        assert_ne!(first, sampled("2", "cpu"));
        assert_ne!(
            first[0], first[1],
            "each prompt has random numbers of its own"
        );
    }
}

#[test]
fn narrow_settings_are_greedy_and_a_penalty_avoids_what_was_said() {
    let setup = Setup::new();
    let found = |flags: &[&str]| all_ids(&setup.answers(&questions(), &[flags, &LONG].concat()));
    let greedy = found(&[]);
    assert_eq!(greedy[0], greedy[1]);
    for flags in [
        &["--temperature", "0"][..],
        &["--top-k", "1"],
        &["--top-p", "0"],
        &["--temperature", "1e-30"],
        &["--repetition-penalty", "1", "--seed", "5"],
    ] {
        assert_eq!(found(flags), greedy, "{flags:?}");
    }
    assert_ne!(found(&["--temperature", "2"]), greedy);
    let repeated = |answers: &[Vec<u32>]| -> usize {
        let of_one =
            |ids: &Vec<u32>| ids.len() - ids.iter().collect::<std::collections::HashSet<_>>().len();
        answers.iter().map(of_one).sum()
    };
    let (before, after) = (
        repeated(&greedy),
        repeated(&found(&["--repetition-penalty", "5"])),
    );
    assert!(after < before, "{after} repetitions instead of {before}");
}

#[test]
fn text_has_no_ids_beyond_the_tokenizer() {
    // Four rows of the head have no id, as 184 of ChatGLM-6B's have none.
    let setup = Setup::with(196, |_| {});
    let flags = [
        "--temperature",
        "50",
        "--max-new-tokens",
        "300",
        "--no-stop-at-eop",
    ];
    let answers = setup.answers(&[json!({ "prompt": "hi" })], &flags);
    let found = ids(&answers[0]);
    assert_eq!(found.len(), 300);
    assert!(found.iter().all(|&id| id < 196));
    let rows = [json!({ "input_ids": setup.prompt_ids("hi") })];
    let found = ids(&setup.answers(&rows, &flags)[0]);
    assert!(found.iter().any(|&id| id >= 196), "ids are the model's own");
}
