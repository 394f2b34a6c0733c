//! Stages as threads of one process, connected by channels of host memory.

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::{CommError, Flow, Mailbox, Parcel, Room, Transport};
use crate::backend::{Backend, Plain, Pulse};

/// How often a wait looks whether it is to give up.
const GLANCE: Duration = Duration::from_millis(20);

/// What a channel carries. Each kind has channels of its own, so that they do not wait for each other.
#[derive(Clone, Copy)]
enum Lane {
    Forward,
    Backward,
    Whole,
}

impl From<Flow> for Lane {
    fn from(flow: Flow) -> Self {
        match flow {
            Flow::Forward => Lane::Forward,
            Flow::Backward => Lane::Backward,
        }
    }
}

type Lanes<T> = [T; 3];

/// One stage's ends of the channels to and from every other stage.
pub struct InProcess {
    rank: usize,
    to: Vec<Lanes<Sender<Vec<u8>>>>,
    from: Vec<Lanes<Receiver<Vec<u8>>>>,
    pulse: Arc<Pulse>,
}

/// The transports of `stages` stages, connected with each other.
pub fn connect(stages: usize) -> Vec<InProcess> {
    let mut ends: Vec<InProcess> = (0..stages)
        .map(|rank| InProcess {
            rank,
            to: Vec::with_capacity(stages),
            from: Vec::with_capacity(stages),
            pulse: Arc::default(),
        })
        .collect();
    for receiver in 0..stages {
        for sender in 0..stages {
            let [forward, backward, whole] = [(); 3].map(|()| unbounded());
            ends[sender].to.push([forward.0, backward.0, whole.0]);
            ends[receiver].from.push([forward.1, backward.1, whole.1]);
        }
    }
    ends
}

impl InProcess {
    fn put<T: Plain>(&self, to: usize, lane: Lane, values: &[T]) -> Result<(), CommError> {
        self.to[to][lane as usize]
            .send(bytemuck::cast_slice(values).to_vec())
            .map_err(|_| CommError::PeerGone { peer: to })
    }

