//! GPU stages as threads of one process that copy from each other's memory, ordered by events.
//!
//! A sender says where its message lies and which event completes it; the receiver queues the copy on a
//! stream of its own and answers with the event behind it. Host threads wait for such notes only, never
//! for a GPU. Several stages may share a GPU.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, unbounded};

use super::{CommError, Flow, Mailbox, Parcel, Room, Transport};
use crate::backend::cuda::{Cuda, CudaBuffer, DevicePlace, Event, SideStream};
use crate::backend::{Backend, Plain, Pulse};

/// How often a wait for a note looks at the GPU and at whether it is to give up.
const GLANCE: Duration = Duration::from_millis(1);

/// Buffers on the device for sums over all stages: the sum, and the part of one stage.
pub const SUMS: usize = 2;

/// What notes are about. Lanes do not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Forward,
    Backward,
    Whole,
}

const LANES: usize = 3;

impl From<Flow> for Lane {
    fn from(flow: Flow) -> Self {
        match flow {
            Flow::Forward => Lane::Forward,
            Flow::Backward => Lane::Backward,
        }
    }
}

/// A message that lies ready in the memory of its sender.
struct Ready {
    bytes: usize,
    at: DevicePlace,
    /// Behind what computes it.
    complete: Arc<Event>,
}

/// What one worker tells another.
enum Note {
    Ready(Lane, Ready),
    /// The copy of the message of that lane is queued, and this event is behind it.
    Taken(Lane, Arc<Event>),
}

/// A receive that was posted and whose copy is not queued yet.
struct Posted {
    peer: usize,
    bytes: usize,
    into: DevicePlace,
}

/// What one stage has heard from another and not used yet.
#[derive(Default)]
struct Heard {
    ready: [VecDeque<Ready>; LANES],
    taken: [VecDeque<Arc<Event>>; LANES],
    gone: bool,
}

/// One stage's ends of the channels to and from every other stage, and its copies.
pub struct PeerCopy {
    rank: usize,
    to: Vec<Sender<Note>>,
    from: Vec<Receiver<Note>>,
    heard: Vec<Heard>,
    /// The stage that has not taken the last message of a lane.
    untaken: [Option<usize>; LANES],
    posted: [Option<Posted>; LANES],
    copies: Option<Copies>,
}

/// Made on the worker's thread.
struct Copies {
    stream: SideStream,
    /// Behind the message that was computed last, per lane. Recorded again only when the receiver of
    /// the last one has queued its wait.
    complete: [Arc<Event>; LANES],
    /// Behind the last use of the buffer that is copied into, per lane.
    vacant: [Event; LANES],
    /// Behind the last copy, per lane. Recorded again only when the sender has queued its wait: it
    /// sends the next message of the lane after that.
    copied: [Arc<Event>; LANES],
    /// Behind the last copy of a sum's parts from each stage.
    part_copied: Vec<Arc<Event>>,
    sum: CudaBuffer<f32>,
    part: CudaBuffer<f32>,
}

// SAFETY: `copies` is made by `start`, on the worker's own thread, and never leaves it; before, there is
// nothing in here that is bound to a thread.
unsafe impl Send for PeerCopy {}

/// The transports of `stages` stages, connected with each other.
pub fn connect(stages: usize) -> Vec<PeerCopy> {
    let mut ends: Vec<PeerCopy> = (0..stages)
        .map(|rank| PeerCopy {
            rank,
            to: Vec::with_capacity(stages),
            from: Vec::with_capacity(stages),
            heard: (0..stages).map(|_| Heard::default()).collect(),
            untaken: [None; LANES],
            posted: [const { None }; LANES],
            copies: None,
        })
        .collect();
    for receiver in 0..stages {
        for sender in 0..stages {
            let (to, from) = unbounded();
            ends[sender].to.push(to);
            ends[receiver].from.push(from);
        }
    }
    ends
}

impl PeerCopy {
    fn copies(&self) -> Result<&Copies, CommError> {
        self.copies.as_ref().ok_or(CommError::NotStarted)
    }

    fn tell(&self, peer: usize, note: Note) -> Result<(), CommError> {
        self.to[peer]
            .send(note)
            .map_err(|_| CommError::PeerGone { peer })
    }

