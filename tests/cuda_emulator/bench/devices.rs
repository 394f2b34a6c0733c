//! Several devices and several host threads; what is counted for each; red zones.

use std::sync::Arc;
use std::sync::mpsc::channel;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};

use crate::gpu::{bench, in_a_child, kernel};
use crate::ranks::wait;
use crate::streams::Adder;

#[test]
fn threads_pass_work_on_by_events() {
    for streams in ["late", "early"] {
        for devices in [[0, 1], [0, 0]] {
            let Some(bench) = bench(&[("EMULATOR_STREAMS", streams)]) else {
                return;
            };
            // The second thread waits for events of work that the first never asks about.
            let (work, inbox) = channel();
            let seen = std::thread::scope(|scope| {
                let (bench, sender) = (&bench, bench.device(devices[0]));
                scope.spawn(move || {
                    let adder = Adder::new(sender);
                    let stream = adder.context.new_stream().unwrap();
                    for round in 0..8 {
                        let mut x = stream.alloc_zeros::<f32>(32).unwrap();
                        adder.add(&stream, &mut x, round as f32);
                        let done = stream.record_event(None).unwrap();
                        work.send((x, done)).unwrap();
                    }
                });
                let receiver = scope.spawn(move || {
                    let adder = Adder::new(bench.device(devices[1]));
                    let (compute, copies) = (
                        adder.context.new_stream().unwrap(),
                        adder.context.new_stream().unwrap(),
                    );
                    let mut sums = Vec::new();
                    for (x, done) in inbox {
                        let mut y = copies.alloc_zeros::<f32>(32).unwrap();
                        copies.wait(&done).unwrap();
                        copies.memcpy_dtod(&x, &mut y).unwrap();
                        compute.join(&copies).unwrap();
                        adder.add(&compute, &mut y, 0.5);
                        wait(&compute.record_event(None).unwrap());
                        sums.push(compute.clone_dtoh(&y).unwrap()[31]);
                    }
                    sums
                });
                receiver.join().unwrap()
            });
            let expected: Vec<f32> = (0..8).map(|round| round as f32 + 0.5).collect();
            assert_eq!(seen, expected, "{streams} {devices:?}");
        }
    }
}

#[test]
fn devices_work_side_by_side() {
    for streams in ["late", "early"] {
        let settings = [("EMULATOR_DEVICES", "4"), ("EMULATOR_STREAMS", streams)];
        let Some(bench) = bench(&settings) else {
            return;
        };
        let add_up = |device: usize| {
            let adder = Adder::new(bench.device(device));
            let stream = adder.context.new_stream().unwrap();
            let mut x = stream.alloc_zeros::<f32>(32).unwrap();
            for i in 0..200 {
                adder.add(&stream, &mut x, i as f32);
            }
            stream.clone_dtoh(&x).unwrap()
        };
        std::thread::scope(|scope| {
            let threads = [0, 1, 2, 3, 0, 1].map(|device| scope.spawn(move || add_up(device)));
            for thread in threads {
                assert_eq!(thread.join().unwrap(), [19_900.0; 32]);
            }
        });
    }
}

fn enable(from: &Arc<CudaContext>, to: &Arc<CudaContext>) -> CUresult {
    from.bind_to_thread().unwrap();
    // SAFETY: both contexts are alive.
    unsafe { sys::cuCtxEnablePeerAccess(to.cu_ctx(), 0) }
}

#[test]
fn without_peer_access_copies_still_arrive() {
    for (peers, expected) in [
        ("1", CUresult::CUDA_SUCCESS),
        ("0", CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED),
    ] {
        let Some(bench) = bench(&[("EMULATOR_PEERS", peers)]) else {
            return;
        };
        let [near, far] = [0, 1].map(|device| bench.device(device));
        let mut can = 7;
        // SAFETY: the place lives during the call.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, 0, 1) }
            .result()
            .unwrap();
        assert_eq!(can, i32::from(peers == "1"));
        assert_eq!(enable(&near, &far), expected);
        if peers == "1" {
            assert_eq!(
                enable(&near, &far),
                CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
            );
        }
        let [near, far] = [near, far].map(|context| context.new_stream().unwrap());
        let x = near.clone_htod(&[3.0f32; 8]).unwrap();
        let mut y = far.alloc_zeros::<f32>(8).unwrap();
        far.memcpy_dtod(&x, &mut y).unwrap();
        assert_eq!(far.clone_dtoh(&y).unwrap(), [3.0; 8]);
    }
}

