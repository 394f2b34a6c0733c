//! Text files to training rows: five kinds of real files, and files that are broken.
//!
//! `tests/data/text/snapshots.json` was written by a Python script with sentencepiece 0.1.99 and the
//! preprocessing of THUDM's training code; the rows are spelled out here once more, by hand.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use mp_train::config::model::ModelConfig;
use mp_train::config::run::Quantization;
use mp_train::data::records::Documents;
use mp_train::data::rows::{RawRow, Rows};
use mp_train::data::sentencepiece::ModelProto;
use mp_train::data::source::find_files;
use mp_train::data::template::{
    Alpaca, Conversation, PlainText, PromptResponse, RowText, Template, TemplateSettings,
};
use mp_train::data::text_rows::{
    BadRowLog, BadRows, Cuts, RowEncoder, RowReport, TextRow, TextRows, TextSettings,
};
use mp_train::data::tokenizer::GlmTokenizer;
use mp_train::data::{DataError, FileProblem, RowProblem, TextProblem};
use serde::Deserialize;
use tempfile::TempDir;

#[path = "text_data/conversations.rs"]
mod conversations;
#[path = "text_data/parquet.rs"]
mod parquet;

const GMASK: u32 = 1657;
const SOP: u32 = 1660;
const EOP: u32 = 1661;

fn tests_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(name)
}

fn tokenizer() -> GlmTokenizer {
    let bytes = fs::read(tests_folder("tokenizer/v1.model")).unwrap();
    GlmTokenizer::chatglm(ModelProto::parse(&bytes).unwrap(), 0).unwrap()
}

fn stored(name: &str) -> PathBuf {
    tests_folder("data/text").join(name)
}

fn settings(template: Template) -> TextSettings {
    TextSettings {
        template: TemplateSettings {
            template,
            max_source_length: 64,
            max_target_length: 64,
            ..TemplateSettings::default()
        },
        ..TextSettings::default()
    }
}

fn skipping(template: Template) -> TextSettings {
    TextSettings {
        bad_rows: BadRows::Skip,
        ..settings(template)
    }
}

fn alpaca() -> Template {
    Template::Alpaca(Alpaca::default())
}

fn pairs() -> Template {
    Template::PromptResponse(PromptResponse::default())
}

fn adgen() -> Template {
    Template::PromptResponse(PromptResponse {
        prompt: "content".to_owned(),
        response: "summary".to_owned(),
        ..PromptResponse::default()
    })
}

fn plain(documents: Documents) -> Template {
    Template::PlainText(PlainText {
        documents,
        max_length: 32,
        ..PlainText::default()
    })
}

fn read(sources: &[PathBuf], settings: &TextSettings) -> (Vec<TextRow>, RowReport) {
    let mut rows = TextRows::open(sources, settings).unwrap();
    let read = rows.by_ref().map(|row| row.unwrap()).collect();
    assert!(rows.next().is_none());
    assert_eq!(rows.progress(), 1.0);
    (read, rows.report().clone())
}

fn first_error(sources: &[PathBuf], settings: &TextSettings) -> DataError {
    match TextRows::open(sources, settings) {
        Err(error) => error,
        Ok(mut rows) => {
            let error = rows.find_map(Result::err).expect("an error");
            assert!(rows.next().is_none(), "nothing follows an error");
            error
        }
    }
}

