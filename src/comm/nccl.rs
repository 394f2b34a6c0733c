//! GPU stages that exchange by NCCL, one rank per GPU.
//!
//! Each flow has a communicator and a stream of its own, on which its groups run in order, so that the
//! two flows do not wait for each other and both hide behind what is computed. Both communicators are
//! non-blocking: every call that NCCL finishes later is polled, and an abort frees the GPU.

use std::cell::Cell;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cudarc::nccl::sys::{self, ncclResult_t};

use super::{CommError, Flow, Mailbox, Parcel, Room, Transport};
use crate::backend::cuda::{Cuda, CudaBuffer, CudaError, Event, NcclLibrary, SideStream};
use crate::backend::{Backend, BackendError, Plain, Pulse};

/// How often a wait for the library looks again.
const NAP: Duration = Duration::from_micros(100);

/// Blocks of the GPU that a transfer may take. A receive that waits for its sender takes them away from
/// what is computed meanwhile, and four move what PCIe can.
const MAX_CTAS: i32 = 4;

/// `NCCL_CONFIG_UNDEF_INT`, and the magic number of `NCCL_CONFIG_INITIALIZER`, of nccl.h.
const UNDEFINED: i32 = i32::MIN;
const MAGIC: u32 = 0xcafe_beef;
/// The version whose configuration is filled in below: 2.24.
const CONFIG_VERSION: u32 = 22_400;

/// Words on the device for the first exchange: the one that is sent, and those from both neighbours.
pub const WORDS: usize = 3;

/// The two communicators' ids, the same on all ranks.
#[derive(Clone, Copy)]
struct Ids {
    forward: sys::ncclUniqueId,
    backward: sys::ncclUniqueId,
}

/// One rank.
pub struct Nccl {
    rank: usize,
    stages: usize,
    nccl: &'static NcclLibrary,
    ids: Ids,
    links: Option<[Link; 2]>,
}

// SAFETY: `links` is made by `start`, on the worker's own thread, and never leaves it; before, there is
// nothing in here that is bound to a thread.
unsafe impl Send for Nccl {}

/// A communicator with its stream.
struct Link {
    rank: usize,
    nccl: &'static NcclLibrary,
    communicator: sys::ncclComm_t,
    /// The same for who watches it, as long as it lives.
    watched: Rc<Cell<sys::ncclComm_t>>,
    stream: SideStream,
    /// Behind what was computed when the last group was posted.
    computed: Event,
    /// Behind the last group.
    done: Event,
    pulse: Arc<Pulse>,
}

/// The ranks of a run of `stages` stages.
///
/// # Errors
/// NCCL cannot make a communicator's id.
pub fn connect(nccl: &'static NcclLibrary, stages: usize) -> Result<Vec<Nccl>, CommError> {
    let id = || {
        let mut id = MaybeUninit::zeroed();
        // SAFETY: writes one id; of its bytes every pattern is valid.
        let (answer, id) = unsafe {
            let answer = (nccl.get_unique_id)(id.as_mut_ptr());
            (answer, id.assume_init())
        };
        match answer {
            ncclResult_t::ncclSuccess => Ok(id),
            code => {
                let nobody = std::ptr::null_mut();
                Err(failed(nccl, 0, "ncclGetUniqueId", code, nobody))
            }
        }
    };
    let ids = Ids {
        forward: id()?,
        backward: id()?,
    };
    let rank = |rank| Nccl {
        rank,
        stages,
        nccl,
        ids,
        links: None,
    };
    Ok((0..stages).map(rank).collect())
}

fn failed(
    nccl: &NcclLibrary,
    rank: usize,
    call: &'static str,
    code: ncclResult_t,
    communicator: sys::ncclComm_t,
) -> BackendError {
    // SAFETY: both functions return a string of the library's or the communicator's, or null; the
    // communicator is null or alive.
    let (meaning, detail) = unsafe {
        (
            text((nccl.get_error_string)(code)),
            text((nccl.get_last_error)(communicator)),
        )
    };
    let reason = match detail.is_empty() {
        true => meaning,
        false => format!("{meaning}: {detail}"),
    };
    BackendError::Cuda(CudaError::Nccl {
        rank,
        call,
        reason,
        remote: code == ncclResult_t::ncclRemoteError,
    })
}

/// What the library says of a communicator now.
///
/// # Safety
/// The communicator is alive.
unsafe fn state(nccl: &NcclLibrary, communicator: sys::ncclComm_t) -> ncclResult_t {
    let mut state = ncclResult_t::ncclSuccess;
    // SAFETY: the caller's promise; writes one value.
    match unsafe { (nccl.comm_get_async_error)(communicator, &mut state) } {
        ncclResult_t::ncclSuccess => state,
        code => code,
    }
}

/// # Safety
/// `words` is null or ends with a zero.
unsafe fn text(words: *const std::ffi::c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    let words = unsafe { CStr::from_ptr(words) };
    words.to_string_lossy().trim().to_owned()
}

