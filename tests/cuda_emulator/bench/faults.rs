//! Failures that EMULATOR_FAIL plans: each hits the call and the device or rank that it names, and nothing
//! else.

use std::sync::Barrier;
use std::time::Duration;

use cudarc::driver::sys::CUresult::{
    CUDA_ERROR_LAUNCH_FAILED, CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_PEER_ACCESS_UNSUPPORTED,
};
use cudarc::nccl::result;
use cudarc::nccl::sys::ncclResult_t;

use crate::gpu::{Bench, assert_error, bench, in_a_child};
use crate::ranks::{grouped, join, on_ranks, settle, state_of, stays_away, wait};
use crate::streams::Adder;

fn planned(plan: &str) -> Option<Bench> {
    bench(&[("EMULATOR_FAIL", plan), ("EMULATOR_QUIET", "0")])
}

/// Adds 1 to fresh zeros on a device; what is there afterwards.
fn added(adder: &Adder) -> Vec<f32> {
    let stream = adder.context.default_stream();
    let mut x = stream.alloc_zeros::<f32>(32).unwrap();
    adder.add(&stream, &mut x, 1.0);
    stream.clone_dtoh(&x).unwrap()
}

#[test]
fn a_launch_fails_on_the_device_that_is_meant() {
    let Some(bench) = planned("launch:add:2@1") else {
        return;
    };
    let [near, far] = [0, 1].map(|device| Adder::new(bench.device(device)));
    for _ in 0..3 {
        assert_eq!(added(&near), [1.0; 32]);
    }
    assert_eq!(added(&far), [1.0; 32]);
    let stream = far.context.default_stream();
    let mut x = stream.alloc_zeros::<f32>(32).unwrap();
    far.add(&stream, &mut x, 1.0);
    for _ in 0..2 {
        assert_error(stream.synchronize(), CUDA_ERROR_LAUNCH_FAILED);
    }
    assert_eq!(added(&near), [1.0; 32]);
}

#[test]
fn memory_ends_on_the_device_that_is_meant() {
    let Some(bench) = planned("out_of_memory_after:8192@1") else {
        return;
    };
    let [near, far] = [0, 1].map(|device| bench.device(device).new_stream().unwrap());
    let _large = near.alloc_zeros::<u8>(1 << 20).unwrap();
    let _first = far.alloc_zeros::<u8>(4096).unwrap();
    let second = far.alloc_zeros::<u8>(4096).unwrap();
    assert_error(far.alloc_zeros::<u8>(1), CUDA_ERROR_OUT_OF_MEMORY);
    assert_eq!(far.context().mem_get_info().unwrap().0, 0);
    drop(second);
    far.synchronize().unwrap();
    far.alloc_zeros::<u8>(4096).unwrap();
}

#[test]
fn a_kernel_makes_nans() {
    for (plan, spoiled) in [
        ("nan:add:2@1", [false, true, false]),
        ("nan:*:2+@1", [false, true, true]),
        ("nan:add:1@0", [false, false, false]),
    ] {
        let Some(bench) = planned(plan) else { return };
        let adder = Adder::new(bench.device(1));
        for spoiled in spoiled {
            let seen = added(&adder);
            assert!(seen[..4].iter().all(|x| x.is_nan() == spoiled), "{plan}");
            assert_eq!(seen[4..], [1.0; 28]);
            let halves: &[half::f16] = bytemuck::cast_slice(&seen[..4]);
            assert!(halves.iter().all(|x| x.is_nan() == spoiled), "{plan}");
        }
    }
}

#[test]
fn a_launch_never_returns() {
    let said = in_a_child("faults::a_launch_never_returns", &[], || {
        let bench = planned("host_hang:add:2@1").unwrap();
        let [near, far] = [0, 1].map(|device| Adder::new(bench.device(device)));
        assert_eq!(added(&far), [1.0; 32]);
        let hung = std::thread::spawn(move || added(&far));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!hung.is_finished());
        assert_eq!(added(&near), [1.0; 32]);
    });
    let Some(said) = said else { return };
    assert!(said.contains("add: its launch never returns"), "{said}");
}

#[test]
fn a_kernel_never_ends() {
    for streams in ["late", "early"] {
        let variables = [("STREAMS", streams)];
        in_a_child("faults::a_kernel_never_ends", &variables, || {
            let streams = std::env::var("STREAMS").unwrap();
            let settings = [
                ("EMULATOR_FAIL", "gpu_hang:*:2@1"),
                ("EMULATOR_STREAMS", &streams),
            ];
            let bench = bench(&settings).unwrap();
            let [near, far] = [0, 1].map(|device| Adder::new(bench.device(device)));
            assert_eq!(added(&far), [1.0; 32]);
            let (stream, other) = (
                far.context.new_stream().unwrap(),
                far.context.new_stream().unwrap(),
            );
            let mut x = stream.alloc_zeros::<f32>(32).unwrap();
            far.add(&stream, &mut x, 1.0);
            let never = stream.record_event(None).unwrap();
            assert!(stays_away(&never));
            wait(&other.record_event(None).unwrap());
            other.wait(&never).unwrap();
            assert!(stays_away(&other.record_event(None).unwrap()));
            let hung = std::thread::spawn(move || stream.synchronize());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!hung.is_finished());
            assert_eq!(added(&near), [1.0; 32]);
            std::process::exit(0); // to unload the module would wait for the kernel
        });
    }
}

