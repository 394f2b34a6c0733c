//! The token cache: found, made, made anew, never half-made, and never much in memory.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use mp_train::config::model::ModelConfig;
use mp_train::config::run::Quantization;
use mp_train::data::DataError;
use mp_train::data::batch::MicroBatch;
use mp_train::data::cache::{
    CacheSettings, CacheUse, Phase, Progress, RowKind, Tokenised, tokenised,
};
use mp_train::data::pretokenised::read_rows;
use mp_train::data::rows::Rows;
use mp_train::data::sentencepiece::ModelProto;
use mp_train::data::template::TemplateSettings;
use mp_train::data::text_rows::{BadRows, TextSettings};
use mp_train::data::tokenizer::GlmTokenizer;
use mp_train::data::training_data::{DataSettings, TrainingData, open_training_data};
use tempfile::TempDir;

/// Set in a child process: the folder it works in.
const CHILD_FOLDER: &str = "CACHE_TEST_FOLDER";

fn model() -> ModelConfig {
    ModelConfig {
        vocab_size: 2000,
        hidden_size: 64,
        inner_hidden_size: 256,
        architecture: mp_train::config::architecture::Architecture::CHATGLM,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 16,
        num_layers: 4,
        norm_epsilon: 1e-5,
        max_sequence_length: 256,
        context_ids: Some(mp_train::config::model::ContextIds {
            bos_token_id: 1660,
            mask_token_id: 1656,
            gmask_token_id: 1657,
        }),
        eos_token_ids: vec![1661],
        pad_token_id: Some(3),
        tie_word_embeddings: false,
        pre_seq_len: None,
        prefix_projection: false,
        quantization: Quantization::None,
    }
}

fn tokenizer() -> GlmTokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer/v1.model");
    let proto = ModelProto::parse(&fs::read(path).unwrap()).unwrap();
    GlmTokenizer::chatglm(proto, 0).unwrap()
}

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn settings(folder: &Path) -> CacheSettings<'_> {
    CacheSettings {
        folder: Some(folder),
        threads: 3,
    }
}

const IDS: RowKind<'static> = RowKind::TokenIds {
    bad_rows: BadRows::Fatal,
};

/// Rows of token ids of many lengths, some with positions of their own.
fn write_id_rows(path: &Path, rows: usize, tokens: usize) {
    let mut out = BufWriter::new(fs::File::create(path).unwrap());
    for row in 0..rows {
        let text = 1 + (row * 7) % tokens;
        let mut ids: Vec<usize> = (0..text).map(|t| 5 + (row + t) % 1000).collect();
        ids.extend([1657, 1660, 5 + row % 1000, 1661]);
        let label = |(t, id): (usize, &usize)| if t <= text { -100 } else { *id as i64 };
        let labels: Vec<i64> = ids.iter().enumerate().map(label).collect();
        let mut positions = String::new();
        if row % 5 == 2 {
            let places: Vec<usize> = (0..ids.len()).collect();
            positions = format!(", \"position_ids\": [{places:?}, {places:?}]");
        }
        writeln!(
            out,
            "{{\"input_ids\": {ids:?}, \"labels\": {labels:?}{positions}}}"
        )
        .unwrap();
    }
}

fn write_alpaca_rows(path: &Path, rows: usize) {
    let mut out = BufWriter::new(fs::File::create(path).unwrap());
    for row in 0..rows {
        writeln!(
            out,
            "{{\"instruction\": \"add {row}\", \"input\": \"\", \"output\": \"{}\"}}",
            row + 1
        )
        .unwrap();
    }
}