impl Link {
    fn open(
        cuda: &Cuda,
        nccl: &'static NcclLibrary,
        (rank, stages): (usize, usize),
        id: sys::ncclUniqueId,
        pulse: &Arc<Pulse>,
    ) -> Result<Self, CommError> {
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: MAX_CTAS,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
        };
        let mut link = Link {
            rank,
            nccl,
            communicator: std::ptr::null_mut(),
            watched: Rc::new(Cell::new(std::ptr::null_mut())),
            stream: cuda.side_stream()?,
            computed: cuda.event()?,
            done: cuda.event()?,
            pulse: Arc::clone(pulse),
        };
        // SAFETY: `config` and the communicator's place live during the call; the context of the GPU
        // is current on this thread.
        let begun = unsafe {
            let (ranks, rank) = (stages as i32, rank as i32);
            let communicator = &raw mut link.communicator;
            (nccl.comm_init_rank_config)(communicator, ranks, id, rank, &mut config)
        };
        link.finish(cuda, "ncclCommInitRankConfig", begun)?;
        link.watch(cuda);
        Ok(link)
    }

    /// Lets every wait for the GPU notice an error of a transfer, which no event tells of.
    fn watch(&self, cuda: &Cuda) {
        self.watched.set(self.communicator);
        let (watched, nccl, rank) = (Rc::clone(&self.watched), self.nccl, self.rank);
        cuda.watch(move || {
            let communicator = watched.get();
            if communicator.is_null() {
                return Ok(());
            }
            // SAFETY: a communicator that has ended is watched no more.
            match unsafe { state(nccl, communicator) } {
                ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress => Ok(()),
                code => Err(failed(nccl, rank, "a transfer", code, communicator)),
            }
        });
    }

    /// Polls until the library has finished what it has begun.
    fn finish(
        &self,
        cuda: &Cuda,
        call: &'static str,
        begun: ncclResult_t,
    ) -> Result<(), CommError> {
        let mut state = begun;
        loop {
            match state {
                ncclResult_t::ncclSuccess => return Ok(()),
                ncclResult_t::ncclInProgress => {}
                code => {
                    let (rank, communicator) = (self.rank, self.communicator);
                    return Err(failed(self.nccl, rank, call, code, communicator).into());
                }
            }
            cuda.glance()?;
            std::thread::sleep(NAP);
            state = self.state();
        }
    }

    /// What the library says of the communicator now.
    fn state(&self) -> ncclResult_t {
        // SAFETY: the communicator lives as long as the link.
        unsafe { state(self.nccl, self.communicator) }
    }

    /// Posts one group behind everything computed so far.
    fn group(
        &self,
        cuda: &Cuda,
        queue: impl FnOnce() -> Result<(), (&'static str, ncclResult_t)>,
    ) -> Result<(), CommError> {
        // A transfer under way may have run into an error.
        self.finish(cuda, "a transfer", self.state())?;
        cuda.record(&self.computed)?;
        self.stream.wait(&self.computed)?;
        // SAFETY: start and end of a group on one thread. A group that was begun is ended whatever
        // happened inside.
        let (queued, ended) = unsafe {
            (self.nccl.group_start)();
            let queued = queue();
            (queued, (self.nccl.group_end)())
        };
        if let Err((call, code)) = queued {
            self.finish(cuda, call, code)?;
        }
        self.finish(cuda, "ncclGroupEnd", ended)?;
        Ok(self.stream.record(&self.done)?)
    }

    /// Exchanges a word with both neighbours of the ring. NCCL connects two ranks when both have
    /// called for their first transfer, and the call is not finished before: without this, a receive
    /// that is posted long before its send would hold up its stage, and the other would wait for it.
    fn greet(&self, cuda: &Cuda, words: &CudaBuffer<f32>, stages: usize) -> Result<(), CommError> {
        let mut neighbours = vec![(self.rank + 1) % stages, (self.rank + stages - 1) % stages];
        neighbours.dedup();
        let at = cuda.place(words).pointer();
        let bytes = size_of::<f32>();
        self.group(cuda, || {
            for (place, &peer) in (1..).zip(&neighbours) {
                self.queue_send(peer, at, bytes)?;
                self.queue_recv(peer, at + place * bytes as u64, bytes)?;
            }
            Ok(())
        })?;
        self.await_group(cuda)
    }

    /// Lets what is computed from here on wait for the last group.
    fn await_group(&self, cuda: &Cuda) -> Result<(), CommError> {
        Ok(cuda.wait(&self.done)?)
    }

    fn queue_send(&self, peer: usize, at: u64, bytes: usize) -> Queued {
        // SAFETY: the place holds that many bytes until the group is done: the worker overwrites it
        // behind `await_group` only.
        let answer = unsafe {
            (self.nccl.send)(
                at as *const _,
                bytes,
                sys::ncclDataType_t::ncclUint8,
                peer as i32,
                self.communicator,
                self.stream.raw().cast(),
            )
        };
        queued("ncclSend", answer)
    }

    fn queue_recv(&self, peer: usize, at: u64, bytes: usize) -> Queued {
        // SAFETY: the place has room for that many bytes, which nobody uses until the group is done.
        let answer = unsafe {
            (self.nccl.recv)(
                at as *mut _,
                bytes,
                sys::ncclDataType_t::ncclUint8,
                peer as i32,
                self.communicator,
                self.stream.raw().cast(),
            )
        };
        queued("ncclRecv", answer)
    }

    /// The sum over all ranks, in place.
    fn queue_sum(&self, at: u64, len: usize) -> Queued {
        // SAFETY: the place holds `len` values, which nobody uses until the group is done.
        let answer = unsafe {
            (self.nccl.all_reduce)(
                at as *const _,
                at as *mut _,
                len,
                sys::ncclDataType_t::ncclFloat32,
                sys::ncclRedOp_t::ncclSum,
                self.communicator,
                self.stream.raw().cast(),
            )
        };
        queued("ncclAllReduce", answer)
    }
}