/// A folder with one file.
fn file(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn message(name: &str, bytes: &[u8], settings: &TextSettings) -> String {
    let (folder, path) = file(name, bytes);
    let error = first_error(&[path], settings).to_string();
    error.replace(&format!("{}/", folder.path().display()), "")
}

fn texts(rows: &[TextRow]) -> Vec<(String, String)> {
    let text = |row: &TextRow| match &row.text {
        RowText::Conversation(conversation) => in_rounds(conversation, false),
        RowText::Document { text, .. } => (String::new(), text.clone()),
    };
    rows.iter().map(text).collect()
}

/// ChatGLM-6B's prompt and answer, spelled out here once more.
fn in_rounds(conversation: &Conversation, round_for_one: bool) -> (String, String) {
    let texts: Vec<&str> = conversation
        .messages
        .iter()
        .map(|m| m.content.as_str())
        .collect();
    let turns = texts.chunks_exact(2).enumerate();
    if texts.len() == 2 && !round_for_one {
        return (texts[0].to_owned(), texts[1].to_owned());
    }
    let rounds = turns.map(|(n, turn)| format!("[Round {n}]\n问：{}\n答：{}\n", turn[0], turn[1]));
    let answer = texts[texts.len() - 1];
    let prompt = rounds.collect::<String>();
    let prompt = prompt.strip_suffix(&format!("{answer}\n")).unwrap();
    (prompt.to_owned(), answer.to_owned())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[derive(Deserialize, PartialEq, Debug)]
struct Ids {
    input_ids: Vec<i64>,
    labels: Vec<i64>,
}

fn snapshots() -> HashMap<String, Vec<Ids>> {
    serde_json::from_slice(&fs::read(stored("snapshots.json")).unwrap()).unwrap()
}

fn encode(rows: &[TextRow], settings: &TextSettings) -> Vec<RawRow> {
    let tokenizer = tokenizer();
    let encoder = RowEncoder::new(&tokenizer, &settings.template).unwrap();
    let rows = rows
        .iter()
        .map(|row| encoder.encode(&row.text).unwrap().rows);
    rows.flatten().collect()
}

fn ids(rows: &[RawRow]) -> Vec<Ids> {
    let one = |row: &RawRow| Ids {
        input_ids: row.input_ids.clone(),
        labels: row.labels.clone(),
    };
    rows.iter().map(one).collect()
}

/// The row of a prompt and an answer by the rule: prompt, gMASK, sop, answer, eop, each cut to leave
/// its share of 64; targets from sop on.
fn pair_row(prompt: &str, answer: &str) -> Ids {
    let tokenizer = tokenizer();
    let prompt: Vec<u32> = tokenizer.encode(prompt).into_iter().take(63).collect();
    let answer: Vec<u32> = tokenizer.encode(answer).into_iter().take(62).collect();
    let targets = [&[SOP], answer.as_slice(), &[EOP]].concat();
    let ids = [prompt.as_slice(), &[GMASK], &targets].concat();
    let labels = std::iter::repeat_n(-100, prompt.len() + 1);
    Ids {
        labels: labels.chain(targets.into_iter().map(i64::from)).collect(),
        input_ids: ids.into_iter().map(i64::from).collect(),
    }
}

/// The rows of a document by the rule, 32 tokens at most.
fn document_rows(text: &str) -> Vec<Ids> {
    let mut left = tokenizer().encode(text);
    let mut rows = Vec::new();
    while !left.is_empty() {
        let mut chunk: Vec<u32> = left.drain(..left.len().min(29)).collect();
        if left.is_empty() {
            chunk.push(EOP);
        }
        let chunk = chunk.into_iter().map(i64::from);
        rows.push(Ids {
            input_ids: [i64::from(GMASK), i64::from(SOP)]
                .into_iter()
                .chain(chunk.clone())
                .collect(),
            labels: [-100, -100].into_iter().chain(chunk).collect(),
        });
    }
    rows
}

/// Checks a run against the pairs spelled out and against the recorded ids; every row must be one
/// that the engine takes.
fn check_pairs(
    name: &str,
    source: &str,
    settings: &TextSettings,
    expected: &[(&str, &str)],
) -> RowReport {
    let (rows, report) = read(&[stored(source)], settings);
    let round_for_one = settings.template.template.round_for_empty_history();
    let found: Vec<_> = rows
        .iter()
        .map(|row| match &row.text {
            RowText::Conversation(conversation) => in_rounds(conversation, round_for_one),
            RowText::Document { .. } => panic!("a document"),
        })
        .collect();
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(
            (found.0.as_str(), found.1.as_str()),
            *expected,
            "{name} {index}"
        );
    }
    assert_eq!(found.len(), expected.len());
    let found = ids(&encode(&rows, settings));
    let by_rule: Vec<_> = expected.iter().map(|(q, a)| pair_row(q, a)).collect();
    assert_eq!(found, by_rule, "{name}");
    assert_eq!(found, snapshots()[name], "{name}");
    check_usable(&encode(&rows, settings));
    report
}

fn check_usable(rows: &[RawRow]) {
    let model = ModelConfig {
        vocab_size: 2000,
        hidden_size: 64,
        inner_hidden_size: 256,
        architecture: mp_train::config::architecture::Architecture::CHATGLM,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 16,
        num_layers: 4,
        norm_epsilon: 1e-5,
        max_sequence_length: 128,
        context_ids: Some(mp_train::config::model::ContextIds {
            bos_token_id: SOP,
            mask_token_id: 1656,
            gmask_token_id: GMASK,
        }),
        eos_token_ids: vec![EOP],
        pad_token_id: Some(3),
        tie_word_embeddings: false,
        pre_seq_len: None,
        prefix_projection: false,
        quantization: Quantization::None,
    };
    let mut held = Rows::default();
    for row in rows {
        held.push(row, &model).unwrap();
    }
}

// ---- the five kinds of files ----------------------------------------------------------------------

#[test]
fn alpaca_json() {
    let long_input = format!(
        "Instruction: Repeat.\nInput: {}\nAnswer: ",
        "long text ".repeat(60)
    );
    let expected = [
        (
            "Instruction: Give three tips for staying healthy.\nAnswer: ",
            "1. Eat well.\n2. Move.\n3. Sleep.",
        ),
        (
            "Instruction: 把下面的句子翻译成英文。\nInput: 你好，世界！\nAnswer: ",
            "Hello, world!",
        ),
        ("Instruction: What is 2 + 2?\nAnswer: ", "4"),
        (
            "Instruction: Square the number.\nInput: 12\nAnswer: ",
            "144",
        ),
        (
            "Instruction: How much is half of it?\nInput: 1.50\nAnswer: ",
            "7.5e-1",
        ),
        ("Instruction: Name a colour.\nAnswer: ", "Blue"),
        (
            "Instruction: Write a function.\nInput: \tadd a and b\nAnswer: ",
            "def add(a, b):\n    return a + b",
        ),
        (
            "Instruction: Sort: \"b\", \"a\" \\ [x] {y}\nAnswer: ",
            "你😀 ]}",
        ),
        (
            "Instruction: \nInput: Is [gMASK] or <sop> a word?\nAnswer: ",
            "No. <eop>",
        ),
        (&long_input, &"again, ".repeat(60)),
    ];
    let settings = settings(alpaca());
    let report = check_pairs("alpaca", "alpaca.json", &settings, &expected);
    assert_eq!(report.rows, 10);
    assert_eq!(report.repeated_columns, 1);
    let repeated = report.first_repeated.unwrap();
    assert!(
        repeated.ends_with("alpaca.json:11: column `instruction`"),
        "{repeated}"
    );
}

#[test]
fn adgen_jsonl() {
    let long = ("类型#上衣*".repeat(40), "很好看。".repeat(40));
    let expected = [
        ("类型#上衣*颜色#白色", "这件上衣是白色的，很好看。"),
        ("类型#裙*风格#简约", "简约的裙子。"),
        ("类型#裤", "一条裤子"),
        ("2024", "3.0"),
        ("a  b", "x\ty\n"),
        ("类型#鞋", "新鞋"),
        ("hello world", "你好"),
        ("true", "line1\r\nline2"),
        (&long.0, &long.1),
        (" ", "tail "),
    ];
    check_pairs("adgen", "adgen.json", &settings(adgen()), &expected);
}

#[test]
fn turns_with_and_without_round_zero() {
    let long = format!(
        "[Round 0]\n问：{}\n答：{}\n[Round 1]\n问：long\n答：",
        "问题 ".repeat(40),
        "答案 ".repeat(40)
    );
    let mut expected = [
        ("你好", "你好！"),
        (
            "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：再见\n答：",
            "再见！",
        ),
        (
            "[Round 0]\n问：hello\n答：hi\n[Round 1]\n问：who are you?\n答：A model.\n\
             [Round 2]\n问：how old?\n答：",
            "I do not know.",
        ),
        ("bare", "query"),
        ("null history", "is none"),
        (
            "[Round 0]\n问：1\n答：2\n[Round 1]\n问：\n答：\n[Round 2]\n问：3\n答：",
            "4",
        ),
        (
            "[Round 0]\n问：q\n答：a\n[Round 1]\n问：text\n答：",
            "as text",
        ),
        ("empty text", "is none"),
        (
            "[Round 0]\n问：new\n答：new\n[Round 1]\n问：twice\n答：",
            "last wins",
        ),
        (&long, "cut"),
    ];
    check_pairs("turns", "turns.jsonl", &settings(pairs()), &expected);

    for (index, prompt) in [
        (0, "[Round 0]\n问：你好\n答："),
        (3, "[Round 0]\n问：bare\n答："),
        (4, "[Round 0]\n问：null history\n答："),
        (7, "[Round 0]\n问：empty text\n答："),
    ] {
        expected[index].0 = prompt;
    }
    let template = Template::PromptResponse(PromptResponse {
        round_for_empty_history: true,
        ..PromptResponse::default()
    });
    check_pairs("turns_zero", "turns.jsonl", &settings(template), &expected);
}

#[test]
fn sentences_csv() {
    let long = "很长的句子。".repeat(30);
    let expected = [
        (2, "你好，世界"),
        (3, "hello, world"),
        (4, "a \"quoted\" word"),
        (6, "line1\r\nline2"),
        (8, "plain \"inner\" quotes"),
        (9, "3.50"),
        (11, " spaced "),
        (12, &long),
        (13, "[Round 0]"),
        (14, "tail"),
    ];
    let settings = skipping(plain(Documents::File));
    let (rows, report) = read(&[stored("sentences.csv")], &settings);
    let found: Vec<_> = rows.iter().map(|row| row.line).zip(texts(&rows)).collect();
    let found: Vec<_> = found
        .iter()
        .map(|(line, text)| (*line, text.1.as_str()))
        .collect();
    assert_eq!(found, expected);
    assert_eq!(report.bad.count(), 1);
    assert!(report.bad.examples()[0].ends_with("sentences.csv:10: column `sentence` is empty"));

    let rows = encode(&rows, &settings);
    let by_rule = expected.iter().flat_map(|(_, text)| document_rows(text));
    assert_eq!(ids(&rows), by_rule.collect::<Vec<_>>());
    assert_eq!(ids(&rows), snapshots()["sentences"]);
    check_usable(&rows);
}

#[test]
fn plain_text() {
    let story = format!(
        "Chapter 1\n你好，世界！\n\n  indented line\n\tif x: return 1\n\nChapter 2\n{}\nThe end.",
        "a long line ".repeat(40)
    );
    let one = settings(plain(Documents::File));
    let (rows, _) = read(&[stored("story.txt")], &one);
    assert_eq!(texts(&rows), [(String::new(), story.clone())]);
    assert_eq!(rows[0].line, 2);
    let encoded = encode(&rows, &one);
    assert!(encoded.len() >= 10);
    assert_eq!(ids(&encoded), document_rows(&story));
    assert_eq!(ids(&encoded), snapshots()["story"]);
    check_usable(&encoded);

    let (rows, _) = read(
        &[stored("story.txt")],
        &settings(plain(Documents::BlankLine)),
    );
    let places: Vec<_> = rows.iter().map(|row| row.line).collect();
    assert_eq!(places, [2, 5, 8]);
    let found: Vec<_> = texts(&rows).into_iter().map(|(_, text)| text).collect();
    assert_eq!(found.join("\n\n"), story);

    let (rows, _) = read(&[stored("story.txt")], &settings(plain(Documents::Line)));
    let found: Vec<_> = texts(&rows).into_iter().map(|(_, text)| text).collect();
    let lines: Vec<_> = story.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(found, lines);
}

/// A few ids written out, so that nothing but this page is needed to check them: 你 好 is 230 138
/// (SPEC.md of the tokenizer), 问题 is 5 20 1630, 答案 is 5 88 1487.
#[test]
fn ids_written_out() {
    let (_folder, path) = file(
        "rows.jsonl",
        "{\"prompt\": \"问题\", \"response\": \"答案\"}\n{\"prompt\": \"a b\", \"response\": \"你好\"}\n"
            .as_bytes(),
    );
    let settings = settings(pairs());
    let (rows, _) = read(&[path], &settings);
    let rows = encode(&rows, &settings);
    assert_eq!(
        rows[0].input_ids,
        [5, 20, 1630, 1657, 1660, 5, 88, 1487, 1661]
    );
    assert_eq!(
        rows[0].labels,
        [-100, -100, -100, -100, 1660, 5, 88, 1487, 1661]
    );
    assert_eq!(rows[1].input_ids, [19, 237, 1657, 1660, 230, 138, 1661]);
    assert_eq!(rows[1].labels, [-100, -100, -100, 1660, 230, 138, 1661]);
    assert_eq!(
        (&rows[1].context_length, &rows[1].position_ids),
        (&None, &None)
    );

    let (_folder, path) = file("text.txt", "你好".as_bytes());
    let settings = self::settings(plain(Documents::File));
    let rows = encode(&read(&[path], &settings).0, &settings);
    assert_eq!(rows[0].input_ids, [1657, 1660, 230, 138, 1661]);
    assert_eq!(rows[0].labels, [-100, -100, 230, 138, 1661]);
}

#[test]
fn cuts_are_counted_and_padding_is_no_target() {
    let tokenizer = tokenizer();
    let mut settings = TemplateSettings {
        template: pairs(),
        source_prefix: "a ".to_owned(),
        max_source_length: 3,
        max_target_length: 4,
        parse_special: true,
        ..TemplateSettings::default()
    };
    let encoder = RowEncoder::new(&tokenizer, &settings).unwrap();
    let pair = Conversation::pair("b a b", "<pad>a b a");
    let encoded = encoder.encode(&RowText::Conversation(pair)).unwrap();
    assert_eq!(
        encoded.rows[0].input_ids,
        [19, 237, 1657, 1660, 3, 19, 1661]
    );
    assert_eq!(
        encoded.rows[0].labels,
        [-100, -100, -100, 1660, -100, 19, 1661]
    );
    let cuts = Cuts {
        prompts: 1,
        answers: 1,
        turns: 0,
    };
    assert_eq!(encoded.cuts, cuts);

    settings.max_target_length = 2;
    let error = RowEncoder::new(&tokenizer, &settings).unwrap_err();
    assert_eq!(
        error.to_string(),
        "max_target_length is 2; it must be at least 3"
    );
}

// ---- finding and opening --------------------------------------------------------------------------

#[test]
fn compressed_files_give_the_same_rows() {
    let settings = skipping(plain(Documents::File));
    let folder = tempfile::tempdir().unwrap();
    for (name, settings) in [
        ("alpaca.json", &skipping(alpaca())),
        ("adgen.json", &skipping(adgen())),
        ("turns.jsonl", &skipping(pairs())),
        ("sentences.csv", &settings),
        ("story.txt", &settings),
    ] {
        let bytes = fs::read(stored(name)).unwrap();
        let path = folder.path().join(format!("{name}.GZ"));
        // Two members, as `cat a.gz b.gz` and parallel compressors make them.
        let (start, end) = bytes.split_at(bytes.len() / 2);
        fs::write(&path, [gzip(start), gzip(end)].concat()).unwrap();
        let (compressed, _) = read(&[path], settings);
        let (rows, _) = read(&[stored(name)], settings);
        assert_eq!(texts(&compressed), texts(&rows), "{name}");

        // Without a known ending, the contents tell what it is; here a lone name is no help.
        let path = folder.path().join(name.replace('.', "_"));
        fs::write(&path, gzip(&bytes)).unwrap();
        assert_eq!(texts(&read(&[path], settings).0), texts(&rows), "{name}");
    }
}

#[test]
fn sources_are_files_folders_and_patterns_in_a_fixed_order() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("sub/deep")).unwrap();
    fs::create_dir(at(".hidden")).unwrap();
    for name in [
        "b.jsonl",
        "a.json.gz",
        "sub/c.csv",
        "sub/deep/d.ndjson",
        "e.txt",
        "README.md",
        ".f.json",
        ".hidden/g.json",
    ] {
        fs::write(at(name), "").unwrap();
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(folder.path(), at("sub/circle")).unwrap();
    let find = |source: &str, text| {
        let files = find_files(&[at(source)], text).unwrap();
        let name = |file: &PathBuf| file.strip_prefix(folder.path()).unwrap().to_owned();
        files.iter().map(name).collect::<Vec<_>>()
    };
    let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
    let columns = ["a.json.gz", "b.jsonl", "sub/c.csv", "sub/deep/d.ndjson"];
    assert_eq!(find("", false), paths(&columns));
    assert!(find("", true).contains(&PathBuf::from("e.txt")));
    assert_eq!(find("*.json*", false), paths(&["a.json.gz", "b.jsonl"]));
    assert_eq!(find("sub/*.csv", false), paths(&["sub/c.csv"]));
    assert_eq!(find("README.md", false), paths(&["README.md"]));

    let two = [at("sub/c.csv"), at("*.jsonl"), at("sub/c.csv")];
    let files = find_files(&two, false).unwrap();
    assert_eq!(files, [at("sub/c.csv"), at("b.jsonl"), at("sub/c.csv")]);

    let problem = |source: &str| match find_files(&[at(source)], false).unwrap_err() {
        DataError::File { problem, .. } => problem,
        other => panic!("{other}"),
    };
    assert_eq!(problem("none.json"), FileProblem::Missing);
    assert_eq!(problem("*.parquet"), FileProblem::NoMatch);
    assert!(matches!(problem("a**b"), FileProblem::Pattern { .. }));
    fs::create_dir(at("empty")).unwrap();
    fs::write(at("empty/notes.txt"), "text").unwrap();
    let error = find_files(&[at("empty")], false).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "/empty: no data file in this folder; looked for names that end in .json, .jsonl, \
             .ndjson, .csv, .tsv, each also with .gz, or in .parquet"
        ),
        "{error}"
    );
}

