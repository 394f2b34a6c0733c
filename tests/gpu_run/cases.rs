//! What is wrong with the GPU in each case.

use std::fs;
use std::path::Path;

use super::gpu::Manner;
use super::world::World;

/// Names of the CUDA libraries begin so.
pub const LIBRARIES: [&str; 3] = [DRIVER, "libcublasLt", "libnvrtc"];
const DRIVER: &str = "libcuda.";

/// A machine and a command.
pub struct Case {
    pub name: &'static str,
    /// Those of [`LIBRARIES`] that are there.
    pub libraries: &'static [&'static str],
    /// Environment variables; those of the program name a place in the case's folder.
    pub manner: Manner<'static>,
    /// Makes the folder wrong.
    pub prepare: fn(&World),
    /// Arguments; `{train}` are those of a run that is right.
    pub command: &'static str,
    pub code: i32,
    /// What and where, and what to do.
    pub says: &'static [&'static str],
}

const fn case(
    name: &'static str,
    manner: Manner<'static>,
    command: &'static str,
    code: i32,
    says: &'static [&'static str],
) -> Case {
    Case {
        name,
        libraries: &LIBRARIES,
        manner,
        prepare: nothing,
        command,
        code,
        says,
    }
}

const fn with_libraries(libraries: &'static [&'static str], case: Case) -> Case {
    Case { libraries, ..case }
}

const fn prepared(prepare: fn(&World), case: Case) -> Case {
    Case { prepare, ..case }
}

fn nothing(_: &World) {}

/// The kernels' sources in `kernels`, one of them with an error in its second line.
fn broken_kernel(world: &World) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    fs::create_dir(world.path().join("kernels")).unwrap();
    for entry in fs::read_dir(sources).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        world.write(&format!("kernels/{name}"), fs::read(path).unwrap());
    }
    let norm = String::from_utf8(world.read("kernels/norm.cu")).unwrap();
    world.write("kernels/norm.cu", format!("\n#error broken\n{norm}"));
}

const NO_DRIVER: &[&str] = &["libcublasLt", "libnvrtc"];
const NO_NVRTC: &[&str] = &[DRIVER, "libcublasLt"];
const NO_CUBLASLT: &[&str] = &[DRIVER, "libnvrtc"];
const NO_GPU: Manner = &[("EMULATOR_DEVICES", "0")];
const OLD_DRIVER: Manner = &[("EMULATOR_DRIVER_VERSION", "11080")];
const TWO: Manner = &[("EMULATOR_DEVICES", "2")];

