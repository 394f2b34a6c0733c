//! From text to the token cache, against what makes its ids alone.

use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mp_train::config::model::ModelConfig;
use mp_train::config::model_size::ModelSize;
use mp_train::data::byte_level::Tokens;
use mp_train::data::cache::{CacheSettings, RowKind, Tokenised, tokenised};
use mp_train::data::sentencepiece::ModelProto;
use mp_train::data::text_rows::TextSettings;
use mp_train::data::tokenizer::{Generation, GlmTokenizer};

use crate::figures::{Case, Report, seconds};

const ROWS: usize = 60_000;
const WORDS: [&str; 24] = [
    "apples",
    "together",
    "station",
    "because",
    "question",
    "the",
    "of",
    "a",
    "under",
    "weather",
    "今天",
    "天气",
    "我们",
    "一起",
    "苹果",
    "因为",
    "问题",
    "的",
    "了",
    "12",
    "3.5",
    "книги",
    "mañana",
    "however",
];

/// Rows in the alpaca form, a third Chinese, of about 400 bytes: prompts of 5 to 24 words, answers of 20 to 83.
fn texts() -> Vec<[String; 2]> {
    let mut state = 1_u64;
    let mut next = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut text = |least: usize, spread: usize| {
        let words = least + next(spread);
        let words: Vec<&str> = (0..words).map(|_| WORDS[next(WORDS.len())]).collect();
        words.join(" ")
    };
    (0..ROWS).map(|_| [text(5, 20), text(20, 64)]).collect()
}

fn file(name: &str) -> Vec<u8> {
    std::fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/tokenizer")
            .join(name),
    )
    .unwrap()
}

/// ChatGLM-6B's form, over the vocabulary that the tests use.
pub fn sentence_piece() -> GlmTokenizer {
    GlmTokenizer::chatglm(ModelProto::parse(&file("v1.model")).unwrap(), 0).unwrap()
}

/// The model that reads the ids of a tokenizer; only its ids and its longest row matter.
fn config(tokenizer: &GlmTokenizer) -> ModelConfig {
    if tokenizer.generation() == Generation::Glm4 {
        return ModelSize::Glm4_9b.config();
    }
    ModelConfig {
        vocab_size: 2_000,
        context_ids: Some(mp_train::config::model::ContextIds {
            bos_token_id: 1_660,
            mask_token_id: 1_656,
            gmask_token_id: 1_657,
        }),
        ..ModelSize::Tiny.config()
    }
}

/// Writes the rows to a file.
pub fn write_rows(folder: &Path) -> PathBuf {
    let path = folder.join("rows.jsonl");
    let mut out = BufWriter::new(std::fs::File::create(&path).unwrap());
    for [instruction, output] in texts() {
        let row = serde_json::json!({ "instruction": instruction, "input": "", "output": output });
        writeln!(out, "{row}").unwrap();
    }
    out.into_inner().unwrap();
    path
}

/// The rows of a file, through the cache.
pub fn cached(path: &Path, folder: &Path, tokenizer: &GlmTokenizer, threads: usize) -> Tokenised {
    let settings = TextSettings::default();
    let kind = RowKind::Text {
        settings: &settings,
        tokenizer,
    };
    let cache = CacheSettings {
        folder: Some(folder),
        threads,
    };
    let sources = [path.to_owned()];
    let mut go_on = |_| ControlFlow::Continue(());
    tokenised(&sources, kind, &config(tokenizer), cache, &mut go_on).unwrap()
}

/// Encodes all texts on so many threads, a share for each.
fn encode(texts: &[[String; 2]], threads: usize, encode: &(impl Fn(&str) -> usize + Sync)) {
    let share = texts.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for texts in texts.chunks(share) {
            scope.spawn(move || {
                let ids = texts.iter().flatten().map(|text| encode(text));
                std::hint::black_box(ids.sum::<usize>())
            });
        }
    });
}

pub fn rows(report: &mut Report, folder: &Path) {
    let path = write_rows(folder);
    let texts = texts();
    let bytes: usize = texts.iter().flatten().map(String::len).sum();
    let (texts, path) = (&texts[..], &path);
    let sentence_piece = sentence_piece();
    let hosted = mp_train::data::sentencepiece::hosted::Hosted::new(
        sentence_piece.sentence_piece().unwrap().clone(),
    );
    let hosted = hosted.pipeline().unwrap();
    let glm4 =
        GlmTokenizer::glm4(Tokens::from_ranks(&file("glm4/tokenizer.model")).unwrap()).unwrap();
    let library = tokenizers::Tokenizer::from_bytes(file("glm4/tokenizer.json")).unwrap();
    let (sentence_piece, hosted, glm4, library) = (&sentence_piece, &hosted, &glm4, &library);
    let mut counts = vec![1, report.threads];
    counts.dedup();
    let mut cases: Vec<Case<'_>> = Vec::new();
    for threads in counts {
        let mut alone = |name: &str, work: Box<dyn Fn(&str) -> usize + Sync>| {
            let name = format!("{name}, threads: {threads}");
            let work = move || seconds(|| encode(texts, threads, &work));
            cases.push((name, Box::new(work)));
        };
        alone(
            "SentencePiece: crate tokenizers around it, alone",
            Box::new(move |text| hosted.encode_fast(text, false).unwrap().len()),
        );
        alone(
            "SentencePiece: our encoder alone",
            Box::new(move |text| sentence_piece.encode(text).len()),
        );
        alone(
            "GLM-4: crate tokenizers alone",
            Box::new(move |text| library.encode_fast(text, false).unwrap().len()),
        );
        alone(
            "GLM-4: our encoder alone",
            Box::new(move |text| glm4.encode(text).len()),
        );
        for (name, tokenizer) in [("SentencePiece", sentence_piece), ("GLM-4", glm4)] {
            let work = move || {
                let cache = tempfile::tempdir_in(path.parent().unwrap()).unwrap();
                seconds(|| cached(path, cache.path(), tokenizer, threads))
            };
            let name = format!("{name}: file to token cache, threads: {threads}");
            cases.push((name, Box::new(work)));
        }
    }
    report.in_turn("tokenising", bytes as f64 / 1e6, "MB of text", cases);
}