#[test]
fn many_files_are_read_one_after_another() {
    let folder = tempfile::tempdir().unwrap();
    let row = |n: usize| format!("{{\"prompt\": \"p{n}\", \"response\": \"r{n}\"}}");
    fs::write(folder.path().join("b.jsonl"), row(2)).unwrap();
    fs::write(
        folder.path().join("a.json"),
        format!("[{},{}]", row(0), row(1)),
    )
    .unwrap();
    fs::write(folder.path().join("c.csv"), "response,prompt\nr3,p3\n").unwrap();
    fs::write(
        folder.path().join("d.tsv"),
        "prompt\tresponse\n\"p4\"\tr4\n",
    )
    .unwrap();
    fs::write(folder.path().join("e.json"), " []\n").unwrap();
    let (rows, report) = read(&[folder.path().to_owned()], &settings(pairs()));
    let pair = |n| (format!("p{n}"), format!("r{n}"));
    assert_eq!(texts(&rows), (0..5).map(pair).collect::<Vec<_>>());
    assert_eq!(report.empty_files, [folder.path().join("e.json")]);
}

#[test]
fn of_a_column_named_twice_the_last_counts() {
    let table = b"prompt,prompt,response\nold,new,r\nold,new,r\n";
    let (_folder, path) = file("a.csv", table);
    let (rows, report) = read(&[path], &settings(pairs()));
    assert_eq!(texts(&rows)[0], ("new".to_owned(), "r".to_owned()));
    assert_eq!(report.repeated_columns, 2);
    assert!(
        report
            .first_repeated
            .unwrap()
            .ends_with("a.csv:2: column `prompt`")
    );
}

