//! Streams run late: what was not waited for is not done.

use std::sync::Arc;

use cudarc::driver::sys::CUresult::CUDA_ERROR_INVALID_HANDLE;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, LaunchConfig, PushKernelArg, result};

use crate::gpu::{assert_error, bench, kernel};

const ADD: &str = "#include \"common.cuh\"\nKERNEL __launch_bounds__(32) add(float* x, float value) { x[threadIdx.x] += value; }\n";

/// Adds a number to 32 floats.
pub struct Adder {
    pub context: Arc<CudaContext>,
    function: cudarc::driver::CudaFunction,
}

impl Adder {
    pub fn new(context: Arc<CudaContext>) -> Self {
        let function = kernel(&context, ADD, "add");
        Adder { context, function }
    }

    pub fn add(&self, stream: &Arc<CudaStream>, x: &mut CudaSlice<f32>, value: f32) {
        let mut launch = stream.launch_builder(&self.function);
        launch.arg(x).arg(&value);
        let geometry = LaunchConfig {
            grid_dim: (1, 1, 1),
            block_dim: (32, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are those of the kernel.
        unsafe { launch.launch(geometry) }.unwrap();
    }
}

#[test]
fn a_missing_wait_between_streams_is_found() {
    for (streams, waits, expected) in [
        ("late", false, 1.0),
        ("late", true, 3.0),
        ("early", false, 3.0),
    ] {
        let Some(bench) = bench(&[("EMULATOR_STREAMS", streams)]) else {
            return;
        };
        let adder = Adder::new(bench.device(0));
        let [first, second] = [0, 1].map(|_| adder.context.new_stream().unwrap());
        let mut x = first.alloc_zeros::<f32>(32).unwrap();
        first.synchronize().unwrap();
        adder.add(&first, &mut x, 2.0);
        if waits {
            second.join(&first).unwrap();
        }
        adder.add(&second, &mut x, 1.0);
        assert_eq!(second.clone_dtoh(&x).unwrap(), [expected; 32], "{streams}");
    }
}

#[test]
fn a_wait_holds_across_devices() {
    let Some(bench) = bench(&[]) else { return };
    let (near, far) = (Adder::new(bench.device(0)), Adder::new(bench.device(1)));
    let (from, to) = (
        near.context.new_stream().unwrap(),
        far.context.new_stream().unwrap(),
    );
    let mut x = from.alloc_zeros::<f32>(32).unwrap();
    near.add(&from, &mut x, 5.0);
    let done = from.record_event(None).unwrap();
    let mut y = to.alloc_zeros::<f32>(32).unwrap();
    to.wait(&done).unwrap();
    to.memcpy_dtod(&x, &mut y).unwrap();
    far.add(&to, &mut y, 1.0);
    assert_eq!(to.clone_dtoh(&y).unwrap(), [6.0; 32]);
}

#[test]
fn host_memory_is_read_when_the_driver_reads_it() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(0);
    let stream = context.new_stream().unwrap();
    let mut x = stream.alloc_zeros::<f32>(4).unwrap();

    // Pageable memory is read during the call.
    let mut pageable = vec![1.0f32; 4];
    stream.memcpy_htod(&pageable, &mut x).unwrap();
    pageable.fill(2.0);
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [1.0; 4]);

    // Pinned memory is read and written when the stream gets there.
    // SAFETY: written before it is read.
    let mut pinned = unsafe { context.alloc_pinned::<f32>(4) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(3.0);
    stream.memcpy_htod(&pinned, &mut x).unwrap();
    pinned.as_mut_slice().unwrap().fill(4.0);
    assert_eq!(stream.clone_dtoh(&x).unwrap(), [4.0; 4]);
}

#[test]
fn the_default_stream_keeps_order_with_streams_that_want_it() {
    let Some(bench) = bench(&[]) else { return };
    let adder = Adder::new(bench.device(0));
    adder.context.bind_to_thread().unwrap();
    let default = adder.context.default_stream();
    for (blocking, kind, expected) in [
        (true, result::stream::StreamKind::Default, 7.0),
        (false, result::stream::StreamKind::NonBlocking, 6.0),
    ] {
        let mut x = default.alloc_zeros::<f32>(32).unwrap();
        default.synchronize().unwrap();
        let raw = result::stream::create(kind).unwrap();
        // Sets all to 1.0 in the stream, then adds 6 in the default stream.
        let at = {
            use cudarc::driver::DevicePtr;
            x.device_ptr(&default).0
        };
        let one = [1.0f32; 32];
        // SAFETY: the range lies inside the allocation.
        unsafe { result::memcpy_htod_async(at, &one, raw) }.unwrap();
        adder.add(&default, &mut x, 6.0);
        assert_eq!(
            default.clone_dtoh(&x).unwrap(),
            [expected; 32],
            "{blocking}"
        );
        // SAFETY: made above, used by nobody else.
        unsafe { result::stream::destroy(raw) }.unwrap();
    }
}

#[test]
fn events_answer_questions_and_measure_time() {
    let Some(bench) = bench(&[]) else { return };
    let adder = Adder::new(bench.device(0));
    let stream = adder.context.new_stream().unwrap();
    let timed = Some(cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT);
    let mut x = stream.alloc_zeros::<f32>(32).unwrap();
    let start = stream.record_event(timed).unwrap();
    adder.add(&stream, &mut x, 1.0);
    let end = stream.record_event(timed).unwrap();
    assert!(!end.is_complete());
    assert!((0..10).any(|_| end.is_complete()));
    assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
}

#[test]
fn what_a_program_did_is_counted() {
    let Some(bench) = bench(&[]) else { return };
    let adder = Adder::new(bench.device(0));
    let stream = adder.context.new_stream().unwrap();
    bench.emulator.reset_counters();
    let mut x = stream.alloc_zeros::<f32>(1024).unwrap();
    for _ in 0..3 {
        adder.add(&stream, &mut x, 1.0);
    }
    stream.synchronize().unwrap();
    let counter = |name: &str| bench.emulator.counter(name);
    assert_eq!(counter("allocations"), 1);
    assert_eq!(counter("live_bytes"), 4096);
    assert_eq!(counter("peak_bytes"), 4096);
    assert_eq!(counter("launches"), 3);
    assert_eq!(counter("launch:add"), 3);
    assert_eq!(counter("synchronisations"), 1);
    stream.clone_dtoh(&x).unwrap();
    assert_eq!(counter("copy_to_host"), 1);
    assert_eq!(counter("copy_to_host_bytes"), 4096);
    assert!(counter("synchronisations") > 1);
    drop(x);
    stream.synchronize().unwrap();
    assert_eq!(counter("live_bytes"), 0);
}

#[test]
fn streams_and_kernels_of_different_contexts_do_not_mix() {
    let Some(bench) = bench(&[]) else { return };
    let (one, two) = (bench.device(0), bench.device(1));
    let function = kernel(&one, ADD, "add");
    let stream = two.new_stream().unwrap();
    let mut x = stream.alloc_zeros::<f32>(32).unwrap();
    let mut launch = stream.launch_builder(&function);
    launch.arg(&mut x).arg(&1.0f32);
    // SAFETY: the driver refuses it.
    let answer = unsafe { launch.launch(LaunchConfig::for_num_elems(32)) };
    assert_error(answer, CUDA_ERROR_INVALID_HANDLE);
}
