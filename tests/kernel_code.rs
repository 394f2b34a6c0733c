//! Every kernel compiled by NVRTC for every architecture we name, without a GPU: it compiles, it does not
//! spill, and its registers are those on record, which the emulated GPUs go by.
//!
//! Needs NVRTC 12.8 (`pip install nvidia-cuda-nvrtc-cu12==12.8.93`), found as a run finds it; without
//! it the test is skipped, unless MP_TRAIN_REQUIRE_NVRTC=1.

#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::path::Path;

use mp_train::backend::cuda;

/// T4, A100, 3090, 4090, H100.
const ARCHITECTURES: [u32; 5] = [75, 80, 86, 89, 90];
/// B200 and 5090, where NVRTC knows them: every kernel compiles; what spills there is on record.
const NEWER: [u32; 2] = [100, 120];

/// What the record was made with.
const RECORDED_WITH: (i32, i32) = (12, 8);

/// One kernel on one architecture, from ptxas's report.
struct Usage {
    kernel: String,
    registers: u32,
    spilled_bytes: u32,
    stack_bytes: u32,
}

#[test]
fn every_kernel_compiles_for_every_architecture_and_does_not_spill() {
    let (version, known) = match cuda::nvrtc() {
        Ok(found) => found,
        Err(error) => {
            let required = std::env::var("MP_TRAIN_REQUIRE_NVRTC").is_ok_and(|value| value == "1");
            assert!(!required, "{error}");
            println!("skipped: {error}");
            return;
        }
    };
    let mut record = String::from("# arch kernel registers, by NVRTC 12.8\n");
    let mut wrong = Vec::new();
    let newer = NEWER.into_iter().filter(|arch| known.contains(arch));
    for arch in ARCHITECTURES.into_iter().chain(newer) {
        for compiled in cuda::compile_kernels(arch, &["--ptxas-options=-v"]).unwrap() {
            let usages = usages(&compiled.log);
            assert!(
                !usages.is_empty(),
                "no kernel in the report of {}:\n{}",
                compiled.file,
                compiled.log
            );
            for usage in usages {
                if usage.spilled_bytes > 0 || usage.stack_bytes > 0 {
                    let what = format!(
                        "{arch} {}: {} bytes spilled, {} bytes of stack",
                        usage.kernel, usage.spilled_bytes, usage.stack_bytes
                    );
                    match ARCHITECTURES.contains(&arch) {
                        true => wrong.push(what),
                        false => writeln!(record, "# {what}").unwrap(),
                    }
                }
                writeln!(record, "{arch} {} {}", usage.kernel, usage.registers).unwrap();
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if version == RECORDED_WITH {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_emulator/registers.txt");
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &record).unwrap();
        }
        let on_record = std::fs::read_to_string(&path).unwrap_or_default();
        let note = "registers differ from the record; UPDATE_SNAPSHOTS=1 writes it anew";
        assert_eq!(on_record, record, "{note}");
    }
}

/// `KERNEL_CODE=FOLDER cargo test --test kernel_code machine_code` leaves the machine code of every file, and
/// the compiler's report on it, in FOLDER/sm_86 and FOLDER/sm_90: scripts/kernel_floors.sh disassembles it.
#[test]
fn machine_code_is_left_where_asked() {
    let Some(folder) = std::env::var_os("KERNEL_CODE") else {
        println!("skipped: KERNEL_CODE names no folder");
        return;
    };
    let ((major, minor), _) = cuda::nvrtc().unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(
        Path::new(&folder).join("nvrtc"),
        format!("{major}.{minor}\n"),
    )
    .unwrap();
    for arch in [86, 90] {
        let folder = Path::new(&folder).join(format!("sm_{arch}"));
        std::fs::create_dir_all(&folder).unwrap();
        for compiled in cuda::compile_kernels(arch, &["--ptxas-options=-v"]).unwrap() {
            let stem = compiled.file.trim_end_matches(".cu");
            std::fs::write(folder.join(stem).with_extension("cubin"), compiled.code).unwrap();
            std::fs::write(folder.join(stem).with_extension("log"), compiled.log).unwrap();
        }
    }
}

/// `Compiling entry function 'NAME'`, then `N bytes stack frame, N bytes spill stores, N bytes spill
/// loads`, then `Used N registers`.
fn usages(log: &str) -> Vec<Usage> {
    let mut all: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            all.push(Usage {
                kernel: rest.split('\'').next().unwrap().to_owned(),
                registers: 0,
                spilled_bytes: 0,
                stack_bytes: 0,
            });
        }
        let Some(usage) = all.last_mut() else {
            continue;
        };
        let numbers: Vec<u32> = line
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .collect();
        if line.contains("bytes stack frame") {
            usage.stack_bytes = numbers[0];
            usage.spilled_bytes = numbers[1] + numbers[2];
        }
        if line.contains("Used ") && line.contains(" registers") {
            usage.registers = numbers[0];
        }
    }
    all
}