#[test]
fn unknown_endings_are_told_by_contents() {
    let json = r#"{"prompt": "p", "response": "r"}"#;
    for (name, contents) in [
        ("a", json.to_owned()),
        ("b.data", format!("\n [ {json} ]")),
        ("c.txt", json.to_owned()),
        ("d.dat", "prompt,response\np,r".to_owned()),
        (
            "e",
            "\u{feff}\"response\"\t\"prompt\"\r\nr\tp\r\n".to_owned(),
        ),
    ] {
        let (_folder, path) = file(name, contents.as_bytes());
        let (rows, _) = read(&[path], &settings(pairs()));
        assert_eq!(texts(&rows), [("p".to_owned(), "r".to_owned())], "{name}");
    }
    assert_eq!(
        message("a.bin", b"\x7fELF", &settings(pairs())),
        "a.bin: neither JSON nor CSV with a column named `prompt`, `response`; name the file \
         .json, .jsonl, .csv, .tsv or .parquet, or use the plain text template for text"
    );
    let (_folder, path) = file("story", b"[Round 0] is text");
    assert_eq!(read(&[path], &settings(plain(Documents::File))).0.len(), 1);
}

// ---- broken files ---------------------------------------------------------------------------------

#[test]
fn broken_rows_name_file_line_and_reason() {
    let row = r#"{"prompt": "p", "response": "r"}"#;
    let cases: &[(&str, Vec<u8>, &str)] = &[
        (
            "a.jsonl",
            format!("{row}\n\n{row}\n{{\"prompt\": }}\n").into(),
            "a.jsonl:4: expected value (column 12)",
        ),
        (
            "b.jsonl",
            format!("{row}\n[1]\n").into(),
            "b.jsonl:2: a row must be an object with columns, found a list",
        ),
        (
            "c.jsonl",
            [row.as_bytes(), b"\n{\"prompt\": \"\xc4\xe3\"}"].concat(),
            "c.jsonl:2: not UTF-8 at byte 12 of the line; save the file as UTF-8",
        ),
        (
            "d.json",
            [b"[\n", row.as_bytes(), b", {\"prompt\":\n \"\xff\"}]"].concat(),
            "d.json:3: not UTF-8 at byte 2 of the line; save the file as UTF-8",
        ),
        (
            "e.json",
            format!("[\n{row}, {{\"prompt\" \"p\"}}]").into(),
            "e.json:2: expected `:` (column 45)",
        ),
        (
            "f.json",
            format!("[\n{row},\n{{\"prompt\":\n\n 1x}}]").into(),
            "f.json:5: expected `,` or `}` (column 3)",
        ),
        (
            "g.jsonl",
            br#"{"prompt": "p", "answer": "r"}"#.to_vec(),
            "g.jsonl:1: no column `response`; the columns are `prompt`, `answer`: set the \
             template's column names accordingly",
        ),
        (
            "h.csv",
            b"id,prompt;response\n1,p;r\n".to_vec(),
            "h.csv: no column `prompt`, `response`; the columns are `id`, `prompt;response`: set \
             the template's column names accordingly",
        ),
        (
            "i.csv",
            b"prompt,response\np,r\n\np,r, and more\n".to_vec(),
            "i.csv:4: 3 fields, but the header has 2; text that holds the delimiter must stand in \
             quotes",
        ),
        (
            "j.csv",
            b"prompt,response\n\"p\np\",\"r\"\n\xc4\xe3,r".to_vec(),
            "j.csv:4: column `prompt` is not UTF-8; save the file as UTF-8",
        ),
        (
            "k.jsonl",
            br#"{"prompt": {"text": "p"}, "response": "r"}"#.to_vec(),
            "k.jsonl:1: column `prompt` holds an object, expected text",
        ),
        (
            "l.jsonl",
            br#"{"prompt": "p", "response": null}"#.to_vec(),
            "l.jsonl:1: column `response` is empty",
        ),
        (
            "m.jsonl",
            br#"{"prompt": "p", "response": "r", "history": [["q"]]}"#.to_vec(),
            "m.jsonl:1: column `history` is no list of [question, answer] pairs: invalid length 1, \
             expected a tuple of size 2",
        ),
        (
            "n.jsonl",
            br#"{"prompt": "p", "response": "\ud83d"}"#.to_vec(),
            "n.jsonl:1: column `response`: unexpected end of hex escape (column 37)",
        ),
        (
            "o.csv",
            b"prompt,response,history\np,r,hello\n".to_vec(),
            "o.csv:2: column `history` is no list of [question, answer] pairs: expected value",
        ),
    ];
    for (name, bytes, expected) in cases {
        assert_eq!(message(name, bytes, &settings(pairs())), *expected);
    }
    let text = b"one\ntwo\n\xff\nfour\n";
    assert_eq!(
        message("p.txt", text, &settings(plain(Documents::Line))),
        "p.txt:3: not UTF-8 at byte 0 of the line; save the file as UTF-8"
    );
}

