//! A transport whose calls can fail: one of them, on one stage.

use std::sync::Arc;
use std::time::Duration;

use mp_train::backend::{Backend, Plain, Pulse};
use mp_train::comm::in_process::{self, InProcess};
use mp_train::comm::{CommError, Mailbox, Parcel, Room, Transport};

use super::{STAGES, for_ever};

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Error,
    Panic,
    /// The connections break first, so that the other stages complain before this one does.
    PanicLate,
    /// The call never returns.
    Hang,
    /// The call waits for something that never comes, and gives up when it is told to.
    Wait,
}

/// Which call of a stage: the first is `start`.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub rank: usize,
    pub call: usize,
    pub how: How,
}

pub struct FaultyTransport {
    inner: Option<InProcess>,
    rank: usize,
    fault: Option<Fault>,
    calls: usize,
    pulse: Arc<Pulse>,
}

/// The transports of all stages.
pub fn connect(fault: Fault) -> Vec<FaultyTransport> {
    let transports = in_process::connect(STAGES).into_iter().enumerate();
    let faulty = transports.map(|(rank, inner)| FaultyTransport {
        inner: Some(inner),
        rank,
        fault: (fault.rank == rank).then_some(fault),
        calls: 0,
        pulse: Arc::default(),
    });
    faulty.collect()
}

impl FaultyTransport {
    fn inner(&mut self) -> Result<&mut InProcess, CommError> {
        let call = self.calls;
        self.calls += 1;
        if let Some(Fault { how, .. }) = self.fault.filter(|fault| fault.call == call) {
            self.fail(call, how)?;
        }
        Ok(self.inner.as_mut().unwrap())
    }

    fn fail(&mut self, call: usize, how: How) -> Result<(), CommError> {
        match how {
            How::Error => Err(CommError::OutOfStep {
                peer: 77,
                found: call,
                expected: 0,
            }),
            How::Panic => panic!("planted at call {call}"),
            How::PanicLate => {
                self.inner = None;
                std::thread::sleep(Duration::from_millis(100));
                panic!("planted at call {call}")
            }
            How::Hang => for_ever(),
            How::Wait => {
                while !self.pulse.is_stopped() {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(CommError::Stopped)
            }
        }
    }
}

impl<B: Backend> Transport<B> for FaultyTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn stages(&self) -> usize {
        STAGES
    }

    fn start(&mut self, backend: &B, pulse: &Arc<Pulse>, room: Room) -> Result<(), CommError> {
        self.pulse = Arc::clone(pulse);
        self.inner()?.start(backend, pulse, room)
    }

    fn exchange<T: Plain>(
        &mut self,
        backend: &B,
        mail: &mut Mailbox<B, T>,
        send: Option<Parcel>,
        receive: Option<Parcel>,
    ) -> Result<(), CommError> {
        self.inner()?.exchange(backend, mail, send, receive)
    }

    fn arrived<T: Plain>(
        &mut self,
        backend: &B,
        mail: &mut Mailbox<B, T>,
    ) -> Result<(), CommError> {
        self.inner()?.arrived(backend, mail)
    }

    fn sent<T: Plain>(&mut self, backend: &B, mail: &mut Mailbox<B, T>) -> Result<(), CommError> {
        self.inner()?.sent(backend, mail)
    }

    fn trade(
        &mut self,
        backend: &B,
        peer: usize,
        ours: &B::Buffer<f32>,
        theirs: &mut B::Buffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        self.inner()?.trade(backend, peer, ours, theirs, len)
    }

    fn all_reduce_sum(
        &mut self,
        backend: &B,
        x: &mut B::Buffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        self.inner()?.all_reduce_sum(backend, x, len)
    }
}
