//! GLM-4's tokenizer against what Python tiktoken gives for a stand-in (`glm4/make.py` made both).
//!
//! `GLM4_TOKENIZER_DIR=<folder>` reads another folder that the script wrote.

use std::path::{Path, PathBuf};
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mp_train::data::byte_level::{ByteLevel, ByteLevelError, Tokens};
use mp_train::data::tokenizer::{Generation, GlmTokenizer, LiteralSpecials, TokenizerFiles};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Message, Random, Report, chat, say};

fn folder() -> PathBuf {
    std::env::var_os("GLM4_TOKENIZER_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer/glm4"),
        PathBuf::from,
    )
}

fn bytes(name: &str) -> Vec<u8> {
    let path = folder().join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn lines<T: DeserializeOwned>(name: &str) -> Vec<T> {
    let text = String::from_utf8(bytes(name)).unwrap();
    let parse = |line| serde_json::from_str(line).unwrap();
    text.lines().map(parse).collect()
}

/// From the ranks, and from `tokenizer.json`.
pub(super) fn tokenizers() -> [GlmTokenizer; 2] {
    let ranks = Tokens::from_ranks(&bytes("tokenizer.model")).unwrap();
    let json = Tokens::from_tokenizer_json(&bytes("tokenizer.json")).unwrap();
    [ranks, json].map(|tokens| GlmTokenizer::glm4(tokens).unwrap())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    #[serde(rename = "cat")]
    _category: String,
    text: Option<String>,
    ids: Vec<u32>,
    /// The ids where the specials in the text are taken for what they look like.
    parsed: Option<Vec<u32>>,
    dec: Option<String>,
}

#[test]
fn glm4_pairs() {
    let tokenizers = tokenizers();
    let mut report = Report::new("glm4/pairs.jsonl");
    let mut parsed = 0;
    for line in lines::<Pair>("pairs.jsonl") {
        report.next_line();
        for (tokenizer, file) in tokenizers.iter().zip(["ranks", "json"]) {
            if let Some(text) = &line.text {
                let found = tokenizer.encode(text);
                report.same(&format!("ids {file}"), found, line.ids.clone());
                let expected = line.parsed.clone().unwrap_or_else(|| line.ids.clone());
                let found = tokenizer.encode_with(text, LiteralSpecials::AsReference);
                report.same(&format!("parsed {file}"), found, expected);
            }
            let expected = line.dec.clone().or_else(|| line.text.clone());
            let found = tokenizer.decode(&line.ids).unwrap();
            report.same(&format!("dec {file}"), Some(found), expected);
        }
        parsed += usize::from(line.parsed.is_some());
    }
    assert!(parsed > 5);
    report.finish();
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Chat {
    messages: Vec<Message>,
    ids: Vec<u32>,
    written: Vec<(usize, usize)>,
}

#[test]
fn glm4_chat() {
    let tokenizers = tokenizers();
    let mut report = Report::new("glm4/chat.jsonl");
    for line in lines::<Chat>("chat.jsonl") {
        report.next_line();
        let messages = chat(&line.messages);
        for tokenizer in &tokenizers {
            let built = tokenizer.build_conversation(&messages, LiteralSpecials::AsText);
            let built = built.unwrap();
            report.same("ids", built.ids, line.ids.clone());
            let ranges = built.written.iter();
            let written = ranges.map(|range| (range.start, range.end)).collect();
            report.same("written", written, line.written.clone());
        }
    }
    report.finish();
}

#[test]
fn specials_are_numbered_behind_the_tokens_of_the_file() {
    for tokenizer in tokenizers() {
        assert_eq!(tokenizer.generation(), Generation::Glm4);
        assert_eq!(tokenizer.size(), 2014);
        let special = tokenizer.special();
        let (eos, gmask, sop) = (special.eos, special.gmask, special.sop);
        assert_eq!((eos, special.pad, gmask, sop), (2000, 2000, 2002, 2004));
        assert_eq!(tokenizer.token_to_id("<|user|>"), Some(2007));
        assert_eq!(tokenizer.token_to_id("<|end_of_video|>"), Some(2013));
        assert_eq!(tokenizer.id_to_token(2007).as_deref(), Some("<|user|>"));
        assert_eq!(tokenizer.id_to_token(32).as_deref(), Some(" "));
        assert_eq!(tokenizer.id_to_token(2014), None);
        assert_eq!(tokenizer.stop_ids(), [2000, 2007, 2009]);
        let built = [tokenizer.build_inputs(&[5], Some(&[6]))];
        assert_eq!(built, [[2002, 2004, 5, 6, 2000]]);
        let all: Vec<u32> = (0..2014).collect();
        assert!(!tokenizer.decode(&all).unwrap().contains("<|user|>"));
        assert!(tokenizer.decode(&[2014]).is_err());
        let text = "<|user|>a[gMASK]";
        let ids = tokenizer.encode(text);
        assert!(ids.iter().all(|&id| id < 2000), "{ids:?}");
    }
}

/// A word as long as a book is merged in time that grows hardly faster than it.
#[test]
fn long_words_and_long_runs_are_encoded() {
    let [tokenizer, _] = tokenizers();
    for unit in ["好", "你好世界", "a", " ", "\n", "1", "=", "\u{301}"] {
        let text = unit.repeat(300_000 / unit.len());
        let ids = tokenizer.encode(&text);
        assert!(tokenizer.decode(&ids).unwrap() == text, "{unit:?}");
    }
}

/// A list as long as GLM-4's own: its special tokens get the ids that the originals have.
#[test]
fn a_file_of_151329_ranks_loads_and_encodes() {
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    let all: Vec<u8> = (0..=u8::MAX).collect();
    let pairs = all.iter().flat_map(|a| all.iter().map(|b| vec![*a, *b]));
    tokens.extend(pairs);
    let words = (0..151_329 - tokens.len()).map(|n| format!("{n:06}token").into_bytes());
    tokens.extend(words);
    let line = |(rank, token): (usize, &Vec<u8>)| format!("{} {rank}\n", STANDARD.encode(token));
    let file: String = tokens.iter().enumerate().map(line).collect();
    let start = Instant::now();
    let tokens = Tokens::from_ranks(file.as_bytes()).unwrap();
    let tokenizer = GlmTokenizer::glm4(tokens).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    say(&format!(
        "151,329 ranks, {} bytes: loaded in {seconds:.3} s",
        file.len()
    ));
    assert_eq!(tokenizer.size(), 151_343);
    assert_eq!(tokenizer.stop_ids(), [151_329, 151_336, 151_338]);
    let ids = tokenizer.encode("你好 ab");
    assert_eq!(tokenizer.decode(&ids).unwrap(), "你好 ab");
    // Pairs of bytes: three for two characters, " a" and "b" for the word.
    assert_eq!(ids.len(), 5);
}

// Files that are damaged, or made to do harm.

fn rank_lines() -> Vec<String> {
    let file = String::from_utf8(bytes("tokenizer.model")).unwrap();
    file.lines().map(str::to_owned).collect()
}

fn ranks_error(lines: &[String]) -> String {
    let file = lines.join("\n");
    let tokens = Tokens::from_ranks(file.as_bytes());
    match tokens.and_then(ByteLevel::new) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn damaged_ranks_are_named() {
    let with = |line: usize, text: &str| {
        let mut lines = rank_lines();
        lines[line] = text.to_owned();
        ranks_error(&lines)
    };
    let long = format!("{} 300", "QUFB".repeat(300));
    for (line, text, expected) in [
        (4, "", "line 5 has no space"),
        (4, "BA==4", "line 5 has no space"),
        (4, "BA== ", "line 5 has no rank"),
        (4, "BA==  4", "line 5 has no rank"),
        (4, "BA== -4", "line 5 has no rank"),
        (4, "BA== 4 ", "line 5 has no rank"),
        (4, "BA== 4294967296", "line 5 has too large a rank"),
        (4, "BA 4", "line 5 begins with something that is not base64"),
        (
            4,
            "BB== 4",
            "line 5 begins with something that is not base64",
        ),
        (
            4,
            "B*== 4",
            "line 5 begins with something that is not base64",
        ),
        (4, " 4", "line 5 has an empty token"),
        (4, "BA== 5", "4 is the id of none"),
        (4, "BA== 4000", "4 is the id of none"),
        (4, "AA== 4", "tokens 0 and 4 are the same bytes"),
        (4, "AAQ= 4", "no token is the single byte 0x04"),
        (300, &long, "token 300 has 900 bytes, more than 512"),
    ] {
        let error = with(line, text);
        assert!(error.contains(expected), "`{error}` says not `{expected}`");
    }
    let mut short = rank_lines();
    short.truncate(255);
    assert!(ranks_error(&short).contains("the single byte 0xFF"));
    let many: Vec<String> = (0..262_145).map(|rank| format!("BA== {rank}")).collect();
    assert!(ranks_error(&many).contains("more than 262144 tokens"));
    // Windows' line ends, and no end at all, are no harm.
    let lines = rank_lines();
    let [sound, _] = tokenizers();
    for file in [lines.join("\r\n"), lines.join("\n")] {
        let tokens = Tokens::from_ranks(file.as_bytes()).unwrap();
        assert_eq!(tokens.to_bytes(), sound.vocabulary_bytes());
    }
}

fn json() -> Value {
    serde_json::from_slice(&bytes("tokenizer.json")).unwrap()
}

fn json_result(json: &Value) -> Result<GlmTokenizer, String> {
    let tokens = Tokens::from_tokenizer_json(json.to_string().as_bytes());
    let tokens = tokens.map_err(|error: ByteLevelError| error.to_string())?;
    GlmTokenizer::glm4(tokens).map_err(|error| error.to_string())
}

#[test]
fn another_tokenizer_json_is_refused_by_what_differs() {
    let split = "/pre_tokenizer/pretokenizers/0";
    let byte_level = "/pre_tokenizer/pretokenizers/1";
    let cases = [
        ("/model/type", json!("Unigram"), "model.type is \"Unigram\""),
        ("/model/dropout", json!(0.1), "model.dropout is 0.1"),
        ("/model/unk_token", json!("<unk>"), "model.unk_token"),
        (
            "/model/continuing_subword_prefix",
            json!("##"),
            "model.continuing_subword_prefix",
        ),
        ("/model/end_of_word_suffix", json!("</w>"), "end_of_word"),
        ("/model/byte_fallback", json!(true), "model.byte_fallback"),
        ("/model/ignore_merges", json!(1), "not a tokenizer.json"),
        ("/model/vocab/!", json!(-1), "not a tokenizer.json"),
        ("/model/vocab/!", json!(32), "33 is the id of none"),
        ("/model/merges/7", json!(["a", "é"]), "merge 8 does not"),
        ("/model/merges/7", json!("no"), "merge 8 does not"),
        (
            "/model/merges/7",
            json!(["!", "!!!!!!"]),
            "merge 8 does not",
        ),
        ("/model/merges/7", json!(7), "not a tokenizer.json"),
        (
            "/normalizer",
            json!({"type": "NFC"}),
            "normalizer is {\"type\":\"NFC\"}, where GLM-4's tokenizer has nothing",
        ),
        (
            &format!("{split}/pattern/Regex"),
            json!("(a+)+$"),
            "pre_tokenizer.pretokenizers.0.pattern.Regex is \"(a+)+$\"",
        ),
        (&format!("{split}/behavior"), json!("Removed"), "0.behavior"),
        (&format!("{split}/invert"), json!(true), "0.invert is true"),
        (
            &format!("{byte_level}/use_regex"),
            json!(true),
            "1.use_regex",
        ),
        (
            &format!("{byte_level}/add_prefix_space"),
            json!(true),
            "1.add_prefix_space",
        ),
        (
            "/pre_tokenizer",
            Value::Null,
            "pre_tokenizer.type is nothing",
        ),
        ("/decoder", json!({"type": "Metaspace"}), "decoder.type"),
        (
            "/added_tokens/7/content",
            json!("<|human|>"),
            "no special token <|user|> with the id 2007",
        ),
        (
            "/added_tokens/7/id",
            json!(2050),
            "added_tokens, <|assistant|> is id 2008",
        ),
        ("/added_tokens", json!([]), ""),
    ];
    for (pointer, value, expected) in cases {
        let mut json = json();
        *json
            .pointer_mut(pointer)
            .unwrap_or_else(|| panic!("{pointer}")) = value;
        let result = json_result(&json);
        if expected.is_empty() {
            // Without names the specials are GLM-4's.
            assert_eq!(result.unwrap().token_to_id("<|user|>"), Some(2007));
            continue;
        }
        let error = result.err().unwrap_or_else(|| panic!("{pointer} accepted"));
        assert!(error.contains(expected), "`{error}` says not `{expected}`");
    }
    // Merges written as lines, and what is left out, are the same tokenizer.
    let mut plain = json();
    let merges = plain.pointer_mut("/model/merges").unwrap();
    for merge in merges.as_array_mut().unwrap() {
        *merge = json!(format!(
            "{} {}",
            merge[0].as_str().unwrap(),
            merge[1].as_str().unwrap()
        ));
    }
    for key in ["dropout", "unk_token", "byte_fallback", "type"] {
        plain["model"].as_object_mut().unwrap().remove(key);
    }
    let [_, sound] = tokenizers();
    let plain = json_result(&plain).unwrap();
    assert_eq!(plain.vocabulary_bytes(), sound.vocabulary_bytes());
    let mut huge = json();
    huge["normalizer"] = json!(vec![0; 10_000]);
    let error = json_result(&huge).err().unwrap();
    assert!(error.contains("normalizer has 20001 bytes"), "{error}");
    huge["normalizer"] = Value::Null;
    huge["added_tokens"] = json!(vec![json!({"id": 2000, "content": "a"}); 1025]);
    let error = json_result(&huge).err().unwrap();
    assert!(error.contains("more than 1024 elements"), "{error}");
    let nested = "[".repeat(100_000);
    let error = Tokens::from_tokenizer_json(nested.as_bytes()).unwrap_err();
    assert!(error.to_string().contains("not a tokenizer.json"));
}

/// Whatever a flipped, cut or doubled file contains, it is refused or it works.
#[test]
fn mutated_byte_level_files_never_panic() {
    let text = "Hello  world 你好\r\n\n 123456 it's <|user|> 😀\u{0}\u{301}";
    for name in ["tokenizer.model", "tokenizer.json"] {
        let whole = bytes(name);
        let mut random = Random(name.len() as u64 + 5);
        let mut loaded = 0;
        let rounds = 120;
        for round in 0..rounds {
            let mut file = whole.clone();
            for _ in 0..1 + round % 3 {
                let at = random.below(file.len());
                match random.below(5) {
                    0 | 1 => file[at] ^= 1 << random.below(8),
                    2 => file[at] = b"0123456789 \",[]{}"[random.below(17)],
                    3 => {
                        let part = file[at..(at + random.below(40)).min(whole.len())].to_vec();
                        file.splice(at..at, part);
                    }
                    _ => file.truncate(at.max(1)),
                }
            }
            let tokens = match name {
                "tokenizer.model" => Tokens::from_ranks(&file),
                _ => Tokens::from_tokenizer_json(&file),
            };
            let Ok(Ok(tokenizer)) = tokens.map(GlmTokenizer::glm4) else {
                continue;
            };
            loaded += 1;
            let ids = tokenizer.encode(text);
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
        say(&format!(
            "glm4/{name}: {rounds} mutations, {loaded} still load"
        ));
        assert!(
            loaded > 0,
            "the mutations test hardly anything but the parser"
        );
    }
}

#[test]
fn folders_of_glm4_are_read_and_their_faults_named() {
    let read = |files: &[(&str, &[u8])]| {
        let folder = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            std::fs::write(folder.path().join(name), contents).unwrap();
        }
        TokenizerFiles::read(folder.path())
    };
    let (ranks, json) = (bytes("tokenizer.model"), bytes("tokenizer.json"));
    assert!(read(&[("tokenizer.model", &ranks)]).is_ok());
    assert!(read(&[("tokenizer.json", &json)]).is_ok());
    // The model goes first: a tokenizer.json beside it may be anybody's.
    assert!(read(&[("tokenizer.model", &ranks), ("tokenizer.json", b"{")]).is_ok());
    let error = |files: &[(&str, &[u8])]| read(files).unwrap_err().to_string();
    let gap = error(&[("tokenizer.model", b"IQ== 0\nIg== 2\n")]);
    assert!(
        gap.contains("tokenizer.model: there are 2 tokens, but 1 is"),
        "{gap}"
    );
    let other = error(&[(
        "tokenizer.json",
        b"{\"model\": {\"vocab\": {}, \"merges\": []}}",
    )]);
    assert!(other.contains("tokenizer.json: pre_tokenizer"), "{other}");
    let mut long = ranks.clone();
    long.resize((8 << 20) + 1, b'\n');
    let long = error(&[("tokenizer.model", &long)]);
    assert!(
        long.contains("has 8388609 bytes, more than 8388608"),
        "{long}"
    );
    let huge = error(&[("tokenizer.json", &vec![b' '; (48 << 20) + 1])]);
    assert!(huge.contains("has 50331649 bytes"), "{huge}");
}