#[test]
fn files_that_cannot_be_read_on_end_the_rows_even_when_bad_rows_are_skipped() {
    let row = r#"{"prompt": "p", "response": "r"}"#;
    let compressed = gzip(format!("{row}\n").repeat(50_000).as_bytes());
    let cut = &compressed[..compressed.len() / 2];
    let mut damaged = compressed.clone();
    let end = damaged.len() - 6;
    damaged[end] ^= 1;
    let cases: &[(&str, Vec<u8>, &str)] = &[
        (
            "a.json",
            format!("[{row},\n{row},\n").into(),
            "a.json:3: the file ends inside the array of rows; is it complete?",
        ),
        (
            "b.json",
            format!("[{row},\n{{\"prompt\": \"p").into(),
            "b.json:2: the file ends inside the row that begins here; is it complete?",
        ),
        (
            "c.json",
            format!("[{row}\n{row}]").into(),
            "c.json:2: expected `,` or `]` behind a row (column 1)",
        ),
        (
            "d.json",
            format!("[{row},\n]").into(),
            "d.json:2: expected a row (column 1)",
        ),
        (
            "e.json",
            format!("[{row}]\n{row}").into(),
            "e.json:2: more text behind the end of the array (column 1)",
        ),
        // A brace is missing in line 2; it shows in line 3.
        (
            "f.json",
            format!("[{row},\n{{\"prompt\": \"p\",\n {row}, {row}]").into(),
            "f.json:3: key must be a string (column 2)",
        ),
        (
            "g.csv",
            b"prompt,response\np,r\np,\"r\np,r\np,r\n".to_vec(),
            "g.csv:3: the quote opened here is never closed; double every quote within quoted text",
        ),
        (
            "h.csv",
            b"prompt,\xff\n".to_vec(),
            "h.csv:1: the header cannot be read: it is not UTF-8; save the file as UTF-8",
        ),
        (
            "i.csv",
            b"\xff\xfep\0r\0".to_vec(),
            "i.csv: UTF-16 text; save the file as UTF-8",
        ),
        (
            "j.jsonl.gz",
            row.into(),
            "j.jsonl.gz: named .gz, but not gzip data; rename the file or fetch it again",
        ),
        (
            "k.jsonl.gz",
            compressed[..30].to_vec(),
            "k.jsonl.gz: damaged or incomplete gzip data (it ends early); fetch the file again",
        ),
        ("l.jsonl.gz", Vec::new(), "l.jsonl.gz: no rows"),
        ("m.jsonl", b" \n\n".to_vec(), "m.jsonl: no rows"),
        ("n.json", b"[]".to_vec(), "n.json: no rows"),
        ("o.csv", b"prompt,response\n".to_vec(), "o.csv: no rows"),
        ("p.csv", Vec::new(), "p.csv: no rows"),
    ];
    for (name, bytes, expected) in cases {
        assert_eq!(message(name, bytes, &skipping(pairs())), *expected);
    }
    for bytes in [cut, &damaged] {
        let found = message("q.jsonl.gz", bytes, &skipping(pairs()));
        assert!(found.starts_with("q.jsonl.gz:"), "{found}");
        assert!(
            found.contains(": damaged or incomplete gzip data ("),
            "{found}"
        );
    }
    let text = skipping(plain(Documents::File));
    assert_eq!(message("r.txt", b" \n\t\n", &text), "r.txt: no rows");
    assert_eq!(message("s.txt.gz", &gzip(b""), &text), "s.txt.gz: no rows");
}