pub const CASES: &[Case] = &[
    // What there is.
    with_libraries(
        &[],
        case(
            "devices without a driver",
            &[],
            "devices",
            0,
            &["cpu", "libcuda.so.1", "nvidia-smi"],
        ),
    ),
    case(
        "devices where there is no GPU",
        NO_GPU,
        "devices",
        0,
        &["cpu", "no GPU"],
    ),
    case(
        "devices with a T4",
        &[("EMULATOR_ARCH", "75"), ("EMULATOR_MEMORY", "15843721216")],
        "devices",
        0,
        &["0: ", "7.5", "14.8 GiB", "sm_75"],
    ),
    case(
        "devices with two 3090",
        &[
            ("EMULATOR_ARCH", "86"),
            ("EMULATOR_DEVICES", "2"),
            ("EMULATOR_MEMORY", "25438322688"),
        ],
        "devices",
        0,
        &["1: ", "8.6", "sm_86", "peer access to 0"],
    ),
    case(
        "devices with two H100 that cannot reach each other",
        &[
            ("EMULATOR_ARCH", "90"),
            ("EMULATOR_DEVICES", "2"),
            ("EMULATOR_PEERS", "0"),
        ],
        "devices",
        0,
        &["9.0", "sm_90", "no peer access"],
    ),
    case(
        "devices with a GPU newer than NVRTC",
        &[("EMULATOR_ARCH", "120"), ("EMULATOR_NVRTC_VERSION", "12.6")],
        "devices",
        0,
        &["12.0", "NVRTC 12.6", "compute_90"],
    ),
    case(
        "devices with a GPU that is too old",
        &[("EMULATOR_ARCH", "70")],
        "devices",
        0,
        &["7.0", "too old, 7.5 is needed"],
    ),
    with_libraries(
        NO_NVRTC,
        case(
            "devices without NVRTC",
            &[],
            "devices",
            1,
            &["libnvrtc.so.12", "pip install nvidia-cuda-nvrtc-cu12"],
        ),
    ),
    case(
        "devices with an old driver",
        OLD_DRIVER,
        "devices",
        1,
        &["11.8", "525"],
    ),
    // Nothing to train on.
    with_libraries(
        NO_DRIVER,
        case(
            "training without a driver",
            &[],
            "{train} --devices 0",
            1,
            &["libcuda.so.1", "525", "--devices cpu"],
        ),
    ),
    with_libraries(
        NO_NVRTC,
        case(
            "training without NVRTC",
            &[],
            "{train} --devices 0",
            1,
            &["libnvrtc.so.12", "pip install nvidia-cuda-nvrtc-cu12"],
        ),
    ),
    with_libraries(
        NO_CUBLASLT,
        case(
            "training without cuBLASLt",
            &[],
            "{train} --devices 0",
            1,
            &["libcublasLt.so.12", "pip install nvidia-cublas-cu12"],
        ),
    ),
    with_libraries(
        NO_CUBLASLT,
        case(
            "answering without cuBLASLt",
            &[],
            "generate --model model --input prompts.jsonl --devices 0",
            1,
            &["libcublasLt.so.12"],
        ),
    ),
    with_libraries(
        NO_DRIVER,
        case(
            "a chat without a driver",
            &[],
            "chat --model text_model --devices 0",
            1,
            &["libcuda.so.1"],
        ),
    ),
    case(
        "an old driver",
        OLD_DRIVER,
        "{train} --devices 0",
        1,
        &["11.8", "12.0", "525"],
    ),
    case(
        "a driver older than NVRTC",
        &[("EMULATOR_NVRTC_VERSION", "13.0")],
        "{train} --devices 0",
        1,
        &["12.8", "NVRTC", "13.0", "580"],
    ),
    case(
        "no GPU",
        NO_GPU,
        "{train} --devices 0",
        1,
        &["no GPU", "CUDA_VISIBLE_DEVICES"],
    ),
    case(
        "a number too high",
        &[],
        "{train} --devices 1",
        2,
        &["no CUDA device 1", "mp-train devices"],
    ),
    case(
        "the second number too high",
        TWO,
        "{train} --devices 1,2",
        2,
        &["no CUDA device 2", "has 2"],
    ),
    case(
        "a plan for a GPU that is not there",
        &[],
        "plan --model model --train rows.jsonl --output output --max-steps 2 --devices 3",
        2,
        &["no CUDA device 3"],
    ),
    case(
        "a GPU that is too old",
        &[("EMULATOR_ARCH", "70")],
        "{train} --devices 0",
        1,
        &["Emulated V100", "7.0", "7.5"],
    ),
    // What cannot be asked.
    case(
        "CPU and GPU together",
        TWO,
        "{train} --devices cpu,0",
        2,
        &["--devices", "cpu"],
    ),
    case(
        "f32 on a GPU",
        &[],
        "{train} --devices 0 --precision f32",
        2,
        &["f32", "f16", "--devices cpu"],
    ),
    case(
        "sums in f16 for the whole model",
        &[],
        "{train} --devices 0 --kind full --product-sums f16",
        2,
        &["--product-sums \"f16\"", "f32", "adapter.kind"],
    ),
    case(
        "answering in f32 on a GPU",
        &[],
        "generate --model model --input prompts.jsonl --devices 0 --precision f32",
        2,
        &["f32", "f16"],
    ),
    // Memory.
    case(
        "no memory for the stage",
        &[("EMULATOR_MEMORY", "540000000")],
        "{train} --devices 0",
        2,
        &["stage 0", "device 0", "are missing"],
    ),
    case(
        "memory that somebody else takes meanwhile",
        &[("EMULATOR_FAIL", "allocation:1")],
        "{train} --devices 0",
        1,
        &["stage 0", "CUDA device 0", "no memory for"],
    ),
    case(
        "no memory for what was asked",
        &[],
        "{train} --devices 0 --memory-per-device 1MiB --kind full",
        2,
        &["stage 0", "are missing"],
    ),
    // A step allocates nothing; answers of unknown length do.
    case(
        "no memory for an answer",
        &[("EMULATOR_FAIL", "allocation:2")],
        "generate --model model --input prompts.jsonl --devices 0 --max-new-tokens 2000",
        1,
        &["stage 0", "CUDA device 0", "no memory for 0.5 MiB"],
    ),
    // Kernels.
    prepared(
        |world| world.write("file", ""),
        case(
            "a kernel cache that cannot be written",
            &[("MP_TRAIN_KERNEL_CACHE", "file/cache")],
            "{train} --devices 0",
            2,
            &["<dir>/file/cache", "MP_TRAIN_KERNEL_CACHE"],
        ),
    ),
    case(
        "kernel sources that are not there",
        &[("MP_TRAIN_KERNEL_SOURCES", "nowhere")],
        "{train} --devices 0",
        2,
        &["<dir>/nowhere", "MP_TRAIN_KERNEL_SOURCES"],
    ),
    case(
        "kernels for an architecture that is none",
        &[("MP_TRAIN_KERNEL_ARCH", "turing")],
        "{train} --devices 0",
        2,
        &["MP_TRAIN_KERNEL_ARCH", "turing", "75, 80"],
    ),
    prepared(
        broken_kernel,
        case(
            "a kernel that does not compile",
            &[("MP_TRAIN_KERNEL_SOURCES", "kernels")],
            "{train} --devices 0",
            1,
            &["kernels/norm.cu", "sm_80", "<log with 1>"],
        ),
    ),
    // What fails on the way.
    case(
        "a kernel that fails in a step",
        &[("EMULATOR_FAIL", "launch:attention_forward_16:9")],
        "{train} --devices 0",
        1,
        &[
            "stage 0, step 2",
            "CUDA device 0",
            "CUDA_LAUNCH_BLOCKING=1",
            "there is no checkpoint",
        ],
    ),
    case(
        "a kernel that fails on the second of two GPUs",
        &[
            ("EMULATOR_DEVICES", "2"),
            ("EMULATOR_FAIL", "launch:cross_entropy:2"),
        ],
        "{train} --devices 0,1",
        1,
        &["stage 1, step 1, F0 on CUDA device 1"],
    ),
    case(
        "a product that fails",
        &[("EMULATOR_FAIL", "product:1")],
        "{train} --devices 0",
        1,
        &["stage 0, loading", "cuBLASLt"],
    ),
];