fn assert_same(left: &Rows, right: &Rows) {
    assert_eq!(left.len(), right.len());
    assert_eq!(
        (left.tokens(), left.targets()),
        (right.tokens(), right.targets())
    );
    for index in 0..left.len() {
        assert_eq!(left.get(index), right.get(index), "row {index}");
    }
    assert!(left.lengths().eq(right.lengths()));
    assert!(left.target_counts().eq(right.target_counts()));
    assert_eq!(left.checksum(), right.checksum());
    let batch = |rows: &Rows| MicroBatch::from_rows((0..rows.len()).filter_map(|i| rows.get(i)));
    assert_eq!(batch(left), batch(right));
    assert!(left.get(left.len()).is_none() && right.get(right.len()).is_none());
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> = entries.map(|e| name(e).into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

fn cache_files(folder: &Path) -> usize {
    names(folder)
        .iter()
        .filter(|name| name.ends_with(".rows") && !name.starts_with('.'))
        .count()
}

fn partial_files(folder: &Path) -> usize {
    names(folder)
        .iter()
        .filter(|name| name.contains(".partial-"))
        .count()
}

/// A folder with rows of token ids, and where their cache goes.
fn id_rows(rows: usize) -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("rows.jsonl");
    write_id_rows(&data, rows, 30);
    let cache = folder.path().join("cache");
    (folder, data, cache)
}

fn ids(data: &Path, cache: &Path) -> Tokenised {
    tokenised(
        &[data.to_owned()],
        IDS,
        &model(),
        settings(cache),
        &mut go_on,
    )
    .unwrap()
}

fn cache_path(made: &Tokenised) -> PathBuf {
    match &made.cache {
        CacheUse::None => panic!("no cache"),
        CacheUse::Found(path) | CacheUse::Made(path) | CacheUse::MadeAnew { path, .. } => {
            path.clone()
        }
    }
}

#[test]
fn rows_out_of_a_cache_are_the_rows_read() {
    let (_folder, data, cache) = id_rows(1500);
    let expected = read_rows(&data, &model()).unwrap();
    let made = ids(&data, &cache);
    assert!(matches!(made.cache, CacheUse::Made(_)));
    assert_same(&made.rows, &expected);
    let found = ids(&data, &cache);
    assert_eq!(found.cache, CacheUse::Found(cache_path(&made)));
    assert_same(&found.rows, &expected);
    assert_eq!(found.report, made.report);
    assert_eq!(made.report.rows, 1500);
    let memory = CacheSettings {
        folder: None,
        threads: 2,
    };
    let held = tokenised(&[data], IDS, &model(), memory, &mut go_on).unwrap();
    assert_eq!(held.cache, CacheUse::None);
    assert_same(&held.rows, &expected);
}

#[test]
fn rows_of_text_are_counted_alike_in_every_run() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("rows.jsonl");
    write_alpaca_rows(&data, 300);
    let mut text = fs::read_to_string(&data).unwrap();
    text.push_str(
        "{\"instruction\": \"x\"}\n{\"instruction\": \"x\", \"output\": 1, \"output\": 2}\n",
    );
    text.push_str(&format!(
        "{{\"instruction\": \"x\", \"output\": \"{}\"}}\n",
        "1 ".repeat(300)
    ));
    fs::write(&data, text).unwrap();
    let empty = folder.path().join("z.jsonl");
    fs::write(&empty, "").unwrap();
    let tokenizer = tokenizer();
    let text = TextSettings {
        template: TemplateSettings {
            max_source_length: 100,
            max_target_length: 20,
            ..TemplateSettings::default()
        },
        bad_rows: BadRows::Skip,
        ..TextSettings::default()
    };
    let kind = RowKind::Text {
        settings: &text,
        tokenizer: &tokenizer,
    };
    let cache = folder.path().join("cache");
    let sources = [data.clone(), empty.clone()];
    let open = |folder| {
        let cache = CacheSettings { folder, threads: 2 };
        tokenised(&sources, kind, &model(), cache, &mut go_on).unwrap()
    };
    let (made, found, held) = (open(Some(&cache)), open(Some(&cache)), open(None));
    assert!(matches!(found.cache, CacheUse::Found(_)));
    assert_same(&made.rows, &held.rows);
    assert_same(&found.rows, &held.rows);
    assert_eq!(made.report, found.report);
    assert_eq!(made.report, held.report);
    let report = &found.report;
    assert_eq!((report.rows, report.bad.count()), (302, 1));
    assert!(report.bad.examples()[0].contains("rows.jsonl:301: "));
    assert_eq!(
        (
            report.repeated_columns,
            report.cuts.answers,
            report.cuts.prompts
        ),
        (1, 1, 0)
    );
    assert_eq!(report.empty_files, [empty]);
}

