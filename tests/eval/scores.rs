//! Scores and words against those of jieba, rouge_chinese and nltk (`make_pairs.py`).

use std::fs;
use std::path::PathBuf;

use mp_train::eval::scores::{Mean, Scores, stripped};
use mp_train::eval::words::cut;
use serde_json::Value;

const NAMES: [&str; 4] = ["bleu-4", "rouge-1", "rouge-2", "rouge-l"];

fn values(scores: Scores) -> [f64; 4] {
    [scores.bleu4, scores.rouge1, scores.rouge2, scores.rouge_l]
}

/// The pairs that are in the tree, or those of `EVAL_PAIRS`.
fn pairs() -> Vec<Value> {
    let here = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/eval/pairs.json");
    let path = std::env::var_os("EVAL_PAIRS").map_or_else(here, PathBuf::from);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn words_and_scores_are_those_of_the_python_packages() {
    let pairs = pairs();
    assert!(pairs.len() >= 200);
    let (mut mean, mut expected_sums) = (Mean::default(), [0.0; 4]);
    let (mut problems, mut largest, mut unscored) = (Vec::new(), 0.0_f64, 0);
    for pair in &pairs {
        let text = |name: &str| pair[name].as_str().unwrap();
        for (name, words) in ["answer", "label"].into_iter().zip(0..) {
            let expected: Vec<&str> = pair["words"][words]
                .as_array()
                .unwrap()
                .iter()
                .map(|word| word.as_str().unwrap())
                .collect();
            let found = cut(text(name));
            if found != expected {
                problems.push(format!("{found:?}\nnot {expected:?}"));
            }
        }
        let scores = Scores::of(text("answer"), text("label"));
        mean.add(scores);
        for (i, name) in NAMES.into_iter().enumerate() {
            // Without a word the package raises an error; here it is worth nothing.
            unscored += usize::from(pair[name].is_null());
            let expected = pair[name].as_f64().unwrap_or(0.0);
            let error = (values(scores)[i] - expected).abs();
            expected_sums[i] += expected;
            largest = largest.max(error);
            if error > 1e-6 {
                problems.push(format!(
                    "{name} {} not {expected}: {pair}",
                    values(scores)[i]
                ));
            }
        }
    }
    assert!(
        problems.is_empty(),
        "{} problems, the first:\n{}",
        problems.len(),
        problems[..problems.len().min(8)].join("\n")
    );
    assert!(unscored > 0, "no pair without a word");
    for (found, sum) in values(mean.get()).into_iter().zip(expected_sums) {
        assert!((found - sum / pairs.len() as f64).abs() < 1e-6);
        assert!(
            (10.0..90.0).contains(&found),
            "the pairs are too alike: {found}"
        );
    }
    println!("{} pairs, largest difference {largest:.1e}", pairs.len());
}

#[test]
fn white_space_around_a_text_is_pythons() {
    assert_eq!(stripped("\u{1f} \u{3000}a b\u{a0}\n\u{85}"), "a b");
    assert_eq!(stripped("\u{200b}a"), "\u{200b}a");
}
