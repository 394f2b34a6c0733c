//! What is wrong in each case.

use std::fs;
use std::io::Write;

use mp_train::checkpoint::safetensors::write_safetensors;
use mp_train::checkpoint::{HostTensor, open_tensor_file, read_all};
use serde_json::json;

use super::world::{ALPACA, ROWS, World, gzip};

/// A wrong input, or a folder that is not as it should be.
pub struct Case {
    pub name: &'static str,
    /// Makes the folder wrong.
    pub prepare: fn(&World),
    /// Arguments; `{train}` are those of a run on token ids that is right, `{text}` on text.
    pub command: &'static str,
    /// Largest file in blocks of 512 bytes: a disk that is full.
    pub file_blocks: Option<u32>,
    /// What and where, and what to do.
    pub says: &'static [&'static str],
}

const fn case(
    name: &'static str,
    prepare: fn(&World),
    command: &'static str,
    says: &'static [&'static str],
) -> Case {
    Case {
        name,
        prepare,
        command,
        file_blocks: None,
        says,
    }
}

const fn with_little_room(case: Case, blocks: u32) -> Case {
    Case {
        file_blocks: Some(blocks),
        ..case
    }
}

fn nothing(_: &World) {}

/// A finished run of two steps in `output`.
fn trained(world: &World) {
    let run = "--model model --train rows.jsonl --output output --max-steps 2 --threads 1 --quiet";
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_mp-train"));
    command
        .args(run.split_whitespace())
        .current_dir(world.path());
    assert!(command.status().unwrap().success());
}

/// Changes one tensor of `model`.
fn with_tensor(world: &World, name: &str, tensor: HostTensor) {
    let path = world.path().join("model/model.safetensors");
    let mut tensors = read_all(open_tensor_file(&path).unwrap().as_ref()).unwrap();
    tensors.insert(name.to_owned(), tensor);
    write_safetensors(&path, &tensors).unwrap();
}

fn cut(world: &World, name: &str, length: usize) {
    let bytes = world.read(name);
    world.write(name, &bytes[..length]);
}