#[test]
fn another_setting_or_content_is_another_cache_and_another_place_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("rows.jsonl");
    write_alpaca_rows(&data, 40);
    let cache = folder.path().join("cache");
    let sources = [data.clone()];
    let tokenizer = tokenizer();
    let shifted = {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer/v1.model");
        let proto = ModelProto::parse(&fs::read(path).unwrap()).unwrap();
        GlmTokenizer::chatglm(proto, 20).unwrap()
    };
    let plain = TextSettings::default();
    let mut prefixed = plain.clone();
    prefixed.template.source_prefix = "Q: ".to_owned();
    let mut shorter = plain.clone();
    shorter.template.max_target_length = 40;
    let mut skipping = plain.clone();
    skipping.bad_rows = BadRows::Skip;
    let larger = ModelConfig {
        vocab_size: 2100,
        ..model()
    };
    let image_model = ModelConfig {
        context_ids: larger
            .context_ids
            .map(|ids| mp_train::config::model::ContextIds {
                bos_token_id: 1680,
                gmask_token_id: 1677,
                ..ids
            }),
        ..larger.clone()
    };
    let variants = [
        (&plain, &tokenizer, model()),
        (&prefixed, &tokenizer, model()),
        (&shorter, &tokenizer, model()),
        (&skipping, &tokenizer, model()),
        (&plain, &tokenizer, larger),
        (&plain, &shifted, image_model),
    ];
    let open = |(settings, tokenizer, model): &(&TextSettings, &GlmTokenizer, ModelConfig)| {
        let kind = RowKind::Text {
            settings,
            tokenizer,
        };
        let cache = CacheSettings {
            folder: Some(&cache),
            threads: 1,
        };
        tokenised(&sources, kind, model, cache, &mut go_on).unwrap()
    };
    for (made_before, variant) in variants.iter().enumerate() {
        assert!(
            matches!(open(variant).cache, CacheUse::Made(_)),
            "{made_before}"
        );
        assert!(matches!(open(variant).cache, CacheUse::Found(_)));
        assert_eq!(cache_files(&cache), made_before + 1);
    }
    // The same content elsewhere, and later.
    let moved = folder.path().join("elsewhere");
    fs::create_dir(&moved).unwrap();
    fs::copy(&data, moved.join("rows.jsonl")).unwrap();
    fs::File::open(moved.join("rows.jsonl")).unwrap();
    let kind = RowKind::Text {
        settings: &plain,
        tokenizer: &tokenizer,
    };
    let at = |path: PathBuf| {
        tokenised(&[path], kind, &model(), settings(&cache), &mut go_on)
            .unwrap()
            .cache
    };
    assert!(matches!(at(moved.join("rows.jsonl")), CacheUse::Found(_)));
    // One letter of the same size.
    let text = fs::read_to_string(&data)
        .unwrap()
        .replacen("add 7", "odd 7", 1);
    fs::write(&data, text).unwrap();
    assert!(matches!(at(data), CacheUse::Made(_)));
}