    /// Notes down what the others said, and queues the copies that can be.
    fn listen(&mut self) -> Result<(), CommError> {
        for (from, heard) in self.from.iter().zip(&mut self.heard) {
            loop {
                match from.try_recv() {
                    Ok(note) => heard.note(note),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        heard.gone = true;
                        break;
                    }
                }
            }
        }
        for lane in [Lane::Forward, Lane::Backward, Lane::Whole] {
            self.take(lane)?;
        }
        Ok(())
    }

    /// Queues the copy of a posted receive whose message is ready.
    fn take(&mut self, lane: Lane) -> Result<(), CommError> {
        let place = lane as usize;
        let Some(Posted { peer, bytes, into }) = self.posted[place] else {
            return Ok(());
        };
        let Some(ready) = self.heard[peer].ready[place].pop_front() else {
            return Ok(());
        };
        if ready.bytes != bytes {
            return Err(CommError::OutOfStep {
                peer,
                found: ready.bytes,
                expected: bytes,
            });
        }
        let copies = self.copies()?;
        copies.stream.wait(&ready.complete)?;
        copies.stream.wait(&copies.vacant[place])?;
        copies.stream.copy(into, ready.at, bytes)?;
        copies.stream.record(&copies.copied[place])?;
        let copied = Arc::clone(&copies.copied[place]);
        self.tell(peer, Note::Taken(lane, copied))?;
        self.posted[place] = None;
        Ok(())
    }

    /// Waits, on the host, until `found` finds something in what was heard from `peer`.
    fn hear<N>(
        &mut self,
        cuda: &Cuda,
        peer: usize,
        mut found: impl FnMut(&mut Self) -> Option<N>,
    ) -> Result<N, CommError> {
        loop {
            self.listen()?;
            if let Some(note) = found(self) {
                return Ok(note);
            }
            if self.heard[peer].gone {
                return Err(CommError::PeerGone { peer });
            }
            cuda.glance()?;
            match self.from[peer].recv_timeout(GLANCE) {
                Ok(note) => self.heard[peer].note(note),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.heard[peer].gone = true,
            }
        }
    }

    /// Says that `bytes` bytes at `at`, computed so far, are a message for `peer`.
    fn offer(
        &mut self,
        cuda: &Cuda,
        lane: Lane,
        peer: usize,
        at: DevicePlace,
        bytes: usize,
    ) -> Result<(), CommError> {
        let complete = Arc::clone(&self.copies()?.complete[lane as usize]);
        cuda.record(&complete)?;
        let ready = Ready {
            bytes,
            at,
            complete,
        };
        self.tell(peer, Note::Ready(lane, ready))
    }

    /// Posts a receive into a buffer that what was computed so far is done with.
    fn post(
        &mut self,
        cuda: &Cuda,
        lane: Lane,
        peer: usize,
        into: DevicePlace,
        bytes: usize,
    ) -> Result<(), CommError> {
        cuda.record(&self.copies()?.vacant[lane as usize])?;
        self.posted[lane as usize] = Some(Posted { peer, bytes, into });
        Ok(())
    }

    /// Lets what is computed from here on wait for the receive of a lane.
    fn await_copy(&mut self, cuda: &Cuda, lane: Lane, peer: usize) -> Result<(), CommError> {
        self.hear(cuda, peer, |this| {
            this.posted[lane as usize].is_none().then_some(())
        })?;
        Ok(cuda.wait(&self.copies()?.copied[lane as usize])?)
    }

    /// Lets what is computed from here on wait until `peer` has copied the last message of a lane.
    fn await_taken(&mut self, cuda: &Cuda, lane: Lane, peer: usize) -> Result<(), CommError> {
        let taken = self.hear(cuda, peer, |this| {
            this.heard[peer].taken[lane as usize].pop_front()
        })?;
        Ok(cuda.wait(&taken)?)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.to.len()).filter(move |&peer| peer != rank)
    }
}

impl Heard {
    fn note(&mut self, note: Note) {
        match note {
            Note::Ready(lane, ready) => self.ready[lane as usize].push_back(ready),
            Note::Taken(lane, event) => self.taken[lane as usize].push_back(event),
        }
    }
}

impl Transport<Cuda> for PeerCopy {
    fn rank(&self) -> usize {
        self.rank
    }

    fn stages(&self) -> usize {
        self.to.len()
    }

    fn start(&mut self, cuda: &Cuda, _: &Arc<Pulse>, room: Room) -> Result<(), CommError> {
        let stages = self.to.len();
        let event = || cuda.event().map_err(CommError::from);
        let shared = || event().map(Arc::new);
        let len = if stages > 1 { room.all_reduce } else { 0 };
        self.copies = Some(Copies {
            stream: cuda.side_stream()?,
            complete: [shared()?, shared()?, shared()?],
            vacant: [event()?, event()?, event()?],
            copied: [shared()?, shared()?, shared()?],
            part_copied: (0..stages).map(|_| shared()).collect::<Result<_, _>>()?,
            sum: cuda.zeros(len)?,
            part: cuda.zeros(len)?,
        });
        Ok(())
    }

