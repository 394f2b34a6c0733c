//! The tokenizers against recorded ids: every line of a folder laid out like `tests/tokenizer`.
//!
//! `TOKENIZER_DIR=<folder> cargo test --release --test tokenizer` reads another such folder.
#![allow(clippy::unwrap_used)]

use std::fmt::Debug;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use mp_train::data::sentencepiece::hosted::{Hosted, HostedTokenizer};
use mp_train::data::sentencepiece::{
    ModelProto, ModelType, Piece, PieceKind, SentencePiece, SentencePieceError,
};
use mp_train::data::tokenizer::{
    ChatMessage, ChatRole, Era, Generation, GlmTokenizer, InputRule, LiteralSpecials,
    TokenizerError, TokenizerFiles, VocabularyFile, append_chatglm_pieces,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;

#[path = "tokenizer/glm4.rs"]
mod glm4;
#[path = "tokenizer/pairing.rs"]
mod pairing;

const KNOWN: [&str; 6] = [
    "v1.jsonl",
    "v1_pairs.jsonl",
    "v1_ties.jsonl",
    "v2.jsonl",
    "v2_pairs.jsonl",
    "v3_chat.jsonl",
];
const IMAGE_TOKENS: u32 = 20_000;

fn folder() -> PathBuf {
    std::env::var_os("TOKENIZER_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer"),
        PathBuf::from,
    )
}