#[test]
fn a_damaged_or_foreign_file_is_made_anew() {
    let (_folder, data, cache) = id_rows(400);
    let expected = read_rows(&data, &model()).unwrap();
    let path = cache_path(&ids(&data, &cache));
    let whole = fs::read(&path).unwrap();
    let flipped = |place: usize| {
        let mut bytes = whole.clone();
        bytes[place] ^= 4;
        bytes
    };
    let index = whole.len() - whole.iter().rev().position(|&byte| byte == 0).unwrap();
    let mut cases: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "no cache file"),
        (b"{\"input_ids\": [1]}\n".repeat(40), "no cache file"),
        (vec![0; whole.len()], "no cache file"),
        (flipped(3), "no cache file"),
        (flipped(127), "header"),
        (flipped(4000), "row data"),
        (flipped(index - 40), "index"),
        (flipped(whole.len() - 2), "tail"),
        ([whole.as_slice(), b"x"].concat(), "incomplete"),
    ];
    for byte in (8..128).step_by(5) {
        // A header that promises the world is not believed either.
        let mut bytes = whole.clone();
        bytes[byte] = 0xff;
        cases.push((bytes, ""));
    }
    for kept in [1, 127, 128, 129, 5000, whole.len() / 2, whole.len() - 1] {
        cases.push((whole[..kept].to_vec(), ""));
    }
    for (bytes, expected_reason) in cases {
        fs::write(&path, &bytes).unwrap();
        let made = ids(&data, &cache);
        match &made.cache {
            CacheUse::MadeAnew { reason, .. } => {
                assert!(
                    reason.contains(expected_reason),
                    "{reason}: {expected_reason}"
                );
            }
            other => panic!("{other:?}"),
        }
        assert_same(&made.rows, &expected);
        assert_eq!(fs::read(&path).unwrap(), whole, "made equal, byte for byte");
    }

    // A sound file, but of other rows.
    let other = data.with_file_name("other.jsonl");
    write_id_rows(&other, 50, 20);
    fs::copy(cache_path(&ids(&other, &cache)), &path).unwrap();
    let made = ids(&data, &cache);
    assert!(
        matches!(made.cache, CacheUse::MadeAnew { reason, .. } if reason.contains("other data"))
    );
    assert_same(&made.rows, &expected);
}

/// Rows stay what they are below one who uses them while their file is replaced.
#[test]
fn rows_in_use_outlive_their_file() {
    let (_folder, data, cache) = id_rows(400);
    let expected = read_rows(&data, &model()).unwrap();
    let first = ids(&data, &cache);
    let path = cache_path(&first);
    fs::remove_file(&path).unwrap();
    let second = ids(&data, &cache);
    fs::remove_dir_all(&cache).unwrap();
    assert_same(&first.rows, &expected);
    assert_same(&second.rows, &expected);
}