#[test]
fn nccl_fails_at_all_ranks() {
    let Some(bench) = planned("nccl_error:3@1") else {
        return;
    };
    let both = Barrier::new(2); // else one could see the other's error before it has queued its own group
    on_ranks(&bench, &[0, 1], |rank| {
        let own = rank.floats(&[rank.rank as f32; 4]);
        let mut theirs = rank.floats(&[9.0; 4]);
        let peer = 1 - rank.rank;
        for round in 0..2 {
            grouped(|| {
                rank.send(&own, peer).unwrap();
                rank.receive(&mut theirs, peer).unwrap();
            })
            .unwrap();
            settle(rank.communicator);
            let exchanged = rank.transfers.record_event(None).unwrap();
            if round == 0 {
                wait(&exchanged);
                continue;
            }
            both.wait();
            while state_of(rank.communicator) == ncclResult_t::ncclSuccess {
                assert!(!exchanged.is_complete());
            }
            let expected = match rank.rank {
                1 => ncclResult_t::ncclSystemError,
                _ => ncclResult_t::ncclRemoteError,
            };
            assert_eq!(state_of(rank.communicator), expected);
            assert!(stays_away(&exchanged));
            let answer = rank.send(&own, peer);
            assert_eq!(answer.err().map(|error| error.0), Some(expected));
            rank.abort();
            wait(&exchanged);
        }
    });
}

#[test]
fn nccl_hangs() {
    let Some(bench) = planned("nccl_hang:2@0") else {
        return;
    };
    on_ranks(&bench, &[0, 1], |rank| {
        let mut x = rank.floats(&[1.0; 4]);
        rank.all_reduce(&mut x).unwrap();
        wait(&rank.launched());
        assert_eq!(rank.read(&x), [2.0; 4]);
        rank.all_reduce(&mut x).unwrap();
        let never = rank.launched();
        assert!(stays_away(&never));
        assert_eq!(state_of(rank.communicator), ncclResult_t::ncclSuccess);
        rank.abort();
        wait(&never);
    });
}

#[test]
fn a_rank_never_joins() {
    let Some(bench) = planned("nccl_init_hang@1") else {
        return;
    };
    let contexts = [0, 1].map(|device| bench.device(device));
    let id = result::get_uniqueid().unwrap();
    let mut rank = 0;
    let communicators = contexts.map(|context| {
        context.bind_to_thread().unwrap();
        rank += 1;
        join(id, rank - 1, 2).0
    });
    for _ in 0..50 {
        for communicator in communicators {
            assert_eq!(state_of(communicator), ncclResult_t::ncclInProgress);
        }
    }
    for communicator in communicators {
        // SAFETY: made above, not used afterwards.
        unsafe { result::comm_abort(communicator) }.unwrap();
    }
}

#[test]
fn copies_between_devices_never_end() {
    in_a_child("faults::copies_between_devices_never_end", &[], || {
        let bench = planned("peer_copy_hang@1").unwrap();
        let [near, far] = [0, 1].map(|device| bench.device(device).new_stream().unwrap());
        let x = near.clone_htod(&[1.0f32; 4]).unwrap();
        let mut y = far.alloc_zeros::<f32>(4).unwrap();
        let mut z = near.alloc_zeros::<f32>(4).unwrap();
        wait(&near.record_event(None).unwrap());
        near.memcpy_dtod(&x, &mut z).unwrap();
        wait(&near.record_event(None).unwrap());
        far.memcpy_dtod(&x, &mut y).unwrap();
        assert!(stays_away(&far.record_event(None).unwrap()));
        assert_eq!(bench.emulator.counter("peer_copies:1"), 1);
        std::process::exit(0); // to free the memory would wait for the copy
    });
}

#[test]
fn copies_between_devices_fail_or_bring_something_else() {
    for plan in ["peer_copy_error", "peer_copy_garbage", "peer_copy_error@0"] {
        let Some(bench) = planned(plan) else { return };
        let [near, far] = [0, 1].map(|device| bench.device(device).new_stream().unwrap());
        let x = near.clone_htod(&[1.0f32; 4]).unwrap();
        let mut y = far.alloc_zeros::<f32>(4).unwrap();
        let answer = far.memcpy_dtod(&x, &mut y);
        if plan == "peer_copy_error" {
            assert_error(answer, CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
        } else {
            answer.unwrap();
        }
        let arrived = far.clone_dtoh(&y).unwrap() == [1.0; 4];
        assert_eq!(arrived, plan == "peer_copy_error@0", "{plan}");
    }
}

#[test]
fn a_plan_that_is_none_ends_the_process() {
    let name = "faults::a_plan_that_is_none_ends_the_process";
    if std::env::var_os("PLAN").is_some() {
        planned(&std::env::var("PLAN").unwrap()).unwrap();
        return;
    }
    if crate::cuda_emulator::Emulator::build().is_none() {
        return;
    }
    for plan in [
        "launch:1",
        "nccl_hang",
        "bogus:1",
        "allocation:1@x",
        "nan:add:",
    ] {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env("PLAN", plan)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stderr);
        assert!(!child.status.success(), "{plan}");
        assert!(said.contains(&format!("{plan} is none of")), "{said}");
    }
}