fn bytes(name: &str) -> Vec<u8> {
    let path = folder().join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn proto(name: &str) -> ModelProto {
    ModelProto::parse(&bytes(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Past the capture of the test harness, so that a passing run shows it too.
fn say(line: &str) {
    let line = format!("{line}\n");
    std::io::stdout().write_all(line.as_bytes()).unwrap();
}

/// The lines of one file; a line with an unknown or missing field ends the test.
fn lines<T: DeserializeOwned>(name: &str) -> Vec<T> {
    let text = String::from_utf8(bytes(name)).unwrap();
    let parse = |(index, line)| {
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{name}:{}: {error}", index + 1))
    };
    text.lines().enumerate().map(parse).collect()
}

/// Counts comparisons of one file.
struct Report {
    name: &'static str,
    line: usize,
    compared: usize,
    mismatches: usize,
}

impl Report {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            line: 0,
            compared: 0,
            mismatches: 0,
        }
    }

    fn next_line(&mut self) {
        self.line += 1;
    }

    fn same<T: PartialEq + Debug>(&mut self, field: &str, found: T, expected: T) {
        self.compared += 1;
        if found != expected {
            self.mismatches += 1;
            if self.mismatches <= 10 {
                let (name, line) = (self.name, self.line);
                say(&format!(
                    "{name}:{line}: {field}\n  found    {found:?}\n  expected {expected:?}"
                ));
            }
        }
    }

    fn finish(self) {
        let Self {
            name,
            line,
            compared,
            mismatches,
        } = self;
        say(&format!(
            "{name}: {line} lines, {compared} comparisons, {mismatches} mismatches"
        ));
        assert!(line > 0, "{name} is empty");
        assert_eq!(mismatches, 0, "{name} has mismatches");
    }
}

fn shifted(ids: &[u32], by: u32) -> Vec<u32> {
    ids.iter().map(|id| id + by).collect()
}

/// Era A from the file without specials, B and C from the one with them.
fn eras() -> [(Era, u32, GlmTokenizer); 3] {
    let build = |era, name, shift| {
        let tokenizer = GlmTokenizer::chatglm(proto(name), shift).unwrap();
        assert_eq!(tokenizer.generation(), Generation::ChatGlm(era));
        (era, shift, tokenizer)
    };
    [
        build(Era::A, "v1_base.model", IMAGE_TOKENS),
        build(Era::B, "v1.model", IMAGE_TOKENS),
        build(Era::C, "v1.model", 0),
    ]
}

fn hosted(tokenizer: &GlmTokenizer) -> HostedTokenizer {
    let hosted = Hosted::new(Arc::clone(tokenizer.sentence_piece().unwrap()));
    hosted.pipeline().unwrap()
}

/// `dec`: the text itself, or `true` where it is the input.
#[derive(Deserialize)]
#[serde(untagged)]
enum Decoded {
    Same(bool),
    Text(String),
}

impl Decoded {
    fn of<'a>(&'a self, text: &'a str) -> &'a str {
        match self {
            Self::Same(true) => text,
            Self::Same(false) => panic!("`dec` is true or a text"),
            Self::Text(text) => text,
        }
    }
}

#[test]
fn the_folder_holds_the_known_files_and_no_others() {
    let mut found: Vec<String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".jsonl"))
        .collect();
    found.sort_unstable();
    assert_eq!(found, KNOWN);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct V1Line {
    #[serde(rename = "cat")]
    _category: String,
    text: String,
    ids: Vec<u32>,
    dec: Decoded,
    sp_raw: Option<Vec<u32>>,
    no_dummy: Option<Vec<u32>>,
    hf_a: Option<Vec<u32>>,
    hf_b: Option<Vec<u32>>,
    hf_c: Option<Vec<u32>>,
    dec_hf_c: Option<String>,
    tail_a: Option<Vec<u32>>,
}

#[test]
fn v1() {
    let eras = eras();
    let pipeline = hosted(&eras[2].2);
    let mut report = Report::new("v1.jsonl");
    for line in lines::<V1Line>("v1.jsonl") {
        report.next_line();
        let text = line.text.as_str();
        let decoded = line.dec.of(text).to_owned();
        for (era, shift, tokenizer) in &eras {
            let ids = shifted(&line.ids, *shift);
            report.same(&format!("ids {era:?}"), tokenizer.encode(text), ids.clone());
            let raw = line.sp_raw.as_ref().unwrap_or(&line.ids);
            let found = tokenizer.sentence_piece().unwrap().encode(text);
            report.same(&format!("sp_raw {era:?}"), found, raw.clone());
            if let Some(expected) = &line.no_dummy {
                let found = tokenizer.encode_without_dummy_prefix(text).unwrap();
                report.same(
                    &format!("no_dummy {era:?}"),
                    found,
                    shifted(expected, *shift),
                );
            }
            let split = match era {
                Era::A => &line.hf_a,
                Era::B => &line.hf_b,
                Era::C => &line.hf_c,
            };
            let split = split.clone().unwrap_or_else(|| ids.clone());
            let found = tokenizer.encode_with(text, LiteralSpecials::AsReference);
            report.same(&format!("hf {era:?}"), found, split.clone());
            let found = tokenizer.decode(&ids).unwrap();
            report.same(&format!("dec {era:?}"), found, decoded.clone());
            let wrapper = |ids: &[u32]| tokenizer.decode_as_reference(ids).unwrap();
            if *era == Era::C {
                let expected = line.dec_hf_c.as_ref().unwrap_or(&decoded);
                report.same("dec_hf_c", wrapper(&split), expected.clone());
            } else {
                let mut padded = vec![tokenizer.special().pad; 3];
                padded.extend(&ids);
                report.same(
                    &format!("padded {era:?}"),
                    wrapper(&padded),
                    decoded.clone(),
                );
            }
            if *era == Era::A
                && let Some(expected) = &line.tail_a
            {
                let built = tokenizer.build_inputs(&split, None);
                report.same(
                    "tail_a",
                    built[built.len() - 2..].to_vec(),
                    expected.clone(),
                );
            }
        }
        same_hosted(&mut report, &pipeline, &eras[2].2, text);
    }
    report.finish();
}

/// The pipeline of the `tokenizers` crate gives the same ids and the same text.
fn same_hosted(
    report: &mut Report,
    pipeline: &HostedTokenizer,
    tokenizer: &GlmTokenizer,
    text: &str,
) {
    let model = tokenizer.sentence_piece().unwrap();
    let ids = model.encode(text);
    let encoding = pipeline.encode(text, false).unwrap();
    report.same("hosted", encoding.get_ids().to_vec(), ids.clone());
    let within = |&(start, end): &(usize, usize)| text.get(start..end).is_some();
    report.same("offsets", encoding.get_offsets().iter().all(within), true);
    let decoded = model.decode(&ids).unwrap();
    report.same("hosted dec", pipeline.decode(&ids, false).unwrap(), decoded);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct V1Pair {
    prompt: String,
    answer: String,
    pair_a: Vec<u32>,
    single_a: Vec<u32>,
    pair_b: Vec<u32>,
    single_b: Vec<u32>,
    pair_c: Vec<u32>,
    single_c: Vec<u32>,
}

#[test]
fn v1_pairs() {
    let eras = eras();
    let mut report = Report::new("v1_pairs.jsonl");
    for line in lines::<V1Pair>("v1_pairs.jsonl") {
        report.next_line();
        for (era, _, tokenizer) in &eras {
            let (single, pair) = match era {
                Era::A => (&line.single_a, &line.pair_a),
                Era::B => (&line.single_b, &line.pair_b),
                Era::C => (&line.single_c, &line.pair_c),
            };
            let prompt = tokenizer.encode_with(&line.prompt, LiteralSpecials::AsReference);
            let answer = tokenizer.encode_with(&line.answer, LiteralSpecials::AsReference);
            let found = tokenizer.build_inputs(&prompt, None);
            report.same(&format!("single {era:?}"), found, single.clone());
            let found = tokenizer.build_inputs(&prompt, Some(&answer));
            report.same(&format!("pair {era:?}"), found, pair.clone());
        }
    }
    report.finish();
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct V1Tie {
    text_sp_raw: String,
    ids_sp_le_0_2_1: Vec<u32>,
    #[serde(rename = "ids_sp_ge_0_2_2")]
    _newer: Vec<u32>,
}

#[test]
fn v1_ties() {
    let [_, _, (_, _, tokenizer)] = eras();
    let pipeline = hosted(&tokenizer);
    let mut report = Report::new("v1_ties.jsonl");
    for line in lines::<V1Tie>("v1_ties.jsonl") {
        report.next_line();
        let found = tokenizer
            .sentence_piece()
            .unwrap()
            .encode(&line.text_sp_raw);
        report.same("ids_sp_le_0_2_1", found, line.ids_sp_le_0_2_1);
        same_hosted(&mut report, &pipeline, &tokenizer, &line.text_sp_raw);
    }
    report.finish();
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct V2Line {
    #[serde(rename = "cat")]
    _category: String,
    text: String,
    ids: Vec<u32>,
    dec: Decoded,
}

#[test]
fn v2() {
    let tokenizers = [
        GlmTokenizer::chatglm2(proto("v2.model")).unwrap(),
        GlmTokenizer::chatglm3(proto("v2.model")).unwrap(),
    ];
    let pipeline = hosted(&tokenizers[0]);
    let mut report = Report::new("v2.jsonl");
    for line in lines::<V2Line>("v2.jsonl") {
        report.next_line();
        for tokenizer in &tokenizers {
            report.same("ids", tokenizer.encode(&line.text), line.ids.clone());
            let found = tokenizer.encode_with(&line.text, LiteralSpecials::AsReference);
            report.same("hf", found, line.ids.clone());
            let expected = line.dec.of(&line.text).to_owned();
            let found = tokenizer.decode(&line.ids).unwrap();
            report.same("dec", found, expected.clone());
            let found = tokenizer.decode_as_reference(&line.ids).unwrap();
            report.same("dec_hf", found, expected);
        }
        same_hosted(&mut report, &pipeline, &tokenizers[0], &line.text);
    }
    report.finish();
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct V2Pair {
    prompt: String,
    answer: String,
    single: Vec<u32>,
    pair: Vec<u32>,
}

#[test]
fn v2_pairs() {
    let tokenizer = GlmTokenizer::chatglm2(proto("v2.model")).unwrap();
    let mut report = Report::new("v2_pairs.jsonl");
    for line in lines::<V2Pair>("v2_pairs.jsonl") {
        report.next_line();
        let prompt = tokenizer.encode(&line.prompt);
        let answer = tokenizer.encode(&line.answer);
        report.same("single", tokenizer.build_inputs(&prompt, None), line.single);
        let found = tokenizer.build_inputs(&prompt, Some(&answer));
        report.same("pair", found, line.pair);
    }
    report.finish();
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct V3Chat {
    messages: Vec<Message>,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    role: String,
    metadata: String,
    content: String,
}

fn chat(messages: &[Message]) -> Vec<ChatMessage<'_>> {
    let role = |name: &str| match name {
        "system" => ChatRole::System,
        "user" => ChatRole::User,
        "assistant" => ChatRole::Assistant,
        "observation" => ChatRole::Observation,
        other => panic!("role {other}"),
    };
    let messages = messages.iter();
    messages
        .map(|message| ChatMessage {
            role: role(&message.role),
            metadata: &message.metadata,
            content: &message.content,
        })
        .collect()
}

#[test]
fn v3_chat() {
    let tokenizer = GlmTokenizer::chatglm3(proto("v2.model")).unwrap();
    let mut report = Report::new("v3_chat.jsonl");
    for line in lines::<V3Chat>("v3_chat.jsonl") {
        report.next_line();
        let messages = chat(&line.messages);
        let built = tokenizer.build_conversation(&messages, LiteralSpecials::AsText);
        report.same("ids", built.unwrap().ids, line.ids);
    }
    report.finish();
}

#[test]
fn meta_names_the_ids_of_the_specials() {
    let meta: serde_json::Value = serde_json::from_slice(&bytes("meta.json")).unwrap();
    let number = |value: &serde_json::Value| value.as_u64().unwrap() as u32;
    for (era, shift, tokenizer) in eras() {
        for (key, value) in meta["v1"].as_object().unwrap() {
            match key.as_str() {
                "num_text_tokens" => assert_eq!(tokenizer.size(), number(value) + shift),
                "base_pieces" => {
                    assert_eq!(proto("v1_base.model").pieces.len() as u32, number(value));
                }
                "num_image_tokens" => {
                    let key = format!("{era:?}").to_lowercase();
                    assert_eq!(number(&value[&key]), shift);
                }
                token => {
                    let id = number(value) + shift;
                    assert_eq!(tokenizer.token_to_id(token), Some(id), "{token}");
                    assert_eq!(tokenizer.id_to_token(id).as_deref(), Some(token));
                }
            }
        }
        let image = (shift > 0).then_some(shift - u32::from(shift > 0));
        let name = format!("<image_{}>", IMAGE_TOKENS - 1);
        assert_eq!(tokenizer.token_to_id(&name), image);
        assert_eq!(tokenizer.token_to_id("<image_20000>"), None);
    }
    let two = GlmTokenizer::chatglm2(proto("v2.model")).unwrap();
    let three = GlmTokenizer::chatglm3(proto("v2.model")).unwrap();
    for (key, value) in meta["v2"].as_object().unwrap() {
        match key.as_str() {
            "pieces" => assert_eq!(two.size() - 5, number(value)),
            "v3 roles" => {
                for (role, id) in value.as_object().unwrap() {
                    assert_eq!(three.token_to_id(role), Some(number(id)));
                    assert_eq!(three.id_to_token(number(id)).as_ref(), Some(role));
                    assert_eq!(two.token_to_id(role), None);
                }
            }
            token => assert_eq!(two.token_to_id(token), Some(number(value)), "{token}"),
        }
    }
}

#[test]
fn worked_examples_of_special_tokens() {
    let [(_, _, a), (_, _, b), (_, _, c)] = eras();
    let built = |tokenizer: &GlmTokenizer, prompt: &str, answer: Option<&str>| {
        let answer = answer.map(|text| tokenizer.encode(text));
        tokenizer.build_inputs(&tokenizer.encode(prompt), answer.as_deref())
    };
    assert_eq!(built(&c, "你好", None), [230, 138, 1657, 1660]);
    assert_eq!(built(&a, "你好", None), [20230, 20138, 21657, 21660]);
    assert_eq!(built(&b, "你好", None), [20230, 20138, 21657, 21660]);
    let masked = a.encode_with("你好[MASK]世界", LiteralSpecials::AsReference);
    assert!(a.build_inputs(&masked, None).ends_with(&[20002, 21660]));
    // An answer that already ends in <eop> gets no second one, by the rule of April only.
    let answer = [b.special().eop];
    let ends = |rule| b.build_inputs_by(rule, &[], Some(&answer)).len();
    assert_eq!((ends(InputRule::Between), ends(InputRule::Always)), (3, 4));
    assert!(c.encode("").is_empty());
    assert!(c.encode(" ").is_empty());
    assert_eq!(c.encode("\n"), [5, 4]);
}

#[test]
fn text_that_looks_special_stays_text() {
    for (_, _, tokenizer) in eras() {
        for token in [
            "[MASK]", "[gMASK]", "<sop>", "<eop>", "</s>", "<pad>", "<unk>", "<0x41>",
        ] {
            let id = tokenizer.token_to_id(token).unwrap();
            let ids = tokenizer.encode(&format!("a {token} b"));
            assert!(!ids.contains(&id), "{token}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), format!("a {token} b"));
        }
    }
}

#[test]
fn files_are_written_as_they_were_read() {
    for name in ["v1.model", "v1_base.model", "v2.model"] {
        assert!(proto(name).to_bytes() == bytes(name), "{name} differs");
    }
    let mut base = proto("v1_base.model");
    assert!(append_chatglm_pieces(&mut base).unwrap());
    assert!(
        base.to_bytes() == bytes("v1.model"),
        "v1_base.model + 344 pieces is not v1.model"
    );
    assert!(!append_chatglm_pieces(&mut base).unwrap());
}

#[test]
fn decoding_refuses_ids_that_nothing_has() {
    let two = GlmTokenizer::chatglm2(proto("v2.model")).unwrap();
    let last = two.size() - 1;
    assert_eq!(two.decode(&[last, two.special().gmask]).unwrap(), "");
    let error = two.decode(&[last + 1]).unwrap_err();
    assert!(matches!(error, TokenizerError::IdOutOfRange { id, .. } if id == last + 1));
    assert!(error.to_string().contains(&(last + 1).to_string()));
    let [(_, _, a), _, (_, _, c)] = eras();
    assert_eq!(a.decode(&[0, 5, 19_999]).unwrap(), "");
    assert!(c.decode(&a.encode("你好")).is_err());
    let pieces = c.size();
    assert_eq!(
        c.sentence_piece()
            .unwrap()
            .decode(&[0, pieces])
            .unwrap_err(),
        SentencePieceError::IdOutOfRange {
            id: i64::from(pieces),
            pieces: pieces as usize
        }
    );
}

/// A generator for tests: xorshift64*, Vigna 2016.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

fn piece(text: &str, score: f32, kind: PieceKind) -> Piece {
    Piece {
        text: text.to_owned(),
        score,
        kind,
    }
}

#[test]
fn a_file_of_130000_pieces_loads_and_encodes() {
    let mut random = Random(7);
    // A space of its own, since BPE starts from characters.
    let mut texts = std::collections::BTreeSet::from(["▁".to_owned()]);
    while texts.len() < 129_995 {
        let chinese = texts.len() % 2 == 0;
        let len = 1 + random.below(if chinese { 4 } else { 12 });
        let character = |random: &mut Random| match chinese {
            true => char::from_u32(0x4e00 + random.below(0x5000) as u32).unwrap(),
            false => char::from(b'a' + random.below(26) as u8),
        };
        let prefix = if random.below(3) == 0 { "▁" } else { "" };
        let word: String = (0..len).map(|_| character(&mut random)).collect();
        texts.insert(format!("{prefix}{word}"));
    }
    let control = PieceKind::Control;
    let mut pieces = vec![
        piece("<unk>", 0.0, PieceKind::Unknown),
        piece("<s>", 0.0, control),
        piece("</s>", 0.0, control),
        piece("<pad>", 0.0, control),
        piece("<n>", 0.0, PieceKind::UserDefined),
    ];
    let normal = |text: &String| {
        piece(
            text,
            -1.0 - random.below(1000) as f32 / 64.0,
            PieceKind::Normal,
        )
    };
    pieces.extend(texts.iter().map(normal));
    assert_eq!(pieces.len(), 130_000);
    for kind in [ModelType::Unigram, ModelType::Bpe] {
        let file = ModelProto::new(kind, false, pieces.clone()).to_bytes();
        let start = Instant::now();
        let proto = ModelProto::parse(&file).unwrap();
        let tokenizer = GlmTokenizer::chatglm(proto, 0).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        say(&format!(
            "{kind:?}, 130,000 pieces, {} bytes: loaded in {seconds:.3} s",
            file.len()
        ));
        assert_eq!(tokenizer.size(), 130_344);
        let text: String = texts
            .iter()
            .step_by(3)
            .take(20_000)
            .map(|t| t.replace('▁', " "))
            .collect();
        let start = Instant::now();
        let ids = tokenizer.encode(&text);
        let seconds = start.elapsed().as_secs_f64();
        say(&format!(
            "{kind:?}: {} bytes, {} ids in {seconds:.3} s",
            text.len(),
            ids.len()
        ));
        let decoded = tokenizer.decode(&ids).unwrap();
        assert!(
            decoded == text.strip_prefix(' ').unwrap_or(&text),
            "{kind:?} loses text"
        );
    }
}

// Files that are damaged, or made to do harm.

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn message(number: u64, contents: &[u8]) -> Vec<u8> {
    let mut out = varint(number << 3 | 2);
    out.extend(varint(contents.len() as u64));
    out.extend(contents);
    out
}

fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn load_error(bytes: &[u8]) -> String {
    SentencePiece::from_bytes(bytes).unwrap_err().to_string()
}

fn model_error(byte_fallback: bool, pieces: &[Piece]) -> String {
    load_error(&ModelProto::new(ModelType::Bpe, byte_fallback, pieces.to_vec()).to_bytes())
}

/// A model with this charsmap.
fn with_blob(blob: &[u8]) -> Vec<u8> {
    let unknown = [message(1, b"<unk>"), number(3, 2)].concat();
    [message(1, &unknown), message(3, &message(2, blob))].concat()
}

/// A model whose charsmap has this trie and these replacements.
fn with_charsmap(announced: u32, units: &[u32], replacements: &[u8]) -> Vec<u8> {
    let mut blob = announced.to_le_bytes().to_vec();
    blob.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
    blob.extend(replacements);
    with_blob(&blob)
}

#[test]
fn a_truncated_file_is_named_so() {
    for name in ["v1.model", "v2.model"] {
        let whole = bytes(name);
        let mut random = Random(11);
        for _ in 0..40 {
            let cut = 1 + random.below(whole.len() - 20);
            let error = load_error(&whole[..cut]);
            assert!(
                error.contains("fetch the file again"),
                "{name} at {cut}: {error}"
            );
        }
    }
    assert!(load_error(b"").contains("has no UNKNOWN piece"));
}

#[test]
fn lengths_are_not_believed() {
    let huge = [varint(1 << 3 | 2), varint(u64::MAX >> 1), vec![0; 9]].concat();
    assert!(load_error(&huge).contains("a field of 9223372036854775807 bytes where 9 are left"));
    let inner = message(1, &[varint(1 << 3 | 2), varint(1 << 40)].concat());
    assert!(load_error(&inner).contains("a field of 1099511627776 bytes where 0 are left"));
    assert!(load_error(&[0x08; 1]).contains("it ends inside a number"));
    let endless = [vec![0x08], vec![0xff; 30]].concat();
    assert!(load_error(&endless).contains("more than ten bytes"));
    assert!(load_error(&[0x0b]).contains("wire type 3"));
    assert!(load_error(&[0x00, 0x00]).contains("field key 0 is invalid"));
    assert!(load_error(&number(1, 5)).contains("pieces: text or bytes expected"));
    assert!(load_error(&message(1, &message(1, b"\xff"))).contains("no UTF-8"));
    let too_long = message(1, &message(1, &[b'a'; 5000]));
    assert!(load_error(&too_long).contains("has 5000 bytes, more than 4096"));
}

#[test]
fn rules_of_the_vocabulary_are_named() {
    let unknown = piece("<unk>", 0.0, PieceKind::Unknown);
    let normal = |text: &str, score| piece(text, score, PieceKind::Normal);
    let byte = |text: &str| piece(text, 0.0, PieceKind::Byte);
    let cases: [(bool, Vec<Piece>, &str); 9] = [
        (false, vec![], "has no UNKNOWN piece"),
        (
            false,
            vec![unknown.clone(), normal("", 0.0)],
            "piece 1 (``) is empty",
        ),
        (
            false,
            vec![unknown.clone(), piece("<u>", 0.0, PieceKind::Unknown)],
            "piece 1 (`<u>`) is a second UNKNOWN piece beside piece 0",
        ),
        (
            false,
            vec![
                unknown.clone(),
                normal("a", 0.0),
                normal("b", 0.0),
                normal("a", 0.0),
            ],
            "piece 3 (`a`) is also piece 1",
        ),
        (
            false,
            vec![unknown.clone(), piece("<unk>", 0.0, PieceKind::Control)],
            "piece 1 (`<unk>`) is also piece 0",
        ),
        (
            false,
            vec![unknown.clone(), normal("a", f32::NAN)],
            "piece 1 (`a`) has the score NaN",
        ),
        (
            false,
            vec![unknown.clone(), byte("<0x00>")],
            "piece 1 (`<0x00>`) is a BYTE piece without byte_fallback",
        ),
        (
            true,
            vec![unknown.clone(), byte("<0x+1>")],
            "piece 1 (`<0x+1>`) is a BYTE piece that names no byte",
        ),
        (
            true,
            vec![unknown.clone(), byte("<0x00>")],
            "has byte_fallback but no BYTE piece <0x01>",
        ),
    ];
    for (byte_fallback, pieces, expected) in cases {
        let error = model_error(byte_fallback, &pieces);
        assert!(error.contains(expected), "`{error}` says not `{expected}`");
    }
    let kinds = [
        (number(3, 3), "type WORD"),
        (number(3, 4), "type CHAR"),
        (number(3, 9), "model_type 9"),
        (number(24, 1), "treat_whitespace_as_suffix"),
    ];
    for (trainer, expected) in kinds {
        let error = load_error(&message(2, &trainer));
        assert!(error.contains(expected), "`{error}` says not `{expected}`");
    }
}

#[test]
fn damaged_charsmaps_are_refused() {
    const NO_CHILD: u32 = 1 << 31;
    const LEAF: u32 = 1 << 8;
    let letter = u32::from(b'a');
    let place = 256;
    // The root's children are at 256; only 'a' leads anywhere, to `children`.
    let trie = |children: u32, leaf: u32| {
        let mut units = vec![NO_CHILD; 1024];
        units[0] = place << 10;
        let index = place ^ letter;
        units[index as usize] = (index ^ children) << 10 | leaf | letter;
        units
    };
    let len = 4096;
    let cases = [
        (
            with_charsmap(8000, &trie(512, 0), b""),
            "announces a trie of 8000 bytes where 4096",
        ),
        (
            with_charsmap(0, &trie(512, 0), b""),
            "announces a trie of 0 bytes",
        ),
        (
            with_charsmap(u32::MAX, &trie(512, 0), b""),
            "announces a trie of 4294967295 bytes",
        ),
        (
            with_charsmap(len, &trie(place, 0), b""),
            "has a cycle through unit",
        ),
        (
            with_charsmap(len, &trie(70_000, 0), b""),
            "to 70000 of 1024",
        ),
        (
            with_charsmap(len, &trie(512, LEAF), b"b"),
            "whose replacement starts at 0 of 1",
        ),
        (
            with_charsmap(len, &trie(512, LEAF), b""),
            "whose replacement starts at 0 of 0",
        ),
        (with_charsmap(len, &trie(512, LEAF), b"\xff\0"), "no UTF-8"),
    ];
    for (file, expected) in cases {
        let error = load_error(&file);
        assert!(error.contains(expected), "`{error}` says not `{expected}`");
    }
    assert!(load_error(&with_blob(b"abc")).contains("ends inside its header"));
    assert!(load_error(&with_blob(&vec![0; 5 << 20])).contains("has 5242880 bytes"));
    let sound = SentencePiece::from_bytes(&with_charsmap(len, &trie(512, LEAF), b"b\0")).unwrap();
    assert_eq!(sound.encode("a"), [0]);
}

/// Whatever a flipped, cut, doubled or stretched file contains, it is refused or it works.
#[test]
fn mutated_files_never_panic() {
    let text = "Hello  世界！\n<n><|blank_3|> ▁ ﷺ é １２ \u{0}😀 user_name = 3.14; 你好你好";
    for (name, rounds) in [("v1.model", 300), ("v2.model", 1500)] {
        let whole = bytes(name);
        let mut random = Random(name.len() as u64 + 41);
        let mut loaded = 0;
        for round in 0..rounds {
            let mut file = whole.clone();
            // Every other file has a single byte changed, so that many get past the parser.
            let (mutations, kinds) = if round % 2 == 0 {
                (1, 2)
            } else {
                (1 + random.below(3), 5)
            };
            for _ in 0..mutations {
                let at = random.below(file.len());
                // Structure is dense near the end of the file, where the settings are.
                let at = if random.below(3) == 0 {
                    file.len() - 1 - at.min(150)
                } else {
                    at
                };
                match random.below(kinds) {
                    0 => file[at] ^= 1 << random.below(8),
                    1 => file[at] = random.below(256) as u8,
                    2 => file.truncate(at.max(1)),
                    3 => {
                        let end = (at + random.below(40)).min(file.len());
                        let part = file[at..end].to_vec();
                        file.splice(at..at, part);
                    }
                    _ => {
                        let end = (at + random.below(4)).min(file.len());
                        file.splice(at..end, varint(1 << random.below(64)));
                    }
                }
            }
            let Ok(model) = SentencePiece::from_bytes(&file) else {
                continue;
            };
            loaded += 1;
            let ids = model.encode(text);
            model.decode(&ids).unwrap();
            let proto = model.proto().clone();
            let hosted = Hosted::new(Arc::new(model)).pipeline().unwrap();
            assert_eq!(hosted.encode(text, false).unwrap().get_ids(), ids);
            if let Ok(tokenizer) = GlmTokenizer::chatglm(proto, 0) {
                tokenizer.decode(&tokenizer.encode(text)).unwrap();
            }
        }
        say(&format!("{name}: {rounds} mutations, {loaded} still load"));
        assert!(
            loaded > 10,
            "the mutations test hardly anything but the parser"
        );
    }
}

#[test]
fn folders_are_read_and_their_faults_named() {
    let read = |files: &[(&str, &[u8])]| {
        let folder = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            std::fs::write(folder.path().join(name), contents).unwrap();
        }
        TokenizerFiles::read(folder.path()).map_err(|error| error.to_string())
    };
    let error = |files: &[(&str, &[u8])]| read(files).unwrap_err();
    let model = bytes("v1.model");
    let config = "tokenizer_config.json";
    let given = read(&[
        ("ice_text.model", &model),
        (config, b"{\"num_image_tokens\": 0}"),
    ])
    .unwrap();
    assert_eq!(given.num_image_tokens, Some(0));
    let absent = read(&[("ice_text.model", &model), (config, b"{}")]).unwrap();
    assert_eq!(absent.num_image_tokens, None);
    assert_eq!(
        read(&[("tokenizer.model", &bytes("v2.model"))])
            .unwrap()
            .vocabulary,
        VocabularyFile::SentencePiece(proto("v2.model"))
    );

    assert!(error(&[]).contains("no ice_text.model, tokenizer.model or tokenizer.json"));
    let damaged = error(&[("ice_text.model", &model[..1000])]);
    assert!(damaged.contains("ice_text.model") && damaged.contains("fetch the file again"));
    let huge = vec![0; (16 << 20) + 1];
    assert!(error(&[("ice_text.model", &huge)]).contains("has 16777217 bytes"));
    for (json, expected) in [
        (&b"{\"num_image_tokens\": -1}"[..], "num_image_tokens is -1"),
        (
            b"{\"num_image_tokens\": 4294967296}",
            "num_image_tokens is 4294967296",
        ),
        (
            b"{\"num_image_tokens\": \"0\"}",
            "num_image_tokens is \"0\"",
        ),
        (b"{", "not valid JSON"),
    ] {
        let error = error(&[("ice_text.model", &model), (config, json)]);
        assert!(
            error.contains(config) && error.contains(expected),
            "{error}"
        );
    }
}
