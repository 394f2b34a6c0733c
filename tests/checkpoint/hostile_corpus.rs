//! Files that are broken or made to do harm, with what must be said of each.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::torch_bytes::{self, Entry, Pickled};

/// What stands under a name of a folder.
pub enum Content {
    Bytes(Vec<u8>),
    /// A file of this size with something at its start and its end and nothing between.
    Sparse(u64, Vec<u8>, Vec<u8>),
    Link(&'static str),
    Pipe,
    Folder,
}

/// A folder and a part of the message that refuses it.
pub struct Hostile {
    pub name: &'static str,
    pub files: Vec<(&'static str, Content)>,
    pub says: &'static str,
}

impl Hostile {
    /// Makes the folder; `outside` beside it has a file of somebody else.
    pub fn make(&self, folder: &Path) {
        for (name, content) in &self.files {
            let path = folder.join(name);
            match content {
                Content::Bytes(bytes) => fs::write(&path, bytes).unwrap(),
                Content::Sparse(size, lead, tail) => {
                    let file = File::create(&path).unwrap();
                    file.set_len(*size).unwrap();
                    file.write_all_at(lead, 0).unwrap();
                    file.write_all_at(tail, size - tail.len() as u64).unwrap();
                }
                Content::Link(target) => symlink(target, &path).unwrap(),
                Content::Pipe => mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap(),
                Content::Folder => fs::create_dir(&path).unwrap(),
            }
        }
    }
}

const SAFE: &str = "model.safetensors";
const TORCH: &str = "pytorch_model.bin";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.model";
const TOKENIZER_JSON: &str = "tokenizer.json";
const POINTER: &[u8] =
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n";

fn of(name: &'static str, file: &'static str, bytes: Vec<u8>, says: &'static str) -> Hostile {
    with(name, file, Content::Bytes(bytes), says)
}

fn with(name: &'static str, file: &'static str, content: Content, says: &'static str) -> Hostile {
    Hostile {
        name,
        files: vec![(file, content)],
        says,
    }
}

/// A safetensors file of this header.
pub fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(vec![0; data]);
    file
}

fn entry(name: &str, dtype: &str, shape: &str, from: u64, to: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
}

fn header(entries: &[String], data: usize) -> Vec<u8> {
    safetensors(&format!("{{{}}}", entries.join(",")), data)
}

fn good() -> Vec<u8> {
    header(&[entry("w", "F32", "[2]", 0, 8)], 8)
}

fn safetensors_files() -> Vec<Hostile> {
    let huge = u64::MAX / 8;
    let past = |place: u64| {
        entry(
            &format!("w{place}"),
            "U8",
            &format!("[{huge}]"),
            place * huge,
            (place + 1) * huge,
        )
    };
    let ones = format!("[{}1]", "1,".repeat(3 << 20));
    let many: Vec<String> = (0..90_000)
        .map(|i| entry(&format!("w{i:05}"), "U8", "[1]", i, i + 1))
        .collect();
    vec![
        of("empty safetensors", SAFE, Vec::new(), "0 bytes are too few"),
        of(
            "header length beyond the file",
            SAFE,
            vec![0xff; 64],
            "header claims 18446744073709551615",
        ),
        of(
            "header cut short",
            SAFE,
            good()[..40].to_vec(),
            "header claims",
        ),
        with(
            "header of gigabytes",
            SAFE,
            Content::Sparse(6 << 30, (5_u64 << 30).to_le_bytes().to_vec(), Vec::new()),
            "too large",
        ),
        of(
            "header nested deeply",
            SAFE,
            safetensors(&format!("{{\"w\":{}", "[".repeat(1 << 20)), 0),
            "not valid",
        ),
        of(
            "shape of a million extents",
            SAFE,
            header(&[entry("w", "U8", &ones, 0, 1)], 1),
            "dimensions",
        ),
        of(
            "many tensors in too few bytes",
            SAFE,
            header(&many, 5),
            "describes 90000 bytes of tensors, the file has 5",
        ),
        of(
            "sizes that add up past all numbers",
            SAFE,
            header(&(0..8).map(past).collect::<Vec<_>>(), 8),
            "the file has 8",
        ),
        of(
            "shape that multiplies past all numbers",
            SAFE,
            header(&[entry("w", "F32", "[9223372036854775807,4]", 0, 8)], 8),
            "cannot stand in bytes 0 to 8",
        ),
        of(
            "negative extent",
            SAFE,
            header(&[entry("w", "F32", "[-2]", 0, 8)], 8),
            "not valid",
        ),
        of(
            "end in front of the start",
            SAFE,
            header(&[entry("w", "F32", "[2]", 8, 0)], 8),
            "in front of 'w'",
        ),
        of(
            "shape larger than its bytes",
            SAFE,
            header(&[entry("w", "F32", "[3]", 0, 8)], 8),
            "cannot stand in bytes 0 to 8",
        ),
        of(
            "overlapping tensors",
            SAFE,
            header(
                &[
                    entry("v", "F32", "[2]", 0, 8),
                    entry("w", "F32", "[2]", 4, 12),
                ],
                12,
            ),
            "tensors 'v' and 'w' overlap",
        ),
        of(
            "hole between tensors",
            SAFE,
            header(
                &[
                    entry("v", "F32", "[2]", 0, 8),
                    entry("w", "F32", "[2]", 16, 24),
                ],
                24,
            ),
            "bytes 8 to 16, in front of 'w', belong to no tensor",
        ),
        of(
            "one name twice",
            SAFE,
            header(
                &[
                    entry("w", "F32", "[2]", 0, 8),
                    entry("w", "F32", "[2]", 8, 16),
                ],
                16,
            ),
            "tensor 'w' comes twice",
        ),
        of(
            "bytes behind the tensors",
            SAFE,
            [good(), vec![0; 3]].concat(),
            "describes 8 bytes of tensors, the file has 11",
        ),
        of(
            "8-bit floats",
            SAFE,
            header(&[entry("w", "F8_E4M3", "[8]", 0, 8)], 8),
            "'w' has element type F8_E4M3",
        ),
        of(
            "unknown element type",
            SAFE,
            header(&[entry("w", "Q9", "[8]", 0, 8)], 8),
            "Q9",
        ),
        of(
            "a pointer for weights",
            SAFE,
            POINTER.to_vec(),
            "git lfs pull",
        ),
    ]
}

fn zip(pickle: &[u8]) -> Vec<u8> {
    torch_bytes::zip(&Pickled::raw(pickle))
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// `{"w": module.name(argument)}` as a pickle.
fn foreign(module: &str, name: &str, argument: &str) -> Vec<u8> {
    let mut pickle = format!("\u{1}}}X\u{1}\0\0\0wc{module}\n{name}\nX").into_bytes();
    // The protocol, 0x80 0x02, is no text.
    pickle.splice(0..1, [0x80, 2]);
    pickle.extend((argument.len() as u32).to_le_bytes());
    pickle.extend(argument.as_bytes());
    pickle.extend(b"\x85Rs.");
    pickle
}

fn tensor(values: usize, shape: &[u32], stride: &[u32]) -> Pickled {
    Pickled::tensor("w", &vec![0.5; values], shape, stride)
}

/// Changes one stretch of bytes, which must be there.
fn replaced(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut places = bytes.windows(from.len());
    let place = places.position(|part| part == from).expect("it is there");
    bytes.splice(place..place + from.len(), to.iter().copied());
    bytes
}

fn pickles() -> Vec<Hostile> {
    let nested = |open: &[u8], each: &[u8], count: usize| {
        let mut pickle = vec![0x80, 2];
        pickle.extend(open);
        pickle.extend(each.repeat(count));
        pickle.push(b'.');
        zip(&pickle)
    };
    let mut long = b"\x80\x02}X".to_vec();
    long.extend((1_u32 << 20).to_le_bytes());
    long.extend(vec![b'a'; 1 << 20]);
    long.extend(b"q\x00".iter().chain(b"h\x00".repeat(1 << 20).iter()));
    let good = tensor(4, &[4], &[1]);
    let minus = u32::MAX;
    let offset = replaced(good.pickle.clone(), b"tQK\x00", b"tQJ\xff\xff\xff\xff");
    let deep_rank = vec![1; 1000];
    let twice = {
        let one = &good.pickle[3..good.pickle.len() - 2];
        [b"\x80\x02}", one, b"s", one, b"s."].concat()
    };
    let mut whole = torch_bytes::zip(&good);
    let values = 0.5_f32.to_le_bytes().repeat(4);
    whole = replaced(whole, &values, &0.25_f32.to_le_bytes().repeat(4));
    let with_storage = |pickle: Vec<u8>| {
        let storage = good.storage.clone();
        torch_bytes::zip(&Pickled { pickle, storage })
    };
    vec![
        of(
            "os.system",
            TORCH,
            zip(&foreign("os", "system", "touch was-here")),
            "asks for 'os.system'",
        ),
        of(
            "builtins.eval",
            TORCH,
            zip(&foreign("builtins", "eval", "1")),
            "asks for 'builtins.eval'",
        ),
        of(
            "os.system in the older stream",
            TORCH,
            torch_bytes::legacy(&Pickled::raw(&foreign("os", "system", "touch was-here"))),
            "asks for 'os.system'",
        ),
        of(
            "nested pickle",
            TORCH,
            zip(&foreign("torch.storage", "_load_from_bytes", "x")),
            "'torch.storage._load_from_bytes'",
        ),
        of(
            "a whole module",
            TORCH,
            zip(&foreign("torch.nn.modules.linear", "Linear", "x")),
            "'torch.nn.modules.linear.Linear'",
        ),
        of(
            "complex numbers",
            TORCH,
            zip(&foreign("torch", "ComplexFloatStorage", "x")),
            "'torch.ComplexFloatStorage'",
        ),
        of(
            "lists in lists",
            TORCH,
            nested(b"", b"]", 900_000),
            "no dictionary of tensors",
        ),
        of(
            "tuples in tuples",
            TORCH,
            nested(b")", b"\x85", 900_000),
            "no dictionary of tensors",
        ),
        of(
            "dictionaries in dictionaries",
            TORCH,
            nested(b"}q\x00", b"X\x01\0\0\0ah\x00s", 400_000),
            "entry 'a' is no tensor",
        ),
        of(
            "lists of two lists of two lists",
            TORCH,
            nested(b"]", b"q\x00]h\x00ah\x00a", 40),
            "no dictionary of tensors",
        ),
        of(
            "a long text again and again",
            TORCH,
            zip(&long),
            "a text of 1048576 bytes",
        ),
        of(
            "millions of values",
            TORCH,
            nested(b"", b"N", 4 << 20),
            "more than 1048576 values",
        ),
        of(
            "an instruction that is unknown",
            TORCH,
            zip(b"\x80\x02}\x82\x01."),
            "instruction 0x82",
        ),
        of(
            "a number for a tensor",
            TORCH,
            zip(b"\x80\x02}X\x05\0\0\0epochK\x03s."),
            "entry 'epoch' is no tensor",
        ),
        of(
            "a key that is a number",
            TORCH,
            zip(b"\x80\x02}K\x01K\x02s."),
            "a key that is no text",
        ),
        of(
            "a tensor twice",
            TORCH,
            with_storage(twice),
            "tensor 'w' comes twice",
        ),
        of("no tensors", TORCH, zip(b"\x80\x02}."), "holds no tensors"),
        of("an empty pickle", TORCH, zip(b""), "cut short"),
        of(
            "negative extent of torch",
            TORCH,
            torch_bytes::zip(&tensor(4, &[minus], &[1])),
            "the extent -1",
        ),
        of(
            "negative stride",
            TORCH,
            torch_bytes::zip(&tensor(4, &[4], &[minus])),
            "the stride -1",
        ),
        of(
            "negative offset",
            TORCH,
            with_storage(offset),
            "the offset -1",
        ),
        of(
            "strides for other dimensions",
            TORCH,
            torch_bytes::zip(&tensor(4, &[2, 2], &[1])),
            "shape [2, 2] and strides [1]",
        ),
        of(
            "a thousand dimensions",
            TORCH,
            torch_bytes::zip(&tensor(4, &deep_rank, &deep_rank)),
            "1000 dimensions",
        ),
        of(
            "strides past the storage",
            TORCH,
            torch_bytes::zip(&tensor(4, &[2, 4], &[4, 1])),
            "cannot be used",
        ),
        of(
            "a tensor of terabytes from strides of zero",
            TORCH,
            torch_bytes::zip(&tensor(1, &[1 << 30, 1 << 10], &[0, 0])),
            "cannot stand in full",
        ),
        of(
            "an extent past all numbers",
            TORCH,
            torch_bytes::zip(&tensor(1, &[1 << 30, 1 << 30, 1 << 30], &[0, 0, 0])),
            "cannot stand in full",
        ),
        of("another checksum", TORCH, whole, "'w'"),
    ]
}

fn archives() -> Vec<Hostile> {
    let good = tensor(4, &[4], &[1]);
    let parts = |pickle: &[u8], storage: &[u8]| {
        torch_bytes::zip_of(&[("model/data.pkl", pickle), ("model/data/0", storage)])
    };
    let stored = |name| Entry::stored(name, b"");
    let names: Vec<String> = (0..30_000).map(|i| format!("model/data/{i}")).collect();
    let many: Vec<Entry<'_>> = names.iter().map(|name| stored(name)).collect();
    let bomb = deflated(&vec![b'N'; 64 << 20]);
    let compressed = Entry {
        method: 8,
        size: 64 << 20,
        ..Entry::stored("model/data.pkl", &bomb)
    };
    let compressed_values = Entry {
        method: 8,
        size: 16,
        ..Entry::stored("model/data/0", &bomb)
    };
    let encrypted = Entry {
        flags: 1,
        ..Entry::stored("model/data.pkl", &good.pickle)
    };
    let beyond = Entry {
        size: 1 << 30,
        stored_size: 1 << 30,
        ..Entry::stored("model/data/0", &good.storage)
    };
    let pickle = Entry::stored("model/data.pkl", &good.pickle);
    let whole = torch_bytes::zip(&good);
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    let large_pickle = vec![b'N'; 9 << 20];
    vec![
        of(
            "compressed pickle",
            TORCH,
            torch_bytes::archive(&[compressed]),
            "'model/data.pkl' is compressed",
        ),
        of(
            "compressed values",
            TORCH,
            torch_bytes::archive(&[pickle, compressed_values]),
            "'model/data/0' is compressed",
        ),
        of(
            "encrypted entry",
            TORCH,
            torch_bytes::archive(&[encrypted]),
            "is encrypted",
        ),
        of(
            "entry longer than the file",
            TORCH,
            torch_bytes::archive(&[pickle, beyond]),
            "'model/data/0' of 1073741824 bytes does not lie within",
        ),
        of(
            "many entries",
            TORCH,
            torch_bytes::archive(&many),
            "archive of 30000 entries",
        ),
        with(
            "entries for more memory than there is",
            TORCH,
            Content::Sparse(
                40 << 30,
                b"PK\x03\x04".to_vec(),
                torch_bytes::end_64(40 << 30, 800_000_000),
            ),
            "claims to be an archive of 800000000 entries",
        ),
        of(
            "values that are not there",
            TORCH,
            torch_bytes::zip_of(&[("model/data.pkl", &good.pickle)]),
            "data/0, are missing",
        ),
        of(
            "values cut short",
            TORCH,
            parts(&good.pickle, &good.storage[..8]),
            "cannot be used",
        ),
        of(
            "no pickle",
            TORCH,
            torch_bytes::zip_of(&[("model/version", b"3")]),
            "without a data.pkl",
        ),
        of(
            "a large pickle",
            TORCH,
            parts(&large_pickle, b""),
            "its pickle has 9437184 bytes",
        ),
        of(
            "archive without its end",
            TORCH,
            whole[..whole.len() - 30].to_vec(),
            "the end of the archive is missing",
        ),
        of("tar archive", TORCH, tar, "a tar archive"),
        of(
            "bare pickle",
            TORCH,
            good.pickle.clone(),
            "neither a zip archive nor the older stream",
        ),
        of(
            "some text",
            TORCH,
            b"certainly not a zip archive".to_vec(),
            "neither a zip archive nor the older stream",
        ),
        of(
            "empty .bin",
            TORCH,
            Vec::new(),
            "neither a zip archive nor the older stream",
        ),
        with(
            "forty gigabytes of nothing",
            TORCH,
            Content::Sparse(40 << 30, b"PK\x03\x04".to_vec(), Vec::new()),
            "the end of the archive is missing",
        ),
        of(
            "older stream cut short",
            TORCH,
            torch_bytes::legacy(&good)[..60].to_vec(),
            "cannot be used",
        ),
    ]
}

fn folders() -> Vec<Hostile> {
    let index = |map: &str| Content::Bytes(format!(r#"{{"weight_map":{{{map}}}}}"#).into_bytes());
    let shards = |map: &str, says, name| Hostile {
        name,
        files: vec![
            (INDEX, index(map)),
            ("a.safetensors", Content::Bytes(good())),
            (
                "b.safetensors",
                Content::Bytes(header(
                    &[
                        entry("v", "F32", "[2]", 0, 8),
                        entry("w", "F32", "[2]", 8, 16),
                    ],
                    16,
                )),
            ),
        ],
        says,
    };
    let deep = format!("{{\"weight_map\":{}", "{\"a\":".repeat(200_000));
    vec![
        shards(
            r#""w":"../outside/model.safetensors""#,
            "not a file name inside the folder",
            "index that leaves the folder",
        ),
        shards(
            r#""w":"/etc/passwd""#,
            "not a file name inside the folder",
            "index with an absolute path",
        ),
        shards(
            r#""w":"c.safetensors""#,
            "'c.safetensors', which is missing",
            "index with a missing file",
        ),
        shards(
            r#""u":"a.safetensors""#,
            "does not name tensor 'w' of 'a.safetensors'",
            "index that leaves a tensor out",
        ),
        shards(
            r#""u":"a.safetensors","w":"a.safetensors""#,
            "places tensor 'u' in 'a.safetensors', where it is not",
            "index with a tensor too many",
        ),
        shards(
            r#""w":"a.safetensors","v":"b.safetensors""#,
            "it stands in 'b.safetensors' too",
            "one name in two files",
        ),
        of(
            "index nested deeply",
            INDEX,
            deep.into_bytes(),
            "not the JSON expected",
        ),
        with(
            "index of gigabytes",
            INDEX,
            Content::Sparse(3 << 30, b"{".to_vec(), Vec::new()),
            "more than the 67108864 accepted",
        ),
        with(
            "link out of the folder",
            SAFE,
            Content::Link("../outside/model.safetensors"),
            "outside of its folder",
        ),
        with(
            "link to endless zeros",
            SAFE,
            Content::Link("/dev/zero"),
            "not a plain file",
        ),
        with(
            "link to nothing",
            SAFE,
            Content::Link("../blobs/gone"),
            "cannot read",
        ),
        with("link to itself", SAFE, Content::Link(SAFE), "cannot read"),
        with(
            "a pipe for weights",
            TORCH,
            Content::Pipe,
            "not a plain file",
        ),
        with(
            "a folder for weights",
            TORCH,
            Content::Folder,
            "not a plain file",
        ),
        of(
            "a pointer for a .bin",
            TORCH,
            POINTER.to_vec(),
            "git lfs pull",
        ),
        of(
            "a pointer for an index",
            INDEX,
            POINTER.to_vec(),
            "git lfs pull",
        ),
    ]
}

fn configurations() -> Vec<Hostile> {
    let deep = "[".repeat(1 << 19);
    let model = |name, field: &[u8], says| {
        let mut bytes = field.to_vec();
        bytes.splice(0..0, [0x0a, field.len() as u8]);
        of(name, TOKENIZER, bytes, says)
    };
    vec![
        of(
            "config nested deeply",
            CONFIG,
            format!("{{\"model_type\":{deep}").into_bytes(),
            "recursion limit",
        ),
        with(
            "config of gigabytes",
            CONFIG,
            Content::Sparse(3 << 30, b"{".to_vec(), Vec::new()),
            "longer than 1048576 bytes",
        ),
        with(
            "a pipe for a config",
            CONFIG,
            Content::Pipe,
            "not a plain file",
        ),
        of(
            "a pointer for a config",
            CONFIG,
            POINTER.to_vec(),
            "git lfs pull",
        ),
        of("an empty config", CONFIG, Vec::new(), "not a JSON object"),
        of("an empty tokenizer", TOKENIZER, Vec::new(), "vocabulary"),
        with(
            "a tokenizer of gigabytes",
            TOKENIZER,
            Content::Sparse(3 << 30, b"\x0a".to_vec(), Vec::new()),
            "at most 16777216",
        ),
        with(
            "a pipe for a tokenizer",
            TOKENIZER,
            Content::Pipe,
            "not a plain file",
        ),
        of(
            "a pointer for a tokenizer",
            TOKENIZER,
            POINTER.to_vec(),
            "git lfs pull",
        ),
        of(
            "a tokenizer whose length is beyond it",
            TOKENIZER,
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f".to_vec(),
            "not a SentencePiece model",
        ),
        model("a piece of no type", b"\x0a\x01a\x18\x63", "type 99"),
        model(
            "a piece that is not a number's worth",
            b"\x0a\x01a\x15\x00\x00\xc0\x7f",
            "the score NaN",
        ),
    ]
}

/// A `tokenizer.json` of this model, and of no more than it needs.
fn tokenizer_json(model: &str) -> Vec<u8> {
    format!(r#"{{"model":{{"type":"BPE",{model}}}}}"#).into_bytes()
}

fn vocabularies() -> Vec<Hostile> {
    let merges = format!(
        r#""vocab":{{}},"merges":[{}["a","b"]]"#,
        r#"["a","b"],"#.repeat(4 << 20)
    );
    let tokens: Vec<String> = (0..1_000_000).map(|i| format!("\"t{i}\":{i}")).collect();
    let vocab = format!(r#""vocab":{{{}}},"merges":[]"#, tokens.join(","));
    vec![
        with(
            "a tokenizer.json of gigabytes",
            TOKENIZER_JSON,
            Content::Sparse(3 << 30, b"{".to_vec(), Vec::new()),
            "more than 50331648",
        ),
        of(
            "a tokenizer.json nested deeply",
            TOKENIZER_JSON,
            format!("{{\"added_tokens\":{}", "[".repeat(1 << 20)).into_bytes(),
            "tokenizer.json",
        ),
        of(
            "a tokenizer.json of nothing",
            TOKENIZER_JSON,
            b"{}".to_vec(),
            "tokenizer.json",
        ),
        of(
            "millions of merges",
            TOKENIZER_JSON,
            tokenizer_json(&merges),
            "tokenizer.json",
        ),
        of(
            "a million tokens",
            TOKENIZER_JSON,
            tokenizer_json(&vocab),
            "tokenizer.json",
        ),
        with(
            "a pipe for a tokenizer.json",
            TOKENIZER_JSON,
            Content::Pipe,
            "not a plain file",
        ),
        of(
            "a pointer for a tokenizer.json",
            TOKENIZER_JSON,
            POINTER.to_vec(),
            "git lfs pull",
        ),
        of(
            "ranks with a gap",
            TOKENIZER,
            b"IQ== 0\nIg== 7\n".to_vec(),
            "tokenizer.model",
        ),
        of(
            "ranks that are no base64",
            TOKENIZER,
            b"IQ== 0\n!!!! 1\n".to_vec(),
            "tokenizer.model",
        ),
    ]
}

/// All of them.
pub fn all() -> Vec<Hostile> {
    let mut all = safetensors_files();
    all.extend(pickles());
    all.extend(archives());
    all.extend(folders());
    all.extend(configurations());
    all.extend(vocabularies());
    all
}