#[test]
fn runs_that_share_a_folder_make_a_file_once() {
    let (_folder, data, cache) = id_rows(3000);
    let expected = read_rows(&data, &model()).unwrap();
    let uses: Vec<CacheUse> = std::thread::scope(|scope| {
        let open = || {
            let tokenised = ids(&data, &cache);
            assert_same(&tokenised.rows, &expected);
            tokenised.cache
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let made = uses
        .iter()
        .filter(|one| matches!(one, CacheUse::Made(_)))
        .count();
    let found = uses
        .iter()
        .filter(|one| matches!(one, CacheUse::Found(_)))
        .count();
    assert_eq!((made, found), (1, 3), "{uses:?}");
    assert_eq!((cache_files(&cache), partial_files(&cache)), (1, 0));
}

#[test]
fn an_interruption_and_an_error_leave_nothing() {
    let (_folder, data, cache) = id_rows(3000);
    for until in [Phase::Checking, Phase::Tokenising] {
        let mut stop = |progress: Progress| match progress.phase == until {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let error = tokenised(
            std::slice::from_ref(&data),
            IDS,
            &model(),
            settings(&cache),
            &mut stop,
        );
        assert!(matches!(error, Err(DataError::Interrupted)));
        assert_eq!((cache_files(&cache), partial_files(&cache)), (0, 0));
    }
    let mut text = fs::read_to_string(&data).unwrap();
    text.push_str("{\"input_ids\": [1657, 1660, 2000], \"labels\": [1, 1, 1]}\n{}\n");
    fs::write(&data, text).unwrap();
    let error = tokenised(
        std::slice::from_ref(&data),
        IDS,
        &model(),
        settings(&cache),
        &mut go_on,
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("rows.jsonl:3001: `input_ids[2]` is 2000"),
        "{error}"
    );
    assert_eq!((cache_files(&cache), partial_files(&cache)), (0, 0));

    // Nor is the folder that was made for it.
    assert!(!cache.exists());
    fs::create_dir(&cache).unwrap();
    let file = cache.join("file");
    fs::write(&file, "").unwrap();
    let error = tokenised(
        &[data],
        IDS,
        &model(),
        settings(&file.join("x")),
        &mut go_on,
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("cannot write the token cache"), "{error}");
}

#[test]
fn data_that_changes_while_it_is_read_makes_no_cache() {
    let (_folder, data, cache) = id_rows(100);
    let mut write = |progress: Progress| {
        if progress.phase == Phase::Tokenising {
            let mut file = fs::File::options().append(true).open(&data).unwrap();
            file.write_all(b"\n").unwrap();
        }
        ControlFlow::Continue(())
    };
    let error = tokenised(
        std::slice::from_ref(&data),
        IDS,
        &model(),
        settings(&cache),
        &mut write,
    );
    assert!(matches!(error, Err(DataError::Changed { path }) if path == data));
    assert_eq!((cache_files(&cache), partial_files(&cache)), (0, 0));
}

#[test]
fn progress_reaches_the_end() {
    let (_folder, data, cache) = id_rows(3000);
    let mut told: Vec<Progress> = Vec::new();
    let mut tell = |progress| {
        told.push(progress);
        ControlFlow::Continue(())
    };
    let made = tokenised(
        std::slice::from_ref(&data),
        IDS,
        &model(),
        settings(&cache),
        &mut tell,
    )
    .unwrap();
    let size = fs::metadata(&data).unwrap().len();
    let ends: Vec<&Progress> = told.iter().filter(|progress| progress.finished).collect();
    let phases: Vec<Phase> = ends.iter().map(|progress| progress.phase).collect();
    assert_eq!(phases, [Phase::Checking, Phase::Tokenising]);
    for end in &ends {
        assert_eq!((end.bytes_done, end.bytes_total), (size, size));
    }
    assert_eq!(ends[1].rows, 3000);
    assert_eq!(ends[1].tokens, made.rows.tokens() as u64);
    assert!(ends[1].tokens_per_second() > 0.0);
}

fn skipping(data: &Path) -> Result<Tokenised, DataError> {
    let kind = RowKind::TokenIds {
        bad_rows: BadRows::Skip,
    };
    let memory = CacheSettings {
        folder: None,
        threads: 2,
    };
    tokenised(&[data.to_owned()], kind, &model(), memory, &mut go_on)
}

#[test]
fn bad_rows_of_token_ids_are_left_out_and_counted() {
    const GOOD: &str = "{\"input_ids\": [1657, 1660, 7], \"labels\": [-100, 1660, 7]}\n";
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("rows.jsonl");
    let long = "x".repeat((16 << 20) + 5);
    let mut bytes = format!("\u{feff}{GOOD}\n{GOOD}{{\n{long}\n{GOOD}").into_bytes();
    bytes.extend_from_slice(b"\xff\xfe\n");
    bytes.extend_from_slice(GOOD.as_bytes());
    fs::write(&data, &bytes).unwrap();
    let rows = skipping(&data).unwrap();
    assert_eq!((rows.rows.len(), rows.report.rows), (4, 4));
    assert_eq!(rows.report.bad.count(), 4);
    let examples = rows.report.bad.examples().join("\n");
    for part in [
        ":2: blank",
        ":4: EOF",
        ":5: the line is longer",
        ":7: not UTF-8",
    ] {
        assert!(examples.contains(part), "{examples}");
    }
    // Compressed rows are rows.
    let zipped = folder.path().join("rows.jsonl.gz");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&bytes).unwrap();
    fs::write(&zipped, encoder.finish().unwrap()).unwrap();
    assert_same(&skipping(&zipped).unwrap().rows, &rows.rows);

    fs::write(&data, "{}\n{\n").unwrap();
    let error = skipping(&data).unwrap_err();
    assert!(
        matches!(error, DataError::NoUsableRow { rows: 2, .. }),
        "{error}"
    );
    fs::write(&data, "\n\n").unwrap();
    let error = skipping(&data).unwrap_err().to_string();
    assert!(error.ends_with("rows.jsonl: no rows"), "{error}");
}

// ---- a run's data --------------------------------------------------------------------------------

fn run(train: &Path, folder: &Path) -> DataSettings {
    DataSettings {
        train: vec![train.to_owned()],
        validation: Vec::new(),
        validation_split: 0.0,
        seed: 7,
        template: TemplateSettings::default(),
        bad_rows: BadRows::Fatal,
        cache_dir: Some(folder.join("cache")),
        cache_token_ids: true,
        threads: 2,
    }
}

fn open(settings: &DataSettings) -> Result<TrainingData, DataError> {
    open_training_data(settings, None, &model(), &mut go_on)
}

/// Rows whose first id tells their number, a thousand at most.
fn numbers(rows: &Rows) -> Vec<u32> {
    let rows = (0..rows.len()).map(|index| rows.get(index).unwrap());
    rows.map(|row| row.input_ids[0] - 5).collect()
}

#[test]
fn a_split_takes_every_row_once_and_keeps_the_order_of_the_files() {
    let (folder, data, _) = id_rows(500);
    let whole = open(&run(&data, folder.path())).unwrap();
    assert!(whole.validation.is_none());
    let mut chosen = Vec::new();
    for seed in [1, 2] {
        let mut settings = run(&data, folder.path());
        (settings.validation_split, settings.seed) = (0.1, seed);
        let opened = open(&settings).unwrap();
        assert!(
            matches!(opened.cache, CacheUse::Found(_)),
            "the split is not part of the cache"
        );
        let (train, kept) = (
            numbers(&opened.train),
            numbers(opened.validation.as_ref().unwrap()),
        );
        assert_eq!((train.len(), kept.len()), (450, 50));
        assert!(train.is_sorted() && kept.is_sorted());
        let mut all = [train, kept.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..500).collect::<Vec<_>>());
        let validation = opened.validation.unwrap();
        let tokens = validation.tokens() + opened.train.tokens();
        let targets = validation.targets() + opened.train.targets();
        assert_eq!(
            (tokens, targets),
            (whole.train.tokens(), whole.train.targets())
        );
        assert_eq!(validation.tokens(), validation.lengths().sum::<usize>());
        assert_eq!(
            opened.train.targets(),
            opened.train.target_counts().sum::<usize>()
        );
        assert_ne!(opened.train.checksum(), whole.train.checksum());
        // Parts of parts, and rows added to a part.
        let (rest, taken) = opened.train.split_off(vec![3, 449, 3, 450]);
        assert_eq!(
            (rest.len(), numbers(&taken)),
            (448, vec![numbers(&opened.train)[3], 499])
        );
        let again = open(&settings).unwrap();
        assert_eq!(numbers(&again.validation.unwrap()), kept);
        chosen.push(kept);
    }
    assert_ne!(chosen[0], chosen[1]);
}

#[test]
fn rows_may_be_added_to_rows_out_of_a_file() {
    let (folder, data, _) = id_rows(20);
    let opened = open(&run(&data, folder.path())).unwrap().train;
    let (mut part, _) = opened.split_off(vec![0]);
    let raw = mp_train::data::rows::RawRow {
        input_ids: vec![1657, 1660, 7],
        labels: vec![-100, 1660, 7],
        ..Default::default()
    };
    part.push(&raw, &model()).unwrap();
    assert_eq!((part.len(), opened.len()), (20, 20));
    assert_eq!(part.get(0), opened.get(1));
    assert_eq!(part.get(19).unwrap().input_ids, [1657, 1660, 7]);
    assert_eq!(part.tokens(), part.lengths().sum::<usize>());
}

#[test]
fn validation_comes_from_files_or_from_a_split_that_leaves_rows() {
    let (folder, data, _) = id_rows(20);
    let other = folder.path().join("other.jsonl");
    write_id_rows(&other, 3, 9);
    let mut settings = run(&data, folder.path());
    settings.validation = vec![other];
    let opened = open(&settings).unwrap();
    assert_eq!(
        (opened.train.len(), opened.validation.unwrap().len()),
        (20, 3)
    );
    assert_eq!(opened.validation_report.unwrap().rows, 3);
    settings.validation_split = 0.5;
    assert!(matches!(open(&settings), Err(DataError::ValidationTwice)));
    settings.validation = Vec::new();
    for share in [-0.1, 1.0, 0.99, f64::NAN, f64::INFINITY] {
        settings.validation_split = share;
        assert!(
            matches!(open(&settings), Err(DataError::Split { rows: 20, .. })),
            "{share}"
        );
    }
    settings.validation_split = 1e-9;
    assert_eq!(open(&settings).unwrap().validation.unwrap().len(), 1);
}

#[test]
fn text_and_token_ids_are_told_apart_by_the_first_row() {
    let (folder, data, _) = id_rows(20);
    let text = folder.path().join("text.jsonl");
    write_alpaca_rows(&text, 9);
    let tokenizer = tokenizer();
    let settings = |path: &Path| run(path, folder.path());
    let open = |path: &Path, tokenizer| {
        open_training_data(&settings(path), tokenizer, &model(), &mut go_on)
    };
    assert_eq!(open(&data, None).unwrap().train.len(), 20);
    assert_eq!(open(&data, Some(&tokenizer)).unwrap().train.len(), 20);
    assert_eq!(open(&text, Some(&tokenizer)).unwrap().train.len(), 9);
    let error = open(&text, None).unwrap_err().to_string();
    assert!(
        error.contains("text.jsonl: rows of text, but there is no tokenizer"),
        "{error}"
    );
    // A damaged first row is one of token ids still.
    fs::write(&data, "{\"input_ids\": [1,").unwrap();
    let error = open(&data, Some(&tokenizer)).unwrap_err().to_string();
    assert!(error.contains("rows.jsonl:1: EOF"), "{error}");
    let array = folder.path().join("array.json");
    fs::write(
        &array,
        "[{\"instruction\": \"input_ids\", \"output\": \"b\"}]",
    )
    .unwrap();
    assert_eq!(open(&array, Some(&tokenizer)).unwrap().train.len(), 1);
}

// ---- in a process of its own -------------------------------------------------------------------

/// Runs one of the ignored tests below in a process of its own; whether it ended well, and what it
/// wrote.
fn child(test: &str, folder: &Path) -> (bool, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            test,
            "--exact",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CHILD_FOLDER, folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), text)
}