    fn take<T: Plain>(&self, from: usize, lane: Lane, len: usize) -> Result<Vec<T>, CommError> {
        let bytes = loop {
            match self.from[from][lane as usize].recv_timeout(GLANCE) {
                Ok(bytes) => break bytes,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(CommError::PeerGone { peer: from });
                }
                Err(RecvTimeoutError::Timeout) if self.pulse.is_stopped() => {
                    return Err(CommError::Stopped);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        let expected = len * std::mem::size_of::<T>();
        if bytes.len() != expected {
            return Err(CommError::OutOfStep {
                peer: from,
                found: bytes.len(),
                expected,
            });
        }
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }
}

impl<B: Backend> Transport<B> for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn stages(&self) -> usize {
        self.to.len()
    }

    fn start(&mut self, _: &B, pulse: &Arc<Pulse>, _: Room) -> Result<(), CommError> {
        self.pulse = Arc::clone(pulse);
        Ok(())
    }

    fn exchange<T: Plain>(
        &mut self,
        backend: &B,
        mail: &mut Mailbox<B, T>,
        send: Option<Parcel>,
        receive: Option<Parcel>,
    ) -> Result<(), CommError> {
        if let Some(Parcel { peer, len }) = send {
            self.put(peer, mail.flow.into(), &backend.read(&mail.outgoing, len)?)?;
        }
        mail.awaited = receive;
        Ok(())
    }

    fn arrived<T: Plain>(
        &mut self,
        backend: &B,
        mail: &mut Mailbox<B, T>,
    ) -> Result<(), CommError> {
        let Some(Parcel { peer, len }) = mail.awaited.take() else {
            return Ok(());
        };
        let values = self.take::<T>(peer, mail.flow.into(), len)?;
        Ok(backend.write(&mut mail.incoming, &values)?)
    }

    fn sent<T: Plain>(&mut self, _: &B, _: &mut Mailbox<B, T>) -> Result<(), CommError> {
        // What was sent was copied.
        Ok(())
    }

    fn trade(
        &mut self,
        backend: &B,
        peer: usize,
        ours: &B::Buffer<f32>,
        theirs: &mut B::Buffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        self.put(peer, Lane::Whole, &backend.read(ours, len)?)?;
        let values = self.take::<f32>(peer, Lane::Whole, len)?;
        Ok(backend.write(theirs, &values)?)
    }

    fn all_reduce_sum(
        &mut self,
        backend: &B,
        x: &mut B::Buffer<f32>,
        len: usize,
    ) -> Result<(), CommError> {
        let stages = self.to.len();
        if stages == 1 {
            return Ok(());
        }
        let own = backend.read(x, len)?;
        for peer in (0..stages).filter(|&peer| peer != self.rank) {
            self.put(peer, Lane::Whole, &own)?;
        }
        let mut sum = vec![0.0f32; len];
        for peer in 0..stages {
            let part = match peer == self.rank {
                true => own.clone(),
                false => self.take(peer, Lane::Whole, len)?,
            };
            for (sum, part) in sum.iter_mut().zip(part) {
                *sum += part;
            }
        }
        Ok(backend.write(x, &sum)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    fn mailbox(backend: &Cpu<f32>, flow: Flow) -> Mailbox<Cpu<f32>, f32> {
        Mailbox::new(backend, flow, 4).unwrap()
    }

    #[test]
    fn sums_are_equal_everywhere_and_a_gone_peer_is_noticed() {
        let threads: Vec<_> = connect(3)
            .into_iter()
            .enumerate()
            .map(|(rank, mut transport)| {
                std::thread::spawn(move || {
                    let backend = Cpu::<f32>::new(1).unwrap();
                    let mut x = backend.upload(&[rank as f32, 1e8, -0.0]).unwrap();
                    transport.all_reduce_sum(&backend, &mut x, 2).unwrap();
                    if rank == 2 {
                        return backend.read(&x, 3).unwrap();
                    }
                    let mut mail = mailbox(&backend, Flow::Forward);
                    let receive = Some(Parcel { peer: 2, len: 1 });
                    transport
                        .exchange(&backend, &mut mail, None, receive)
                        .unwrap();
                    let gone = transport.arrived(&backend, &mut mail);
                    assert!(matches!(gone, Err(CommError::PeerGone { peer: 2 })));
                    backend.read(&x, 3).unwrap()
                })
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), [3.0, 3e8, -0.0]);
        }
    }

    #[test]
    fn flows_do_not_wait_for_each_other_and_lengths_must_agree() {
        let backend = Cpu::<f32>::new(1).unwrap();
        let mut ends = connect(2).into_iter();
        let (mut first, mut second) = (ends.next().unwrap(), ends.next().unwrap());
        let mut forward = mailbox(&backend, Flow::Forward);
        let mut backward = mailbox(&backend, Flow::Backward);
        let to = |peer, len| Some(Parcel { peer, len });
        backend.write(&mut backward.outgoing, &[7.0]).unwrap();
        first
            .exchange(&backend, &mut forward, to(1, 2), None)
            .unwrap();
        first
            .exchange(&backend, &mut backward, to(1, 1), None)
            .unwrap();
        second
            .exchange(&backend, &mut backward, None, to(0, 1))
            .unwrap();
        second.arrived(&backend, &mut backward).unwrap();
        assert_eq!(backend.read(&backward.incoming, 1).unwrap(), [7.0]);
        second
            .exchange(&backend, &mut forward, None, to(0, 1))
            .unwrap();
        let wrong = second.arrived(&backend, &mut forward);
        assert!(matches!(wrong, Err(CommError::OutOfStep { found: 8, .. })));
    }

    #[test]
    fn a_wait_ends_when_the_pulse_is_stopped() {
        let backend = Cpu::<f32>::new(1).unwrap();
        let mut ends = connect(2);
        let pulse = Arc::new(Pulse::default());
        ends[0]
            .start(&backend, &pulse, Room { all_reduce: 0 })
            .unwrap();
        let mut mail = mailbox(&backend, Flow::Forward);
        let receive = Some(Parcel { peer: 1, len: 1 });
        ends[0]
            .exchange(&backend, &mut mail, None, receive)
            .unwrap();
        pulse.stop();
        let stopped = ends[0].arrived(&backend, &mut mail);
        assert!(matches!(stopped, Err(CommError::Stopped)));
    }
}
