//! Stages as threads of one process, connected by channels of host memory.

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::{CommError, Transport};
use crate::backend::{Backend, Plain};

/// One stage's ends of the channels to and from every other stage.
pub struct InProcess {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Receiver<Vec<u8>>>,
}

/// The transports of `stages` stages, connected with each other.
pub fn connect(stages: usize) -> Vec<InProcess> {
    let mut ends: Vec<InProcess> = (0..stages)
        .map(|rank| InProcess {
            rank,
            to: Vec::with_capacity(stages),
            from: Vec::with_capacity(stages),
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

impl InProcess {
    fn put<T: Plain>(&self, to: usize, values: &[T]) -> Result<(), CommError> {
        self.to[to]
            .send(bytemuck::cast_slice(values).to_vec())
            .map_err(|_| CommError::PeerGone { peer: to })
    }

    fn take<T: Plain>(&self, from: usize, len: usize) -> Result<Vec<T>, CommError> {
        let bytes = self.from[from]
            .recv()
            .map_err(|_| CommError::PeerGone { peer: from })?;
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

    fn send<T: Plain>(
        &mut self,
        backend: &B,
        to: usize,
        x: &B::Buffer<T>,
        len: usize,
    ) -> Result<(), CommError> {
        self.put(to, &backend.read(x, len)?)
    }

    fn recv<T: Plain>(
        &mut self,
        backend: &B,
        from: usize,
        x: &mut B::Buffer<T>,
        len: usize,
    ) -> Result<(), CommError> {
        Ok(backend.write(x, &self.take::<T>(from, len)?)?)
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
            self.put(peer, &own)?;
        }
        let mut sum = vec![0.0f32; len];
        for peer in 0..stages {
            let part = match peer == self.rank {
                true => own.clone(),
                false => self.take(peer, len)?,
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
                    let gone = transport.recv(&backend, 2, &mut x, 1);
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
    fn lengths_must_agree() {
        let backend = Cpu::<f32>::new(1).unwrap();
        let mut ends = connect(2).into_iter();
        let (mut first, mut second) = (ends.next().unwrap(), ends.next().unwrap());
        let mut x = backend.upload(&[1.0f32, 2.0]).unwrap();
        first.send(&backend, 1, &x, 2).unwrap();
        let wrong = second.recv(&backend, 0, &mut x, 1);
        assert!(matches!(wrong, Err(CommError::OutOfStep { found: 8, .. })));
    }
}
