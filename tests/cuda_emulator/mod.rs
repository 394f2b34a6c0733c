//! Pretend GPUs: builds the pretend CUDA libraries of this folder and puts them under the crate's own
//! tests or under a child process. README.md tells what they do.

#![allow(dead_code, clippy::unwrap_used)]

use std::ffi::{CString, c_char, c_int, c_longlong};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

/// The order in which the threads of a block run, and the blocks of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Ascending; fresh memory holds NaNs; asynchronous copies arrive as late as they may.
    Forward,
    /// Descending; fresh memory holds zeros; asynchronous copies arrive at once.
    Reverse,
    /// By chance, from a seed; fresh memory holds some byte.
    Random(u64),
}

/// The orders that results are compared over, bit for bit.
pub const ORDERS: [Order; 4] = [
    Order::Forward,
    Order::Reverse,
    Order::Random(1),
    Order::Random(2),
];

/// The pretend libraries, built.
#[derive(Clone, Debug)]
pub struct Emulator {
    folder: PathBuf,
}

impl Emulator {
    /// Builds the libraries, or finds them built. `None`, and a line that says so, on a machine
    /// without g++; with `MP_TRAIN_REQUIRE_EMULATOR=1` that is a failure.
    pub fn build() -> Option<Emulator> {
        static BUILT: OnceLock<Option<Emulator>> = OnceLock::new();
        BUILT
            .get_or_init(|| {
                let required =
                    std::env::var("MP_TRAIN_REQUIRE_EMULATOR").is_ok_and(|value| value == "1");
                if !compiler_present() {
                    assert!(
                        !required,
                        "MP_TRAIN_REQUIRE_EMULATOR=1, and there is no g++"
                    );
                    println!("skipped: needs g++");
                    return None;
                }
                Some(build())
            })
            .clone()
    }

    /// Folder of the libraries.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Loads the libraries into this process, where the loader then finds them under their names.
    pub fn load_here(&self) -> &'static Loaded {
        static LOADED: OnceLock<Loaded> = OnceLock::new();
        LOADED.get_or_init(|| {
            for (name, value) in self.variables() {
                // SAFETY: this process reads its environment through `std`, which locks, or in the
                // libraries, which are loaded below.
                unsafe { std::env::set_var(name, value) };
            }
            let open = |name: &str| {
                let path = self.folder.join(name);
                // SAFETY: our own libraries; their initialisers only build tables.
                unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.unwrap()
            };
            let driver = open("libcuda.so");
            for name in ["libcublasLt.so", "libnccl.so", "libnvrtc.so"] {
                std::mem::forget(open(name));
            }
            Loaded { driver }
        })
    }

    /// Makes a child process find the libraries.
    pub fn command_env(&self, command: &mut Command) {
        command.env("LD_LIBRARY_PATH", &self.folder);
        for (name, value) in self.variables() {
            command.env(name, value);
        }
    }

    /// The trainer's cache of compiled kernels must not outlive these libraries; and the record of the
    /// registers that each kernel takes.
    fn variables(&self) -> [(&'static str, PathBuf); 2] {
        let sanitizer = std::env::var("EMULATOR_SANITIZE").unwrap_or_default();
        let flags = std::env::var("EMULATOR_CXXFLAGS").unwrap_or_default();
        let cache = format!("kernels-{sanitizer}-{:016x}", digest(flags.as_bytes()));
        [
            ("MP_TRAIN_KERNEL_CACHE", self.folder.join(cache)),
            ("EMULATOR_REGISTERS", sources().join("registers.txt")),
        ]
    }
}

/// The libraries in this process.
pub struct Loaded {
    driver: Library,
}

impl Loaded {
    /// Changes a setting, under the name of its environment variable (`EMULATOR_ARCH`, say). Devices
    /// and architecture may change while no context is held.
    pub fn set(&self, name: &str, value: &str) {
        let (name, value) = (CString::new(name).unwrap(), CString::new(value).unwrap());
        type Set = unsafe extern "C" fn(*const c_char, *const c_char) -> c_int;
        // SAFETY: the function has this type; both strings live during the call.
        let known = unsafe {
            let set: Symbol<Set> = self.driver.get(b"emulator_set\0").unwrap();
            set(name.as_ptr(), value.as_ptr())
        };
        assert_eq!(known, 1, "no such setting: {name:?}");
    }

    /// The order of all launches that run from now on.
    pub fn set_order(&self, order: Order) {
        let (name, seed) = match order {
            Order::Forward => ("forward", 1),
            Order::Reverse => ("reverse", 1),
            Order::Random(seed) => ("random", seed),
        };
        self.set("EMULATOR_ORDER", name);
        self.set("EMULATOR_SEED", &seed.to_string());
    }

    /// A counter; README.md lists them. Most have a form for one device: `live_bytes:1`.
    pub fn counter(&self, name: &str) -> i64 {
        let name = CString::new(name).unwrap();
        type Counter = unsafe extern "C" fn(*const c_char) -> c_longlong;
        // SAFETY: the function has this type; the string lives during the call.
        unsafe {
            let counter: Symbol<Counter> = self.driver.get(b"emulator_counter\0").unwrap();
            counter(name.as_ptr())
        }
    }

    /// Sets the counters to zero, but for the bytes in use.
    pub fn reset_counters(&self) {
        // SAFETY: the function has this type.
        unsafe {
            let reset: Symbol<unsafe extern "C" fn()> =
                self.driver.get(b"emulator_reset_counters\0").unwrap();
            reset();
        }
    }
}

fn compiler_present() -> bool {
    let compiler = std::env::var("EMULATOR_CXX").unwrap_or_else(|_| "g++".to_owned());
    let asked = Command::new(compiler)
        .arg("--version")
        .env_remove("LD_PRELOAD")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    asked.is_ok_and(|status| status.success())
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_emulator")
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Builds into a folder named after the sources' contents, one process at a time.
fn build() -> Emulator {
    let sources = sources();
    let mut files: Vec<PathBuf> = std::fs::read_dir(&sources)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            extension.is_some_and(|extension| ["cpp", "h", "sh"].contains(&extension))
        })
        .collect();
    files.sort();
    let mut contents = sources.as_os_str().as_encoded_bytes().to_vec();
    for file in &files {
        contents.extend(std::fs::read(file).unwrap());
    }
    let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(base).unwrap();
    let folder = base.join(format!("cuda-emulator-{:016x}", digest(&contents)));
    let lock = File::create(base.join("cuda-emulator.lock")).unwrap();
    lock.lock().unwrap();
    if !folder.join("built").exists() {
        let built = Command::new("sh")
            .arg(sources.join("build.sh"))
            .arg(&folder)
            .env_remove("LD_PRELOAD") // a sanitizer is for this process alone
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&built.stderr);
        assert!(
            built.status.success(),
            "tests/cuda_emulator/build.sh:\n{said}"
        );
        File::create(folder.join("built")).unwrap();
    }
    Emulator { folder }
}

/// Whether tests run on the GPU of this machine instead (`MP_TRAIN_TEST_GPU=1`). Where they do not, a
/// test that only a GPU can pass is skipped, or fails with `MP_TRAIN_REQUIRE_GPU=1`.
pub fn on_this_gpu() -> bool {
    let is_set = |name| std::env::var(name).is_ok_and(|value| value == "1");
    let asked = is_set("MP_TRAIN_TEST_GPU");
    assert!(
        asked || !is_set("MP_TRAIN_REQUIRE_GPU"),
        "MP_TRAIN_REQUIRE_GPU=1, but MP_TRAIN_TEST_GPU is not 1"
    );
    asked
}