fn child_folder() -> Option<PathBuf> {
    std::env::var_os(CHILD_FOLDER).map(PathBuf::from)
}

#[test]
#[ignore = "run by a_run_killed_while_it_writes_leaves_what_the_next_one_removes"]
fn child_that_dies() {
    let Some(folder) = child_folder() else { return };
    let mut die = |progress: Progress| {
        if progress.phase == Phase::Tokenising && progress.rows > 0 {
            assert!(partial_files(&folder.join("cache")) > 0);
            std::process::abort();
        }
        ControlFlow::Continue(())
    };
    let data = folder.join("rows.jsonl");
    let _ = tokenised(
        &[data],
        IDS,
        &model(),
        settings(&folder.join("cache")),
        &mut die,
    );
}

#[test]
fn a_run_killed_while_it_writes_leaves_what_the_next_one_removes() {
    let (folder, data, cache) = id_rows(3000);
    let (well, _) = child("child_that_dies", folder.path());
    assert!(!well);
    assert_eq!((cache_files(&cache), partial_files(&cache)), (0, 2));
    // One that makes another file tidies up as well, for the killed one may never come again.
    let other = folder.path().join("other.jsonl");
    write_id_rows(&other, 9, 9);
    ids(&other, &cache);
    assert_eq!((cache_files(&cache), partial_files(&cache)), (1, 0));

    let (well, _) = child("child_that_dies", folder.path());
    assert!(!well);
    let made = ids(&data, &cache);
    assert!(matches!(made.cache, CacheUse::Made(_)));
    assert_eq!((cache_files(&cache), partial_files(&cache)), (2, 0));
    assert_same(&made.rows, &read_rows(&data, &model()).unwrap());
}