#[test]
fn copies_find_out_where_their_ranges_lie() {
    use cudarc::driver::DevicePtr;
    let Some(bench) = bench(&[]) else { return };
    let [near, far] = [0, 1].map(|device| bench.device(device).new_stream().unwrap());
    let x = near.alloc_zeros::<f32>(4).unwrap();
    let y = far.alloc_zeros::<f32>(4).unwrap();
    near.synchronize().unwrap();
    let (x_at, y_at) = (x.device_ptr(&near).0, y.device_ptr(&far).0);
    let (values, mut back) = ([5.0f32; 4], [0.0f32; 4]);
    near.context().bind_to_thread().unwrap();
    let copies = [
        (x_at, values.as_ptr() as u64),
        (y_at, x_at),
        (back.as_mut_ptr() as u64, y_at),
    ];
    for (to, from) in copies {
        // SAFETY: both ranges have 16 bytes.
        unsafe { sys::cuMemcpyAsync(to, from, 16, near.cu_stream()) }
            .result()
            .unwrap();
    }
    assert_eq!(back, values);
    // SAFETY: the driver refuses it.
    let answer = unsafe { sys::cuMemcpyAsync(values.as_ptr() as u64, x_at, 17, near.cu_stream()) };
    assert_eq!(answer, CUresult::CUDA_ERROR_INVALID_VALUE);
    let [near, far] = [near.context(), far.context()].map(|context| context.cu_ctx());
    // SAFETY: the driver refuses it: the contexts are the wrong way round.
    let answer = unsafe { sys::cuMemcpyPeerAsync(x_at, far, y_at, near, 16, std::ptr::null_mut()) };
    assert_eq!(answer, CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn each_device_has_its_counters() {
    let Some(bench) = bench(&[]) else { return };
    let [near, far] = [0, 1].map(|device| Adder::new(bench.device(device)));
    bench.emulator.reset_counters();
    let [first, second] = [&near, &far].map(|adder| adder.context.new_stream().unwrap());
    let mut x = first.alloc_zeros::<f32>(1024).unwrap();
    let mut y = second.alloc_zeros::<f32>(2048).unwrap();
    near.add(&first, &mut x, 1.0);
    far.add(&second, &mut y, 1.0);
    far.add(&second, &mut y, 1.0);
    second.memcpy_dtod(&x, &mut y).unwrap();
    second.synchronize().unwrap();
    for (name, expected) in [
        ("allocations", 2),
        ("allocations:0", 1),
        ("allocations:1", 1),
        ("live_bytes", 12_288),
        ("live_bytes:0", 4096),
        ("live_bytes:1", 8192),
        ("peak_bytes:0", 4096),
        ("peak_bytes:1", 8192),
        ("launches:0", 1),
        ("launches:1", 2),
        ("launch:add", 3),
        ("peer_copies", 1),
        ("peer_copies:1", 1),
        ("peer_copy_bytes:1", 4096),
        ("copy_on_device", 0),
        ("fills:1", 1),
        ("synchronisations:1", 1),
        ("damaged_red_zones", 0),
    ] {
        assert_eq!(bench.emulator.counter(name), expected, "{name}");
    }
}

const STRAY: &str = "#include \"common.cuh\"\nKERNEL stray(float* x, int at) { x[at] = 1.0f; }\n";

/// Writes one float of an allocation of 6 floats, or beside it.
fn write_at(context: &Arc<CudaContext>, at: i32) -> cudarc::driver::CudaSlice<f32> {
    let stream = context.default_stream();
    let function = kernel(context, STRAY, "stray");
    let mut x = stream.alloc_zeros::<f32>(6).unwrap();
    let mut launch = stream.launch_builder(&function);
    launch.arg(&mut x).arg(&at);
    let one = LaunchConfig {
        grid_dim: (1, 1, 1),
        block_dim: (1, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: what is written lies in the allocation or in its red zones, which is what is tested.
    unsafe { launch.launch(one) }.unwrap();
    stream.synchronize().unwrap();
    x
}

#[test]
fn writes_beside_an_allocation_are_found_when_it_is_freed() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(1);
    let mut expected = 0;
    for (at, stray) in [(0, 0), (5, 0), (6, 1), (-1, 1), (100, 1), (-128, 1)] {
        drop(write_at(&context, at));
        context.synchronize().unwrap();
        expected += stray;
        let counter = |name| bench.emulator.counter(name);
        assert_eq!(counter("damaged_red_zones"), expected, "{at}");
        assert_eq!(counter("damaged_red_zones:1"), expected, "{at}");
    }
}

#[test]
fn writes_beside_an_allocation_are_found_at_exit() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.json");
    let name = "devices::writes_beside_an_allocation_are_found_at_exit";
    let said = in_a_child(
        name,
        &[("EMULATOR_REPORT", report.to_str().unwrap())],
        || {
            let bench = bench(&[("EMULATOR_QUIET", "0")]).unwrap();
            let context = bench.device(1);
            std::mem::forget(write_at(&context, 7));
            std::mem::forget(context);
        },
    );
    let Some(said) = said else { return };
    let expected =
        "device 1: 4 bytes behind an allocation of 24 bytes were written, the nearest 4 from it";
    assert!(said.contains(expected), "{said}");
    let report = std::fs::read_to_string(report).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["damaged_red_zones"], 1);
    assert_eq!(report["live_bytes:1"], 24);
}