/// What became of a call inside a group.
type Queued = Result<(), (&'static str, ncclResult_t)>;

fn queued(call: &'static str, answer: ncclResult_t) -> Queued {
    match answer {
        ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress => Ok(()),
        code => Err((call, code)),
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.communicator.is_null() {
            return;
        }
        self.watched.set(std::ptr::null_mut());
        // A communicator with transfers that nobody answers any more would keep the GPU busy for ever.
        let broken = self.pulse.is_stopped() || self.state() != ncclResult_t::ncclSuccess;
        // SAFETY: made by `open`, used by nobody after this. The library finishes by itself what these
        // calls begin; an error has nobody left to hear it.
        unsafe {
            match broken {
                true => (self.nccl.comm_abort)(self.communicator),
                false => (self.nccl.comm_destroy)(self.communicator),
            };
        }
    }
}

impl Nccl {
    fn link(&self, flow: Flow) -> Result<&Link, CommError> {
        let links = self.links.as_ref().ok_or(CommError::NotStarted)?;
        Ok(&links[flow as usize])
    }
}

impl Transport<Cuda> for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn stages(&self) -> usize {
        self.stages
    }

    fn start(&mut self, cuda: &Cuda, pulse: &Arc<Pulse>, _: Room) -> Result<(), CommError> {
        let place = (self.rank, self.stages);
        let open = |id| Link::open(cuda, self.nccl, place, id, pulse);
        let links = [open(self.ids.forward)?, open(self.ids.backward)?];
        let words = cuda.zeros(WORDS)?;
        for link in &links {
            link.greet(cuda, &words, self.stages)?;
        }
        self.links = Some(links);
        Ok(())
    }

    fn exchange<T: Plain>(
        &mut self,
        cuda: &Cuda,
        mail: &mut Mailbox<Cuda, T>,
        send: Option<Parcel>,
        receive: Option<Parcel>,
    ) -> Result<(), CommError> {
        let link = self.link(mail.flow)?;
        let (from, into) = (cuda.place(&mail.outgoing), cuda.place(&mail.incoming));
        link.group(cuda, || {
            if let Some(Parcel { peer, len }) = send {
                link.queue_send(peer, from.pointer(), len * size_of::<T>())?;
            }
            if let Some(Parcel { peer, len }) = receive {
                link.queue_recv(peer, into.pointer(), len * size_of::<T>())?;
            }
            Ok(())
        })?;
        mail.awaited = receive;
        Ok(())
    }

    fn arrived<T: Plain>(
        &mut self,
        cuda: &Cuda,
        mail: &mut Mailbox<Cuda, T>,
    ) -> Result<(), CommError> {
        match mail.awaited.take() {
            Some(_) => self.link(mail.flow)?.await_group(cuda),
            None => Ok(()),
        }
    }

    fn sent<T: Plain>(
        &mut self,
        cuda: &Cuda,
        mail: &mut Mailbox<Cuda, T>,
    ) -> Result<(), CommError> {
        self.link(mail.flow)?.await_group(cuda)
    }

    fn trade(
        &mut self,
        cuda: &Cuda,
        peer: usize,
        ours: &CudaBuffer<f32>,
        theirs: &mut CudaBuffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        let link = self.link(Flow::Forward)?;
        let (from, into) = (cuda.place(ours), cuda.place(theirs));
        let bytes = len * size_of::<f32>();
        link.group(cuda, || {
            link.queue_send(peer, from.pointer(), bytes)?;
            link.queue_recv(peer, into.pointer(), bytes)
        })?;
        link.await_group(cuda)
    }

    fn all_reduce_sum(
        &mut self,
        cuda: &Cuda,
        x: &mut CudaBuffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        let link = self.link(Flow::Forward)?;
        let at = cuda.place(x).pointer();
        link.group(cuda, || link.queue_sum(at, len))?;
        link.await_group(cuda)
    }
}
