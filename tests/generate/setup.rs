//! The golden model with a small tokenizer of its own, and the program run on it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mp_train::checkpoint::safetensors::write_safetensors;
use mp_train::checkpoint::{HostTensor, open_tensor_file, read_all};
use mp_train::config::model::ModelConfig;
use mp_train::data::sentencepiece::{ModelProto, ModelType, Piece, PieceKind};
use mp_train::data::tokenizer::{ConfigIds, GlmTokenizer, TokenizerFiles};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const GREEDY: [&str; 2] = ["--temperature", "0"];

/// A file of the golden data.
pub fn golden(rest: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/chatglm-6b")
        .join(rest)
}

/// A folder with a model that has a tokenizer.
pub struct Setup {
    pub folder: TempDir,
    pub model: PathBuf,
}

impl Setup {
    /// The golden model with a tokenizer of all its 200 ids.
    pub fn new() -> Self {
        Self::with(200, |_| {})
    }

    /// The golden model, its config changed, with a tokenizer of `ids` ids.
    pub fn with(ids: usize, change: impl FnOnce(&mut Value)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        let text = fs::read(golden("model/config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        change(&mut config);
        fs::write(model.join("config.json"), config.to_string()).unwrap();
        let weights = "model.safetensors";
        fs::copy(golden("model").join(weights), model.join(weights)).unwrap();
        fs::write(model.join("ice_text.model"), vocabulary(ids).to_bytes()).unwrap();
        let tokenizer_config = json!({ "num_image_tokens": 0 }).to_string();
        fs::write(model.join("tokenizer_config.json"), tokenizer_config).unwrap();
        Self { folder, model }
    }

    /// Rewrites the model's tensors.
    pub fn change_tensors(&self, change: impl FnOnce(&mut BTreeMap<String, HostTensor>)) {
        let path = self.model.join("model.safetensors");
        let source = open_tensor_file(&path).unwrap();
        let mut tensors = read_all(source.as_ref()).unwrap();
        drop(source);
        change(&mut tensors);
        write_safetensors(&path, &tensors).unwrap();
    }

    /// Puts a number that is none into the head.
    pub fn spoil_the_head(&self) {
        self.change_tensors(|tensors| {
            let head = tensors.get_mut("lm_head.weight").unwrap();
            head.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        });
    }

    pub fn tokenizer(&self) -> GlmTokenizer {
        let config = ModelConfig::from_json_file(&self.model.join("config.json")).unwrap();
        let files = TokenizerFiles::read(&self.model).unwrap();
        let (tokenizer, warnings) = files.build(&ConfigIds::from(&config), None).unwrap();
        assert_eq!(warnings, []);
        tokenizer
    }

    /// The ids of a prompt as the model sees it.
    pub fn prompt_ids(&self, text: &str) -> Vec<u32> {
        let tokenizer = self.tokenizer();
        tokenizer.build_inputs(&tokenizer.encode(text), None)
    }

    /// A copy of a golden adapter, to put a template beside it.
    pub fn adapter(&self, name: &str, template: Option<&str>) -> PathBuf {
        let copy = self
            .folder
            .path()
            .join(format!("{name}-{}", template.map_or(0, str::len)));
        if !copy.exists() {
            fs::create_dir(&copy).unwrap();
            for entry in fs::read_dir(golden(name)).unwrap() {
                let path = entry.unwrap().path();
                fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
            }
        }
        if let Some(template) = template {
            fs::write(copy.join("template.toml"), template).unwrap();
        }
        copy
    }

    /// A file of rows.
    pub fn rows(&self, name: &str, rows: &[Value]) -> PathBuf {
        let lines: Vec<String> = rows.iter().map(|row| format!("{row}\n")).collect();
        let path = self.folder.path().join(name);
        fs::write(&path, lines.concat()).unwrap();
        path
    }

    /// Runs `mp-train generate` on rows.
    pub fn generate(&self, rows: &[Value], flags: &[&str]) -> Ended {
        let input = self.rows("rows.jsonl", rows);
        let mut command = self.command("generate");
        command.arg("--input").arg(input).args(flags);
        run(&mut command, None)
    }

    /// The answers of `mp-train generate` to rows.
    pub fn answers(&self, rows: &[Value], flags: &[&str]) -> Vec<Value> {
        let ended = self.generate(rows, flags);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        parse(&ended.stdout)
    }

    /// Runs `mp-train chat` on lines from standard input.
    pub fn chat(&self, lines: &str, flags: &[&str]) -> Ended {
        let path = self.folder.path().join("lines.txt");
        fs::write(&path, lines).unwrap();
        let mut command = self.command("chat");
        command.args(flags);
        run(&mut command, Some(&path))
    }

    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mp-train"));
        command
            .arg(name)
            .arg("--model")
            .arg(&self.model)
            .args(["--threads", "2"]);
        command
    }
}

/// How the program ended.
#[derive(Debug, PartialEq)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    #[track_caller]
    pub fn is_refused(&self, words: &[&str]) {
        assert_eq!(self.code, Some(2), "{}", self.stderr);
        assert!(
            self.stderr.lines().any(|line| line.starts_with("error: ")),
            "{}",
            self.stderr
        );
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {}", self.stderr);
        }
    }
}