#[test]
fn skipped_rows_are_counted_and_shown() {
    let row = r#"{"prompt": "p", "response": "r"}"#;
    let broken = [
        "{",
        r#"{"prompt": "p"}"#,
        "null",
        r#"{"prompt": "p", "response": ""}"#,
        "5",
        "\"text\"",
    ];
    let lines = broken.map(|line| format!("{line}\n{row}\n")).concat();
    let (_folder, path) = file("rows.jsonl", lines.as_bytes());
    let (rows, report) = read(&[path], &skipping(pairs()));
    assert_eq!(
        rows.iter().map(|row| row.line).collect::<Vec<_>>(),
        [2, 4, 6, 8, 10, 12]
    );
    assert_eq!((report.rows, report.bad.count()), (6, 6));
    assert_eq!(report.bad.examples().len(), 5);
    assert!(
        report.bad.examples()[2]
            .ends_with("rows.jsonl:5: a row must be an object with columns, found null")
    );

    // In an array, a broken row costs itself: a quote or a colon too few, braces in text.
    let array = format!(
        "[{row},\n{{\"prompt\": \"p, \n\"response\": \"r\"}},\n{row}, {{\"a\" 1]}}, 7, \"x\", [[{row}]], {row}]"
    );
    let (_folder, path) = file("rows.json", array.replace("1]", "1").as_bytes());
    let (rows, report) = read(&[path], &skipping(pairs()));
    assert_eq!(
        rows.iter().map(|row| row.line).collect::<Vec<_>>(),
        [1, 4, 4]
    );
    assert_eq!(report.bad.count(), 5);
    assert!(
        report.bad.examples()[0].contains("rows.json:2: control character"),
        "{report:?}"
    );

    // What the caller finds wrong with rows goes into a log of its own.
    let mut log = BadRowLog::new(BadRows::Skip);
    log.merge(report.bad);
    let error = || DataError::Row {
        path: "x".into(),
        line: 1,
        problem: RowProblem::NoTarget,
    };
    log.reject(error(), 3).unwrap();
    assert_eq!(log.count(), 6);
    assert!(BadRowLog::new(BadRows::Fatal).reject(error(), 3).is_err());
}