pub const CASES: &[Case] = &[
    // The command line and the configuration.
    case(
        "wrong flag",
        nothing,
        "{train} --learning-rat 1e-4",
        &["--learning-rat", "--learning-rate"],
    ),
    case("wrong command", nothing, "tran", &["tran", "train"]),
    case(
        "nothing to train",
        nothing,
        "train",
        &["--model", "ice_text.model"],
    ),
    case(
        "no training rows",
        nothing,
        "--model model {run}",
        &["--train"],
    ),
    case(
        "no length",
        nothing,
        "--model model --train rows.jsonl --output output",
        &["max_steps", "epochs"],
    ),
    case(
        "unknown config key",
        |world| world.write("run.toml", "[optimizer]\nlearning_rat = 1e-4\n"),
        "{train} --config run.toml",
        &["run.toml", "learning_rat", "`learning_rate`"],
    ),
    case(
        "unknown config section",
        |world| world.write("run.toml", "[optimiser]\nlearning_rate = 1e-4\n"),
        "{train} --config run.toml",
        &["run.toml", "optimiser", "optimizer"],
    ),
    case(
        "config value of the wrong type",
        |world| world.write("run.toml", "[run]\nmax_steps = \"many\"\n"),
        "{train} --config run.toml",
        &["run.toml", "max_steps"],
    ),
    case(
        "missing config",
        nothing,
        "{train} --config nowhere.toml",
        &["nowhere.toml", "current directory"],
    ),
    case(
        "learning rate NaN",
        nothing,
        "{train} --learning-rate nan",
        &["learning-rate", "nan"],
    ),
    case(
        "max_steps and epochs",
        nothing,
        "{train} --epochs 3",
        &["max_steps", "epochs"],
    ),
    case(
        "validation twice",
        nothing,
        "{train} --validation rows.jsonl --validation-split 0.5",
        &["validation", "validation_split"],
    ),
    case(
        "validation of everything",
        nothing,
        "{train} --validation-split 0.9",
        &["validation_split", "2 rows"],
    ),
    case(
        "negative dropout",
        nothing,
        "{train} --lora-dropout -0.1",
        &["lora-dropout", "-0.1"],
    ),
    case(
        "unknown target module",
        nothing,
        "{train} --target-modules q_proj",
        &["q_proj", "query_key_value"],
    ),
    case(
        "key of another adapter",
        nothing,
        "{train} --kind prefix --r 4",
        &["prefix"],
    ),
    case(
        "unknown template",
        nothing,
        "{text} --template vicuna",
        &["vicuna", "alpaca"],
    ),
    case(
        "balance that is not the model",
        nothing,
        "{train} --devices cpu,cpu --balance 1,2",
        &["4"],
    ),
    case(
        "balance for other devices",
        nothing,
        "{train} --devices cpu,cpu --balance 4",
        &["2"],
    ),
    case(
        "more stages than blocks",
        nothing,
        "{train} --devices cpu,cpu,cpu,cpu,cpu",
        &["5", "4"],
    ),
    // The model.
    case(
        "missing model",
        nothing,
        "--model nowhere --train rows.jsonl {run}",
        &["nowhere"],
    ),
    case(
        "model folder without weights",
        |world| fs::remove_file(world.path().join("model/model.safetensors")).unwrap(),
        "{train}",
        &["model", "safetensors"],
    ),
    case(
        "truncated safetensors",
        |world| cut(world, "model/model.safetensors", 500_000),
        "{train}",
        &["model.safetensors"],
    ),
    case(
        "safetensors header cut off",
        |world| cut(world, "model/model.safetensors", 100),
        "{train}",
        &["model.safetensors"],
    ),
    case(
        "oversized safetensors header",
        |world| {
            let mut bytes = world.read("model/model.safetensors");
            bytes[..8].copy_from_slice(&(1_u64 << 60).to_le_bytes());
            world.write("model/model.safetensors", bytes);
        },
        "{train}",
        &["model.safetensors"],
    ),
    case(
        "git-lfs pointer as weights",
        |world| {
            let pointer = "version https://git-lfs.github.com/spec/v1\n\
                           oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n\
                           size 908864\n";
            world.write("model/model.safetensors", pointer);
        },
        "{train}",
        &["model.safetensors", "git lfs"],
    ),
    case(
        "shape mismatch",
        |world| {
            let wrong = HostTensor::from_f32([65], &[0.0; 65]).unwrap();
            with_tensor(world, "transformer.final_layernorm.bias", wrong);
        },
        "{train}",
        &["transformer.final_layernorm.bias", "[65]", "[64]"],
    ),
    case(
        "config.json of another generation than the weights",
        |world| {
            let config = json!({
                "architectures": ["ChatGLMModel"], "model_type": "chatglm",
                "auto_map": { "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration" },
                "ffn_hidden_size": 13696, "hidden_size": 4096, "kv_channels": 128,
                "layernorm_epsilon": 1e-5, "multi_query_attention": true,
                "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28,
                "padded_vocab_size": 65024, "rmsnorm": true, "seq_length": 32768,
                "tie_word_embeddings": false, "eos_token_id": 2, "pad_token_id": 0
            });
            world.write("model/config.json", config.to_string());
        },
        "{train}",
        &["transformer.embedding.word_embeddings.weight", "missing"],
    ),
    case(
        "config.json that is no JSON",
        |world| cut(world, "model/config.json", 300),
        "{train}",
        &["config.json"],
    ),
    case(
        "config.json without gMASK",
        |world| {
            world.change_json("model/config.json", |config| {
                config.as_object_mut().unwrap().remove("gmask_token_id");
            });
        },
        "{train}",
        &["config.json", "gmask_token_id"],
    ),
    case(
        "config.json without sop",
        |world| {
            world.change_json("model/config.json", |config| {
                config.as_object_mut().unwrap().remove("bos_token_id");
            });
        },
        "{train}",
        &["config.json", "bos_token_id"],
    ),
    // The tokenizer.
    case(
        "tokenizer of the other era",
        |world| world.stored("tokenizer/v2.model", "text_model/ice_text.model"),
        "{text}",
        &["ice_text.model"],
    ),
    case(
        "tokenizer of another vocabulary",
        |world| world.stored("tokenizer/v1.model", "text_model/ice_text.model"),
        "{text}",
        &["ice_text.model"],
    ),
    case(
        "tokenizer cut off",
        |world| cut(world, "text_model/ice_text.model", 1_000),
        "{text}",
        &["ice_text.model"],
    ),
    case(
        "text rows without a tokenizer",
        nothing,
        "--model model --train alpaca.jsonl {run}",
        &["alpaca.jsonl", "ice_text.model"],
    ),
    // The data.
    case(
        "missing data",
        nothing,
        "--model model --train nowhere.jsonl {run}",
        &["nowhere.jsonl"],
    ),
    case(
        "pattern without files",
        nothing,
        "--model model --train nowhere/*.jsonl {run}",
        &["nowhere/*.jsonl"],
    ),
    case(
        "empty data",
        |world| world.write("rows.jsonl", ""),
        "{train}",
        &["rows.jsonl"],
    ),
    case(
        "empty text data",
        |world| world.write("alpaca.json", "[]"),
        "--model text_model --train alpaca.json --max-source-length 64 --max-target-length 64 {run}",
        &["alpaca.json", "no rows"],
    ),
    case(
        "broken JSONL of token ids",
        |world| world.write("rows.jsonl", format!("{ROWS}{{\"input_ids\": [1, 2\n")),
        "{train}",
        &["rows.jsonl:3"],
    ),
    case(
        "broken JSONL of text",
        |world| {
            world.write(
                "alpaca.jsonl",
                format!("{ALPACA}{{\"instruction\": \"a\", \"output\": }}\n"),
            )
        },
        "{text}",
        &["alpaca.jsonl:3"],
    ),
    case(
        "broken JSON array",
        |world| {
            let text =
                "[\n{\"instruction\": \"a\", \"output\": \"b\"},\n{\"instruction\" \"a\"}\n]\n";
            world.write("alpaca.json", text);
        },
        "--model text_model --train alpaca.json --max-source-length 64 --max-target-length 64 {run}",
        &["alpaca.json:3"],
    ),
    case(
        "JSON array cut off",
        |world| {
            world.write(
                "alpaca.json",
                "[\n{\"instruction\": \"a\", \"output\": \"b\"},\n{\"instruct",
            )
        },
        "--model text_model --train alpaca.json --max-source-length 64 --max-target-length 64 {run}",
        &["alpaca.json:3", "complete"],
    ),
    case(
        "wrong column",
        |world| world.write("alpaca.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n"),
        "{text}",
        &["alpaca.jsonl:1", "instruction", "question", "answer"],
    ),
    case(
        "wrong column of a table",
        |world| world.write("table.csv", "question,answer\na,b\n"),
        "--model text_model --train table.csv --max-source-length 64 --max-target-length 64 {run}",
        &["table.csv", "instruction", "question", "answer"],
    ),
    case(
        "text that is not UTF-8",
        |world| {
            world.write(
                "alpaca.jsonl",
                b"{\"instruction\": \"caf\xe9\", \"output\": \"b\"}\n",
            )
        },
        "{text}",
        &["alpaca.jsonl:1", "UTF-8"],
    ),
    case(
        "token ids that are not UTF-8",
        |world| {
            let mut rows = ROWS.as_bytes().to_vec();
            rows.extend(b"{\"input_ids\": [5\xff]}\n");
            world.write("rows.jsonl", rows);
        },
        "{train}",
        &["rows.jsonl:3", "UTF-8"],
    ),
    case(
        "truncated gz",
        |world| {
            let packed = gzip(&ALPACA.repeat(200));
            world.write("alpaca.jsonl.gz", &packed[..packed.len() / 2]);
        },
        "--model text_model --train alpaca.jsonl.gz --max-source-length 64 --max-target-length 64 {run}",
        &["alpaca.jsonl.gz", "gzip", "fetch"],
    ),
    case(
        "id beyond the vocabulary",
        |world| {
            let row = "{\"input_ids\": [200, 191, 194, 5], \"labels\": [-100, -100, -100, 5]}\n";
            world.write("rows.jsonl", format!("{ROWS}{row}"));
        },
        "{train}",
        &["rows.jsonl:3", "200", "vocab_size"],
    ),
    case(
        "row without sop",
        |world| {
            let row = "{\"input_ids\": [5, 191, 5], \"labels\": [-100, -100, 5]}\n";
            world.write("rows.jsonl", format!("{ROWS}{row}"));
        },
        "{train}",
        &["rows.jsonl:3", "sop", "194"],
    ),
    case(
        "row without gMASK",
        |world| {
            let row = "{\"input_ids\": [5, 194, 5], \"labels\": [-100, -100, 5]}\n";
            world.write("rows.jsonl", format!("{ROWS}{row}"));
        },
        "{train}",
        &["rows.jsonl:3", "gMASK", "191"],
    ),
    case(
        "zero target tokens",
        |world| {
            let row = "{\"input_ids\": [5, 191, 194, 5], \"labels\": [-100, -100, -100, -100]}\n";
            world.write("rows.jsonl", format!("{ROWS}{row}"));
        },
        "{train}",
        &["rows.jsonl:3", "-100"],
    ),
    case(
        "row longer than the model's sequence",
        |world| {
            let ids = [vec![5; 2047], vec![191, 194, 7]].concat();
            let labels = [vec![-100; 2049], vec![7]].concat();
            let row = json!({ "input_ids": ids, "labels": labels });
            world.write("rows.jsonl", format!("{ROWS}{row}\n"));
        },
        "{train}",
        &["rows.jsonl:3", "2050", "2048", "max_sequence_length"],
    ),
    // The output.
    case(
        "output below a file",
        |world| world.write("file", ""),
        "--model model --train rows.jsonl --output file/below --max-steps 2 --threads 1",
        &["cannot write", "file"],
    ),
    with_little_room(
        case(
            "full disk at the first checkpoint",
            nothing,
            "{train}",
            &["cannot write", ".partial", "another disk"],
        ),
        40,
    ),
    with_little_room(
        case(
            "full disk at the token cache",
            |world| world.write("alpaca.jsonl", ALPACA.repeat(2_000)),
            "{text}",
            &["cache", "room"],
        ),
        40,
    ),
    case(
        "full device for the answers",
        |world| world.write("prompts.jsonl", "{\"input_ids\": [5, 191, 194]}\n"),
        "generate --model model --input prompts.jsonl --output /dev/full --max-new-tokens 2 --threads 1",
        &["free space"],
    ),
    case(
        "resume with nothing there",
        nothing,
        "{train} --resume",
        &["output", "without --resume"],
    ),
    case(
        "resume from nowhere",
        nothing,
        "{train} --resume nowhere",
        &["nowhere"],
    ),
    case(
        "resume of an incompatible run",
        trained,
        "{train} --resume --r 4",
        &["checkpoint-2", "adapter"],
    ),
    case(
        "resume with other rows",
        |world| {
            trained(world);
            let mut file = fs::File::options()
                .append(true)
                .open(world.path().join("rows.jsonl"))
                .unwrap();
            file.write_all(ROWS.as_bytes()).unwrap();
        },
        "{train} --resume",
        &["checkpoint-2", "data.train"],
    ),
    // Questions.
    case(
        "prompt row without a question",
        |world| {
            world.write(
                "prompts.jsonl",
                "{\"prompt\": \"hello\"}\n{\"text\": \"hello\"}\n",
            )
        },
        "generate --model text_model --input prompts.jsonl",
        &["prompts.jsonl:2", "instruction", "prompt", "text"],
    ),
    case(
        "text prompts without a tokenizer",
        |world| world.write("prompts.jsonl", "{\"prompt\": \"hello\"}\n"),
        "generate --model model --input prompts.jsonl",
        &["ice_text.model"],
    ),
    case(
        "adapter that does not fit",
        |world| {
            world.stored("golden/chatglm-6b/adapter_lora_qkv", "adapter");
            world.write("prompts.jsonl", "{\"prompt\": \"hello\"}\n");
        },
        "generate --model text_model --adapter adapter --input prompts.jsonl",
        &["adapter", "64", "128"],
    ),
    case(
        "adapter folder without an adapter",
        |world| {
            fs::create_dir(world.path().join("adapter")).unwrap();
            world.write("prompts.jsonl", "{\"prompt\": \"hello\"}\n");
        },
        "generate --model text_model --adapter adapter --input prompts.jsonl",
        &["adapter"],
    ),
    case(
        "missing prompts",
        nothing,
        "generate --model model --input nowhere.jsonl",
        &["nowhere.jsonl"],
    ),
    case(
        "negative temperature",
        nothing,
        "generate --model model --temperature -1",
        &["--temperature", "-1"],
    ),
    case(
        "demo in somebody's folder",
        nothing,
        "demo --output .",
        &["."],
    ),
];