/// Largest resident memory of this process so far, in bytes.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    let kilobytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes << 10
}

#[test]
#[ignore = "run by many_rows_take_little_memory"]
fn child_with_many_rows() {
    let Some(folder) = child_folder() else { return };
    let data = folder.join("rows.jsonl");
    let text = TextSettings::default();
    let tokenizer = tokenizer();
    let kind = match folder.join("text").exists() {
        true => RowKind::Text {
            settings: &text,
            tokenizer: &tokenizer,
        },
        false => IDS,
    };
    let before = peak_memory();
    let cache = folder.join("cache");
    let mut last = None;
    let mut keep = |progress| {
        last = Some(progress);
        ControlFlow::Continue(())
    };
    let made = tokenised(&[data], kind, &model(), settings(&cache), &mut keep).unwrap();
    let speed = last.map_or(0.0, |progress: Progress| progress.tokens_per_second());
    let (rows, tokens) = (made.rows.len(), made.rows.tokens());
    println!(
        "RESULT {rows} {tokens} {} {speed:.0}",
        peak_memory() - before
    );
}

/// Rows, tokens, more memory than before, tokens per second.
fn many_rows(folder: &Path) -> [u64; 4] {
    let (well, text) = child("child_with_many_rows", folder);
    assert!(well, "{text}");
    let result = text
        .lines()
        .find_map(|line| line.split_once("RESULT "))
        .unwrap()
        .1;
    let numbers = result.split(' ').map(|number| number.parse().unwrap());
    let numbers: Vec<u64> = numbers.collect();
    numbers.try_into().unwrap()
}