#[test]
fn data_without_any_usable_row_is_given_up() {
    let lines = "{\"question\": \"q\"}\n";
    assert_eq!(
        message("a.jsonl", lines.repeat(2).as_bytes(), &skipping(alpaca())),
        "none of the first 2 rows can be used; is this the right template, and are its column \
         names those of the data?\n  \
         a.jsonl:1: no column `instruction`, `output`; the columns are `question`: set the \
         template's column names accordingly\n  \
         a.jsonl:2: no column `instruction`, `output`; the columns are `question`: set the \
         template's column names accordingly"
    );
    let found = message(
        "b.jsonl",
        lines.repeat(5000).as_bytes(),
        &skipping(alpaca()),
    );
    assert!(found.starts_with("none of the first 1000 rows"), "{found}");
}

#[test]
fn names_in_messages_are_short_and_printable() {
    let columns: Vec<_> = (0..500)
        .map(|n| format!("\"{n}\\u001b[31m{}\": 0", "x".repeat(900)))
        .collect();
    let found = message(
        "a.jsonl",
        format!("{{{}}}", columns.join(",")).as_bytes(),
        &settings(pairs()),
    );
    assert!(found.len() < 1500 && !found.contains('\u{1b}'), "{found}");
    let columns: Vec<_> = (0..2000).map(|n| format!("\"{n}\":0")).collect();
    let found = message(
        "b.jsonl",
        format!("{{{}}}", columns.join(",")).as_bytes(),
        &settings(pairs()),
    );
    assert!(
        found.starts_with("b.jsonl:1: more than 1024 columns"),
        "{found}"
    );
}

/// Files with bytes changed, cut and doubled at random (fixed seed): whatever is wrong with them is an
/// error or a bad row, and reading ends.
#[test]
fn damaged_files_never_panic_or_hang() {
    let mut state = 1_u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % below
    };
    let folder = tempfile::tempdir().unwrap();
    let text = plain(Documents::BlankLine);
    let cases = [
        ("alpaca.json", alpaca()),
        ("adgen.json", adgen()),
        ("turns.jsonl", pairs()),
        ("sentences.csv", text.clone()),
        ("story.txt", text),
    ];
    let mut usable = 0;
    for round in 0..600 {
        let (name, template) = &cases[round % cases.len()];
        let mut bytes = fs::read(stored(name)).unwrap();
        for _ in 0..=random(4) {
            let (at, other) = (random(bytes.len()), random(bytes.len()));
            match random(5) {
                0 => bytes[at] = b"\"\\{}[],:\n\r\xff "[random(12)],
                1 => bytes[at] ^= 1 << random(8),
                2 => bytes.truncate(at.max(1)),
                3 => drop(bytes.drain(at.min(other)..at.max(other))),
                _ => bytes.extend_from_within(at.min(other)..),
            }
        }
        let zipped = round % 7 == 0;
        let mut bytes = if zipped { gzip(&bytes) } else { bytes };
        let at = random(bytes.len());
        bytes[at] ^= u8::from(zipped);
        let path = folder.path().join(name);
        fs::write(&path, &bytes).unwrap();
        let settings = TextSettings {
            max_row_bytes: 700,
            ..skipping(template.clone())
        };
        let rows = TextRows::open(&[path], &settings).unwrap();
        let rows: Vec<_> = rows.take(100_000).collect();
        assert!(rows.len() < 100_000, "{name} does not end");
        usable += rows.iter().flatten().count();
    }
    assert!(usable > 600, "{usable}");
}

// ---- size -----------------------------------------------------------------------------------------

#[test]
fn rows_beyond_the_limit_are_bad_rows_in_every_format() {
    let long = "x".repeat(5000);
    let row = |text: &str| format!("{{\"prompt\": \"{text}\", \"response\": \"r\"}}");
    let settings = TextSettings {
        max_row_bytes: 1000,
        ..skipping(pairs())
    };
    for (name, contents, line) in [
        (
            "a.jsonl",
            format!("{}\n{}\n{}", row("a"), row(&long), row("b")),
            2,
        ),
        (
            "b.json",
            format!("[{},{},{}]", row("a"), row(&long), row("b")),
            1,
        ),
        ("c.csv", format!("prompt,response\na,r\n{long},r\nb,r\n"), 3),
    ] {
        let (_folder, path) = file(name, contents.as_bytes());
        let (rows, report) = read(&[path], &settings);
        let prompts: Vec<_> = texts(&rows).into_iter().map(|(prompt, _)| prompt).collect();
        assert_eq!(prompts, ["a", "b"], "{name}");
        let expected =
            format!("{name}:{line}: the row is longer than 1000 bytes (max_row_bytes); split it");
        assert!(report.bad.examples()[0].ends_with(&expected), "{report:?}");
    }
    let flood = format!("{}\n{}", row("a"), "x".repeat(100_000));
    for (name, contents) in [
        ("d.jsonl", flood.clone()),
        ("e.json", format!("[{}", flood.replace('\n', ",{"))),
        ("f.csv", format!("prompt,response\np,{flood}")),
        (
            "g.csv",
            format!("prompt,response\np,r\n{}", ",".repeat(100_000)),
        ),
    ] {
        let found = message(name, contents.as_bytes(), &settings);
        assert!(
            found.ends_with("goes on for more than 64000 bytes; is this a data file?"),
            "{found}"
        );
    }
}