fn run(command: &mut Command, stdin: Option<&Path>) -> Ended {
    let stdin = File::open(stdin.unwrap_or(Path::new("/dev/null"))).unwrap();
    ended(command.stdin(stdin).output().unwrap())
}

pub fn ended(output: Output) -> Ended {
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub fn parse(jsonl: &str) -> Vec<Value> {
    jsonl
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

pub fn ids(answer: &Value) -> Vec<u32> {
    serde_json::from_value(answer["new_tokens"].clone()).unwrap()
}

pub fn text(answer: &Value) -> &str {
    answer["answer"].as_str().unwrap()
}

/// A golden case's prompts without their padding, and the tokens that follow.
pub fn golden_answers(kind: &str) -> Vec<(Vec<i64>, Vec<u32>)> {
    let source = open_tensor_file(&golden("cases/generate_greedy.safetensors")).unwrap();
    let tensors = read_all(source.as_ref()).unwrap();
    let rows = |name: &str| {
        let tensor = &tensors[name];
        let values = tensor.to_i64().unwrap();
        values
            .chunks(tensor.shape[1])
            .map(<[i64]>::to_vec)
            .collect::<Vec<_>>()
    };
    let real = rows("non_pad");
    let prompts = rows("input_ids").into_iter().zip(real).map(|(ids, real)| {
        let kept = ids.into_iter().zip(real).filter(|&(_, real)| real == 1);
        kept.map(|(id, _)| id).collect()
    });
    let answers = rows(&format!("{kind}.new_tokens"));
    let answers = answers
        .into_iter()
        .map(|ids| ids.into_iter().map(|id| id as u32).collect());
    prompts.zip(answers).collect()
}

/// A vocabulary whose specials stand where the golden config says: pieces of one character, and
/// behind `<eop>` at 195 what ChatGLM-6B has there.
fn vocabulary(ids: usize) -> ModelProto {
    let first = [
        ("<unk>", PieceKind::Unknown),
        ("<s>", PieceKind::Control),
        ("</s>", PieceKind::Control),
        ("<pad>", PieceKind::Control),
        ("<n>", PieceKind::UserDefined),
        ("\u{2581}", PieceKind::Normal),
    ];
    let specials = [
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<unused_0>",
        "<sop>",
        "<eop>",
    ];
    let piece = |text: String, kind, score| Piece { text, score, kind };
    let mut pieces: Vec<Piece> = first
        .into_iter()
        .map(|(text, kind)| piece(text.to_owned(), kind, 0.0))
        .collect();
    let ascii = ('!'..='~').chain("问答：，。".chars());
    let chinese = ('\u{4e00}'..).filter(|c| !"问答".contains(*c));
    let characters = ascii.chain(chinese).take(190 - pieces.len());
    pieces.extend(characters.map(|c| piece(c.to_string(), PieceKind::Normal, -5.0)));
    let control = |text: &str| piece(text.to_owned(), PieceKind::Control, 0.0);
    pieces.extend(specials.map(control));
    pieces.extend((pieces.len()..ids).map(|id| control(&format!("<spare_{id}>"))));
    ModelProto::new(ModelType::Unigram, false, pieces)
}