/// 200,000 rows of token ids take ten times the memory that making them may take; as many short rows
/// of text take none either.
#[test]
fn many_rows_take_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    write_id_rows(&folder.path().join("rows.jsonl"), 200_000, 100);
    let [rows, tokens, memory, _] = many_rows(folder.path());
    assert_eq!(rows, 200_000);
    let held = 8 * tokens + 32 * rows;
    assert!(held > 80 << 20, "the rows themselves are {held} bytes");
    assert!(
        memory < 48 << 20,
        "{memory} bytes more for {held} bytes of rows"
    );

    write_alpaca_rows(&folder.path().join("rows.jsonl"), 200_000);
    fs::write(folder.path().join("text"), "").unwrap();
    let [rows, _, memory, _] = many_rows(folder.path());
    assert_eq!(rows, 200_000);
    assert!(
        memory < 48 << 20,
        "{memory} bytes more for short rows of text"
    );
}

/// Says how fast rows of text are tokenised, and in how much memory: `scripts/million_rows.sh`.
#[test]
#[ignore = "needs ROWS_FILE, a file of alpaca rows"]
fn tokenise_the_rows_of_a_file() {
    let data = PathBuf::from(std::env::var_os("ROWS_FILE").expect("ROWS_FILE is a file of rows"));
    let threads = std::thread::available_parallelism().unwrap().get();
    let (text, tokenizer) = (TextSettings::default(), tokenizer());
    let kind = RowKind::Text {
        settings: &text,
        tokenizer: &tokenizer,
    };
    let folder = tempfile::tempdir_in(data.parent().unwrap()).unwrap();
    for _ in 0..2 {
        let (before, began) = (peak_memory(), std::time::Instant::now());
        let mut last = None;
        let mut keep = |progress| {
            last = Some(progress);
            ControlFlow::Continue(())
        };
        let cache = CacheSettings {
            folder: Some(folder.path()),
            threads,
        };
        let sources = std::slice::from_ref(&data);
        let opened = tokenised(sources, kind, &model(), cache, &mut keep).unwrap();
        let seconds = began.elapsed().as_secs_f64();
        let what = match &opened.cache {
            CacheUse::Found(_) => "found in the cache".to_owned(),
            _ => {
                let speed = last.unwrap().tokens_per_second();
                format!("tokenised, {speed:.0} tokens/s on {threads} threads")
            }
        };
        println!(
            "{} rows, {} tokens in {seconds:.1} s: {what}; {} MiB more resident memory at most",
            opened.rows.len(),
            opened.rows.tokens(),
            (peak_memory() - before) >> 20
        );
    }
}