/// Most memory that this process ever held, in bytes.
#[cfg(target_os = "linux")]
fn peak_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes << 10
}

/// A gigabyte without an end, in a megabyte of gzip: the row is given up after four megabytes, of
/// which 64 KiB were kept.
#[cfg(target_os = "linux")]
#[test]
fn a_gzip_bomb_needs_little_memory() {
    let member = gzip(&vec![b'0'; 1 << 22]);
    for (name, start) in [
        ("a.jsonl.gz", ""),
        ("b.json.gz", "[{\"prompt\": \""),
        ("c.csv.gz", "prompt,response\n\""),
    ] {
        let bomb = [gzip(start.as_bytes()), member.repeat(256)].concat();
        let (_folder, path) = file(name, &bomb);
        let settings = TextSettings {
            max_row_bytes: 1 << 16,
            ..skipping(pairs())
        };
        let mut rows = TextRows::open(&[path], &settings).unwrap();
        let error = rows.next().unwrap().unwrap_err();
        let DataError::Broken { problem, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(*problem, FileProblem::Endless { bytes: 1 << 22 });
        assert!(rows.progress() < 0.1, "{}", rows.progress());
    }
    assert!(peak_memory() < 512 << 20);
}

#[test]
fn long_documents_come_in_pieces_that_fit_together() {
    let line = "一行文字 and some more, 12 ";
    let text: String = (0..40)
        .map(|n| format!("{line}{n}\n{}", "\n".repeat(n % 3)))
        .collect();
    let (_folder, path) = file("long.txt", text.as_bytes());
    for limit in [8, 9, 10, 50, 333] {
        let settings = TextSettings {
            max_row_bytes: limit,
            ..settings(plain(Documents::File))
        };
        let (rows, _) = read(std::slice::from_ref(&path), &settings);
        let joined: String = texts(&rows).into_iter().map(|(_, text)| text).collect();
        assert_eq!(joined, text.trim_end(), "{limit}");
        let edges: Vec<_> = rows
            .iter()
            .map(|row| match row.text {
                RowText::Document { begins, ends, .. } => (begins, ends),
                RowText::Conversation(_) => panic!("a pair"),
            })
            .collect();
        assert_eq!(edges.iter().filter(|edge| edge.0).count(), 1);
        assert_eq!(edges.iter().filter(|edge| edge.1).count(), 1);
        assert!(edges[0].0 && edges[edges.len() - 1].1);
        if limit < 50 {
            continue;
        }
        // Cut at line ends, the pieces have the ids of the whole.
        let chunks = ids(&encode(&rows, &settings));
        let labels = chunks.iter().flat_map(|row| row.labels.iter().copied());
        let found: Vec<i64> = labels.filter(|&id| id != -100).collect();
        let whole = tokenizer().encode(text.trim_end());
        let whole = whole.into_iter().chain([EOP]).map(i64::from);
        assert_eq!(found, whole.collect::<Vec<_>>(), "{limit}");
    }
    let settings = TextSettings {
        max_row_bytes: 10,
        ..settings(plain(Documents::Line))
    };
    let (rows, _) = read(&[path], &settings);
    let ends = |row: &&TextRow| matches!(row.text, RowText::Document { ends: true, .. });
    assert_eq!(rows.iter().filter(ends).count(), 40);
}

// ---- settings -------------------------------------------------------------------------------------

#[test]
fn settings_survive_being_saved_and_tell_what_differs() {
    for template in [alpaca(), adgen(), plain(Documents::BlankLine)] {
        let settings = settings(template).template;
        let json = serde_json::to_string(&settings).unwrap();
        let toml = toml::to_string(&settings).unwrap();
        assert_eq!(
            serde_json::from_str::<TemplateSettings>(&json).unwrap(),
            settings
        );
        assert_eq!(toml::from_str::<TemplateSettings>(&toml).unwrap(), settings);
        assert_eq!(settings.differences(&settings), []);
    }
    let given = settings(pairs()).template;
    let saved = settings(adgen()).template;
    let found: Vec<_> = given
        .differences(&saved)
        .into_iter()
        .map(|it| format!("{}: {} -> {}", it.key, it.saved, it.given))
        .collect();
    assert_eq!(
        found,
        [
            "template.prompt: \"content\" -> \"prompt\"",
            "template.response: \"summary\" -> \"response\"",
        ]
    );
    let keys: Vec<_> = given
        .differences(&settings(alpaca()).template)
        .into_iter()
        .map(|it| it.key)
        .collect();
    assert!(keys.contains(&"template.kind".to_owned()));
    assert!(keys.contains(&"template.output".to_owned()));

    let short: TemplateSettings =
        toml::from_str("template = { kind = \"prompt_response\", prompt = \"q\" }").unwrap();
    assert_eq!(short.max_source_length, 512);
    let error =
        toml::from_str::<TemplateSettings>("template = { kind = \"alpaca\", reply = \"q\" }");
    assert!(error.unwrap_err().to_string().contains("reply"));
}

#[test]
fn problems_keep_their_parts() {
    let (_folder, path) = file("a.jsonl", b"{\"prompt\": \"p\"}");
    let DataError::Row { line, problem, .. } = first_error(&[path], &settings(pairs())) else {
        panic!("no row error");
    };
    let RowProblem::Text(TextProblem::NoColumn { wanted, .. }) = problem else {
        panic!("{problem}");
    };
    assert_eq!((line, wanted.to_string().as_str()), (1, "`response`"));
}
