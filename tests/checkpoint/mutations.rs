//! Small valid files, changed at random places from a fixed seed: reading ends in values or in an error,
//! and what is read twice is the same. The fuzz targets under tests/fuzz do the same for as long as they
//! are let; this is what every test run does.

use std::fs;
use std::path::{Path, PathBuf};

use mp_train::checkpoint::{
    CheckpointError, LoraFiles, PrefixFiles, TensorSource, open_tensor_file, read_all,
};
use mp_train::config::model::ModelConfig;
use mp_train::data::byte_level::{ByteLevel, Tokens, is_ranks};
use mp_train::data::sentencepiece::{ModelProto, PieceKind, SentencePiece};
use tempfile::tempdir;

use crate::hostile_corpus::{self, Content};
use crate::torch_bytes::{self, Pickled};
use crate::{Random, golden_path};

/// Numbers at which sizes and offsets break.
const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// One to four changes: bytes, bits and numbers overwritten, stretches cut out, doubled and moved.
fn mutated(original: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            return bytes;
        }
        // Half of the changes where the headers are.
        let reach = match random.below(2) {
            0 => bytes.len(),
            _ => bytes.len().min(600),
        };
        let at = random.below(reach);
        let len = (1 + random.below(16)).min(bytes.len() - at);
        let stretch = bytes[at..at + len].to_vec();
        match random.below(7) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.below(256) as u8,
            2 => {
                let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
                let len = len.min(number.len());
                bytes[at..at + len].copy_from_slice(&number[..len]);
            }
            3 => drop(bytes.drain(at..at + len)),
            4 => drop(bytes.splice(at..at, stretch)),
            5 => {
                let to = random.below(bytes.len() - len + 1);
                bytes.copy_within(at..at + len, to);
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// Gives `read` so many mutations of a file. How many were refused must not be none.
fn mutate(original: &[u8], count: usize, read: impl Fn(&[u8]) -> Result<(), String>) {
    assert_eq!(read(original), Ok(()), "unchanged, it is read");
    let mut random = Random(2024);
    let mut refused = 0;
    for _ in 0..count {
        let bytes = mutated(original, &mut random);
        if let Err(text) = read(&bytes) {
            refused += 1;
            assert!(text.len() < 1000, "a message of {} bytes", text.len());
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
    }
    assert!(
        refused > count / 20,
        "only {refused} of {count} were refused"
    );
}

/// A tensor taken in pieces out of its file is the tensor that is read as a whole, or neither is to be
/// had.
fn opening_is_reading(file: &dyn TensorSource) {
    for name in file.names() {
        match (file.read(&name), file.open(&name)) {
            (Ok(read), Ok(open)) => {
                assert_eq!((read.dtype, &read.shape[..]), (open.dtype(), open.shape()));
                if let Ok(values) = read.to_f32() {
                    let mut pieces = vec![0.0; values.len()];
                    open.read_f32(0, &mut pieces).unwrap();
                    let bits = |values: &[f32]| -> Vec<u32> {
                        values.iter().map(|value| value.to_bits()).collect()
                    };
                    assert_eq!(bits(&values), bits(&pieces), "{name}");
                }
            }
            (Err(_), Err(_)) => {}
            (read, open) => panic!("{name}: read {:?}, open {:?}", read.err(), open.err()),
        }
    }
}

/// The error of reading a file, which must name it.
fn tensors(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).unwrap();
    let read = || -> Result<(), CheckpointError> {
        let file = open_tensor_file(path)?;
        opening_is_reading(file.as_ref());
        read_all(file.as_ref()).map(drop)
    };
    read().map_err(|error| {
        let text = error.to_string();
        assert!(text.contains(path.to_str().unwrap()), "{text}");
        text
    })
}

#[test]
fn files_of_tensors() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let adapter = fs::read(golden_path("adapter_lora_qkv/adapter_model.safetensors")).unwrap();
    mutate(&adapter, 1500, |bytes| tensors(&at("a.safetensors"), bytes));
    let small = small_torch();
    mutate(&torch_bytes::zip(&small), 2500, |bytes| {
        tensors(&at("zip.bin"), bytes)
    });
    mutate(&torch_bytes::legacy(&small), 2500, |bytes| {
        tensors(&at("stream.bin"), bytes)
    });
    let real = fs::read(golden_path("ptuning_checkpoint/pytorch_model.bin")).unwrap();
    mutate(&real, 1000, |bytes| tensors(&at("real.bin"), bytes));
    // The pickle alone, in an archive that is right.
    mutate(&small.pickle, 4000, |pickle| {
        let (pickle, storage) = (pickle.to_vec(), small.storage.clone());
        let file = torch_bytes::zip(&Pickled { pickle, storage });
        tensors(&at("pickle.bin"), &file)
    });
}

fn small_torch() -> Pickled {
    let values: Vec<f32> = (0..24).map(|i| i as f32 - 7.5).collect();
    Pickled::tensor("transformer.w", &values, &[4, 6], &[6, 1])
}