    fn exchange<T: Plain>(
        &mut self,
        cuda: &Cuda,
        mail: &mut Mailbox<Cuda, T>,
        send: Option<Parcel>,
        receive: Option<Parcel>,
    ) -> Result<(), CommError> {
        let lane = Lane::from(mail.flow);
        if let Some(Parcel { peer, len }) = send {
            let at = cuda.place(&mail.outgoing);
            self.offer(cuda, lane, peer, at, len * size_of::<T>())?;
            self.untaken[lane as usize] = Some(peer);
        }
        mail.awaited = receive;
        if let Some(Parcel { peer, len }) = receive {
            let into = cuda.place(&mail.incoming);
            self.post(cuda, lane, peer, into, len * size_of::<T>())?;
        }
        self.listen()
    }

    fn arrived<T: Plain>(
        &mut self,
        cuda: &Cuda,
        mail: &mut Mailbox<Cuda, T>,
    ) -> Result<(), CommError> {
        match mail.awaited.take() {
            Some(Parcel { peer, .. }) => self.await_copy(cuda, mail.flow.into(), peer),
            None => Ok(()),
        }
    }

    fn sent<T: Plain>(
        &mut self,
        cuda: &Cuda,
        mail: &mut Mailbox<Cuda, T>,
    ) -> Result<(), CommError> {
        let lane = Lane::from(mail.flow);
        match self.untaken[lane as usize].take() {
            Some(peer) => self.await_taken(cuda, lane, peer),
            None => Ok(()),
        }
    }

    fn trade(
        &mut self,
        cuda: &Cuda,
        peer: usize,
        ours: &CudaBuffer<f32>,
        theirs: &mut CudaBuffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        let bytes = len * size_of::<f32>();
        self.post(cuda, Lane::Whole, peer, cuda.place(theirs), bytes)?;
        self.offer(cuda, Lane::Whole, peer, cuda.place(ours), bytes)?;
        self.await_copy(cuda, Lane::Whole, peer)?;
        self.await_taken(cuda, Lane::Whole, peer)
    }

    fn all_reduce_sum(
        &mut self,
        cuda: &Cuda,
        x: &mut CudaBuffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        let stages = self.to.len();
        if stages == 1 {
            return Ok(());
        }
        let bytes = len * size_of::<f32>();
        for peer in self.others() {
            self.offer(cuda, Lane::Whole, peer, cuda.place(x), bytes)?;
        }
        let mut copies = self.copies.take().ok_or(CommError::NotStarted)?;
        let summed = self.sum_parts(cuda, &mut copies, x, len);
        self.copies = Some(copies);
        summed?;
        // Before the sum overwrites them, everybody has a copy of our values.
        for peer in self.others() {
            self.await_taken(cuda, Lane::Whole, peer)?;
        }
        let copies = self.copies()?;
        let vacant = &copies.vacant[Lane::Whole as usize];
        cuda.record(vacant)?;
        copies.stream.wait(vacant)?;
        let (to, from) = (cuda.place(x), cuda.place(&copies.sum));
        copies.stream.copy(to, from, bytes)?;
        copies.stream.record(&copies.copied[Lane::Whole as usize])?;
        Ok(cuda.wait(&copies.copied[Lane::Whole as usize])?)
    }
}

impl PeerCopy {
    /// Adds up the values of all stages, in rank order, in `copies.sum`.
    fn sum_parts(
        &mut self,
        cuda: &Cuda,
        copies: &mut Copies,
        x: &CudaBuffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        let bytes = len * size_of::<f32>();
        cuda.clear(&mut copies.sum, len)?;
        for peer in 0..self.to.len() {
            if peer == self.rank {
                cuda.add(&mut copies.sum, x, len)?;
                continue;
            }
            let ready = self.hear(cuda, peer, |this| {
                this.heard[peer].ready[Lane::Whole as usize].pop_front()
            })?;
            if ready.bytes != bytes {
                return Err(CommError::OutOfStep {
                    peer,
                    found: ready.bytes,
                    expected: bytes,
                });
            }
            let vacant = &copies.vacant[Lane::Whole as usize];
            cuda.record(vacant)?;
            copies.stream.wait(vacant)?;
            copies.stream.wait(&ready.complete)?;
            let into = cuda.place(&copies.part);
            copies.stream.copy(into, ready.at, bytes)?;
            let copied = &copies.part_copied[peer];
            copies.stream.record(copied)?;
            cuda.wait(copied)?;
            self.tell(peer, Note::Taken(Lane::Whole, Arc::clone(copied)))?;
            cuda.add(&mut copies.sum, &copies.part, len)?;
        }
        Ok(())
    }
}
