//! Ranks on pretend GPUs: one host thread each, as the trainer has them.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use cudarc::nccl::result::{self, NcclError, NcclStatus};
use cudarc::nccl::sys::{
    self, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId,
};

use crate::gpu::Bench;

/// What NCCL answers with: `Ok` for success and in progress.
pub type Answer = Result<NcclStatus, NcclError>;

/// One rank: its device, a stream for kernels, one for transfers, and its communicator.
pub struct Rank {
    pub rank: usize,
    pub context: Arc<CudaContext>,
    pub compute: Arc<CudaStream>,
    pub transfers: Arc<CudaStream>,
    pub communicator: ncclComm_t,
}

/// A communicator that does not block, in progress until all ranks of the id are there.
pub fn join(id: ncclUniqueId, rank: usize, ranks: usize) -> (ncclComm_t, Answer) {
    // SAFETY: integers and pointers, for which zeros are values.
    let mut config: ncclConfig_t = unsafe { std::mem::zeroed() };
    config.size = size_of::<ncclConfig_t>();
    config.magic = 0xcafe_beef;
    config.version = 23_000;
    config.blocking = 0;
    let mut communicator = std::ptr::null_mut();
    // SAFETY: both live during the call.
    let answer = unsafe {
        result::comm_init_rank_config(
            &mut communicator,
            ranks as i32,
            id,
            rank as i32,
            &mut config,
        )
    };
    (communicator, answer)
}

/// How a communicator does.
pub fn state_of(communicator: ncclComm_t) -> ncclResult_t {
    let mut state = ncclResult_t::ncclSuccess;
    // SAFETY: the place lives during the call.
    let asked = unsafe { sys::ncclCommGetAsyncError(communicator, &mut state) };
    assert_eq!(asked, ncclResult_t::ncclSuccess);
    state
}

/// Asks until what is in progress has succeeded or failed.
pub fn settle(communicator: ncclComm_t) -> ncclResult_t {
    loop {
        match state_of(communicator) {
            ncclResult_t::ncclInProgress => std::thread::sleep(Duration::from_micros(100)),
            settled => return settled,
        }
    }
}

/// Asks until the event has happened.
pub fn wait(event: &CudaEvent) {
    while !event.is_complete() {
        std::thread::yield_now();
    }
}

/// Whether the event has not happened after many questions.
pub fn stays_away(event: &CudaEvent) -> bool {
    (0..30).all(|_| {
        std::thread::sleep(Duration::from_millis(1));
        !event.is_complete()
    })
}

impl Rank {
    /// Joins a communicator, and waits until it is ready.
    pub fn new(bench: &Bench, id: ncclUniqueId, rank: usize, devices: &[usize]) -> Rank {
        let context = bench.device(devices[rank]);
        context.bind_to_thread().unwrap();
        let (communicator, _) = join(id, rank, devices.len());
        assert_eq!(settle(communicator), ncclResult_t::ncclSuccess);
        Rank {
            rank,
            compute: context.new_stream().unwrap(),
            transfers: context.new_stream().unwrap(),
            context,
            communicator,
        }
    }

    pub fn floats(&self, values: &[f32]) -> CudaSlice<f32> {
        let x = self.transfers.clone_htod(values).unwrap();
        wait(&self.transfers.record_event(None).unwrap());
        x
    }

    pub fn send(&self, x: &CudaSlice<f32>, peer: usize) -> Answer {
        self.send_in(&self.transfers, x, peer)
    }

    pub fn send_in(&self, stream: &Arc<CudaStream>, x: &CudaSlice<f32>, peer: usize) -> Answer {
        let (from, _kept) = x.device_ptr(stream);
        // SAFETY: the range is that of the slice.
        unsafe {
            result::send(
                from as *const _,
                x.len(),
                ncclDataType_t::ncclFloat32,
                peer as i32,
                self.communicator,
                stream.cu_stream().cast(),
            )
        }
    }

    pub fn receive(&self, x: &mut CudaSlice<f32>, peer: usize) -> Answer {
        let stream = self.transfers.clone();
        self.receive_in(&stream, x, peer)
    }

    pub fn receive_in(
        &self,
        stream: &Arc<CudaStream>,
        x: &mut CudaSlice<f32>,
        peer: usize,
    ) -> Answer {
        let count = x.len();
        let (to, _kept) = x.device_ptr_mut(stream);
        // SAFETY: the range is that of the slice.
        unsafe {
            result::recv(
                to as *mut _,
                count,
                ncclDataType_t::ncclFloat32,
                peer as i32,
                self.communicator,
                stream.cu_stream().cast(),
            )
        }
    }

    /// The sum over all ranks, in place.
    pub fn all_reduce(&self, x: &mut CudaSlice<f32>) -> Answer {
        let count = x.len();
        let (at, _kept) = x.device_ptr_mut(&self.transfers);
        // SAFETY: the range is that of the slice.
        unsafe {
            result::all_reduce(
                at as *const _,
                at as *mut _,
                count,
                ncclDataType_t::ncclFloat32,
                ncclRedOp_t::ncclSum,
                self.communicator,
                self.transfers.cu_stream().cast(),
            )
        }
    }

    /// A first exchange with every other rank, so that they are connected: later calls wait for nobody.
    pub fn greet(&self, ranks: usize) {
        let own = self.floats(&[0.0]);
        let mut theirs = self.floats(&[0.0]);
        grouped(|| {
            for peer in (0..ranks).filter(|&peer| peer != self.rank) {
                self.send(&own, peer).unwrap();
                self.receive(&mut theirs, peer).unwrap();
            }
        })
        .unwrap();
        wait(&self.launched());
    }

    /// Waits until NCCL has launched what it was given, and marks the end of it.
    pub fn launched(&self) -> CudaEvent {
        assert_eq!(settle(self.communicator), ncclResult_t::ncclSuccess);
        self.transfers.record_event(None).unwrap()
    }

    pub fn read(&self, x: &CudaSlice<f32>) -> Vec<f32> {
        self.transfers.clone_dtoh(x).unwrap()
    }

    pub fn abort(&self) {
        // SAFETY: made by `join`, not used afterwards but to be refused.
        unsafe { result::comm_abort(self.communicator) }.unwrap();
    }

    /// Ends the communicator in order.
    pub fn leave(&self) {
        // SAFETY: made by `join`, not used afterwards.
        unsafe {
            result::comm_finalize(self.communicator).unwrap();
            assert_eq!(settle(self.communicator), ncclResult_t::ncclSuccess);
            result::comm_destroy(self.communicator).unwrap();
        }
    }
}

/// Both sides of an exchange in one group.
pub fn grouped(operations: impl FnOnce()) -> Answer {
    result::group_start().unwrap();
    operations();
    result::group_end()
}

/// Runs one thread per entry of `devices`, as ranks of one communicator; what they return, by rank.
pub fn on_ranks<T: Send>(
    bench: &Bench,
    devices: &[usize],
    work: impl Fn(&Rank) -> T + Sync,
) -> Vec<T> {
    let id = result::get_uniqueid().unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..devices.len())
            .map(|rank| {
                let work = &work;
                scope.spawn(move || work(&Rank::new(bench, id, rank, devices)))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}