#[test]
fn adapter_and_prefix_folders() {
    let folder = tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(
            golden_path("adapter_lora_qkv").join(name),
            folder.path().join(name),
        )
        .unwrap();
    }
    let config = folder.path().join("adapter_config.json");
    let json = fs::read(&config).unwrap();
    mutate(&json, 2000, |bytes| {
        fs::write(&config, bytes).unwrap();
        let read = LoraFiles::read(folder.path()).map(drop);
        read.map_err(|error| error.to_string())
    });

    let folder = tempdir().unwrap();
    let files = PrefixFiles::read(&golden_path("ptuning_checkpoint")).unwrap();
    files.write(folder.path(), serde_json::Map::new()).unwrap();
    let path = folder.path().join("prefix.safetensors");
    let bytes = fs::read(&path).unwrap();
    mutate(&bytes, 1000, |bytes| {
        fs::write(&path, bytes).unwrap();
        let read = PrefixFiles::read(folder.path()).map(drop);
        read.map_err(|error| error.to_string())
    });
}

#[test]
fn model_configurations() {
    let json = fs::read(golden_path("model/config.json")).unwrap();
    mutate(&json, 4000, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let read = ModelConfig::from_json(&text).map(drop);
        // The message names what was found, which is shown as JSON.
        read.map_err(|text| {
            text.replace(char::is_control, "")
                .chars()
                .take(900)
                .collect()
        })
    });
}

fn encode_and_decode(bytes: &[u8]) -> Result<(), String> {
    let read = || {
        let model = SentencePiece::from_bytes(bytes)?;
        for text in ["", "hello  world\n你好，世界 ﷺ", "a\u{0}\u{2581}<n>1234"] {
            model.decode(&model.encode(text))?;
        }
        Ok(())
    };
    read().map_err(|error: mp_train::data::sentencepiece::SentencePieceError| error.to_string())
}

/// The first pieces of a model and those of bytes, so that most of its bytes matter.
fn small_vocabulary(name: &str, pieces: usize) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer");
    let mut proto = ModelProto::parse(&fs::read(path.join(name)).unwrap()).unwrap();
    let mut place = 0;
    proto.pieces.retain(|piece| {
        place += 1;
        place <= pieces || piece.kind == PieceKind::Byte
    });
    proto.to_bytes()
}

#[test]
fn sentencepiece_models() {
    mutate(&small_vocabulary("v2.model", 300), 3000, encode_and_decode);
    mutate(&small_vocabulary("v1.model", 40), 150, encode_and_decode);
}

fn vocabulary_of_bytes(bytes: &[u8]) -> Result<(), String> {
    let tokens = match is_ranks(bytes) {
        true => Tokens::from_ranks(bytes),
        false => Tokens::from_tokenizer_json(bytes),
    };
    let model = tokens.and_then(ByteLevel::new);
    let model = model.map_err(|error| error.to_string())?;
    for text in ["", "hello  world\n你好，世界 ﷺ", "it's 12345\r\n"] {
        assert_eq!(model.decode(&model.encode(text)), text.as_bytes());
    }
    Ok(())
}

fn glm4(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer/glm4");
    fs::read(folder.join(name)).unwrap()
}

#[test]
fn vocabularies_of_bytes() {
    for name in ["tokenizer.model", "tokenizer.json"] {
        mutate(&glm4(name), 400, vocabulary_of_bytes);
    }
}

/// The seeds of tests/fuzz: the small files of this page, and the hostile ones.
#[test]
#[ignore = "writes the seeds of the fuzz targets into the folder that FUZZ_CORPUS names"]
fn seeds_for_fuzzing() {
    let corpus = PathBuf::from(std::env::var_os("FUZZ_CORPUS").expect("FUZZ_CORPUS is not set"));
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let folder = corpus.join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name.replace([' ', '.', '\''], "-")), bytes).unwrap();
    };
    let golden = |path: &str| fs::read(golden_path(path)).unwrap();
    let adapter = golden("adapter_lora_qkv/adapter_model.safetensors");
    put("safetensors", "adapter", &adapter);
    put(
        "torch_bin",
        "prefix",
        &golden("ptuning_checkpoint/pytorch_model.bin"),
    );
    put("torch_bin", "zip", &torch_bytes::zip(&small_torch()));
    put("torch_bin", "stream", &torch_bytes::legacy(&small_torch()));
    put("torch_pickle", "small", &small_torch().pickle);
    let mut folder = golden("adapter_lora_qkv/adapter_config.json");
    folder.push(0);
    folder.extend(&adapter);
    put("adapter_folder", "lora", &folder);
    let mut folder = golden("ptuning_checkpoint/config.json");
    folder.push(0);
    let prefix = tempdir().unwrap();
    let files = PrefixFiles::read(&golden_path("ptuning_checkpoint")).unwrap();
    files.write(prefix.path(), serde_json::Map::new()).unwrap();
    folder.extend(fs::read(prefix.path().join("prefix.safetensors")).unwrap());
    put("adapter_folder", "prefix", &folder);
    put("sentencepiece", "v2", &small_vocabulary("v2.model", 300));
    put("sentencepiece", "v1", &small_vocabulary("v1.model", 40));
    put("byte_level", "ranks", &glm4("tokenizer.model"));
    put("byte_level", "json", &glm4("tokenizer.json"));
    put("model_config", "golden", &golden("model/config.json"));
    for case in hostile_corpus::all() {
        for (file, content) in &case.files {
            let target = match *file {
                "model.safetensors" => "safetensors",
                "pytorch_model.bin" => "torch_bin",
                "tokenizer.model" => "sentencepiece",
                "config.json" => "model_config",
                _ => continue,
            };
            if let Content::Bytes(bytes) = content
                && bytes.len() < 1 << 16
            {
                put(target, case.name, bytes);
            }
        }
    }
}
