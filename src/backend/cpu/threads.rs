//! The compute threads of one CPU stage, and the loops that use them.
//!
//! Work is cut by shape, and by the number of threads only where the bits of a result do not depend on the
//! cut: who computes a piece can change, what is computed cannot.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::backend::{BackendError, HostClock, Work};

/// Elements below which a piece of an elementwise loop is not cut further (about 10 µs of work).
const GRAIN: usize = 16 * 1024;

/// A pool of compute threads; with one thread everything runs on the caller's.
pub struct Threads {
    pool: Option<rayon::ThreadPool>,
    /// Where the loops count their time, as elementwise work, unless the op they belong to counts it.
    pub clock: HostClock,
}

impl Threads {
    /// Starts `count` threads; 0 counts as 1.
    pub fn new(count: usize) -> Result<Self, BackendError> {
        if count <= 1 {
            return Ok(Threads {
                pool: None,
                clock: HostClock::default(),
            });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|error| BackendError::Threads {
                threads: count,
                reason: error.to_string(),
            })?;
        Ok(Threads {
            pool: Some(pool),
            clock: HostClock::default(),
        })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.pool
            .as_ref()
            .map_or(1, rayon::ThreadPool::current_num_threads)
    }

    /// Calls `work(0) .. work(tasks - 1)`, in any order.
    pub fn tasks(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        let _counting = self.clock.count(Work::Elementwise);
        match &self.pool {
            Some(pool) if tasks > 1 => {
                pool.install(|| (0..tasks).into_par_iter().for_each(&work));
            }
            _ => (0..tasks).for_each(work),
        }
    }

    /// Calls `work(row, values)` for every row of `cols` values.
    pub fn rows<T: Send>(&self, out: &mut [T], cols: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        if cols == 0 {
            return;
        }
        let _counting = self.clock.count(Work::Elementwise);
        let rows_per_piece = (GRAIN / cols).max(1);
        let piece = |(index, piece): (usize, &mut [T])| {
            for (row, values) in piece.chunks_mut(cols).enumerate() {
                work(index * rows_per_piece + row, values);
            }
        };
        let pieces = out.len().div_ceil(rows_per_piece * cols);
        match &self.pool {
            Some(pool) if pieces > 1 => pool.install(|| {
                out.par_chunks_mut(rows_per_piece * cols)
                    .enumerate()
                    .for_each(piece);
            }),
            _ => out
                .chunks_mut(rows_per_piece * cols)
                .enumerate()
                .for_each(piece),
        }
    }

    /// Calls `work(item, value)` for every value, where each costs a look at `cost` elements.
    pub fn items<T: Send>(&self, out: &mut [T], cost: usize, work: impl Fn(usize, &mut T) + Sync) {
        let _counting = self.clock.count(Work::Elementwise);
        let items_per_piece = (GRAIN / cost.max(1)).max(1);
        let piece = |(index, piece): (usize, &mut [T])| {
            for (item, value) in piece.iter_mut().enumerate() {
                work(index * items_per_piece + item, value);
            }
        };
        match &self.pool {
            Some(pool) if out.len() > items_per_piece => pool.install(|| {
                out.par_chunks_mut(items_per_piece)
                    .enumerate()
                    .for_each(piece);
            }),
            _ => out.chunks_mut(items_per_piece).enumerate().for_each(piece),
        }
    }

    /// Calls `work(start, values)` for pieces of `len` values of a flat list, which may fail: pieces behind
    /// one that failed may be left out, those before it never are.
    ///
    /// # Errors
    /// That of the first piece that failed, whichever thread was faster.
    pub fn try_pieces<T: Send, E: Send>(
        &self,
        out: &mut [T],
        len: usize,
        work: impl Fn(usize, &mut [T]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let failed: Mutex<Option<(usize, E)>> = Mutex::new(None);
        let first = || failed.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = |(index, values): (usize, &mut [T])| {
            if first().as_ref().is_some_and(|(failed, _)| *failed < index) {
                return;
            }
            if let Err(error) = work(index * len, values) {
                let mut first = first();
                if first.as_ref().is_none_or(|(failed, _)| *failed > index) {
                    *first = Some((index, error));
                }
            }
        };
        match &self.pool {
            Some(pool) if out.len() > len => {
                pool.install(|| out.par_chunks_mut(len).enumerate().for_each(piece));
            }
            _ => out.chunks_mut(len).enumerate().for_each(piece),
        }
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Calls `work(start, values)` for pieces of a flat list.
    pub fn pieces<T: Send>(&self, out: &mut [T], work: impl Fn(usize, &mut [T]) + Sync) {
        let _counting = self.clock.count(Work::Elementwise);
        let piece = |(index, values): (usize, &mut [T])| work(index * GRAIN, values);
        match &self.pool {
            Some(pool) if out.len() > GRAIN => {
                pool.install(|| out.par_chunks_mut(GRAIN).enumerate().for_each(piece));
            }
            _ => out.chunks_mut(GRAIN).enumerate().for_each(piece),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Values in a line of the cache.
pub const LINE: usize = 16;

/// Lends `work` memory of this thread for `len` values, which hold whatever was left there; it starts with
/// a line of the cache, since vectors across two lines take two reads. It is kept from call to call (a
/// fresh megabyte costs a page fault for every 4 KiB), and is lent once at a time.
pub fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < len + LINE {
            scratch.resize(len + LINE, 0.0);
        }
        let line = scratch.as_ptr().align_offset(LINE * size_of::<f32>());
        work(&mut scratch[line.min(LINE)..][..len])
    })
}

/// Scratch memory cut into parts, each of which starts with a line of the cache; see [`parts_len`].
pub fn parts<const PARTS: usize>(scratch: &mut [f32], lens: [usize; PARTS]) -> [&mut [f32]; PARTS] {
    let mut rest = scratch;
    lens.map(|len| {
        let (part, others) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(LINE));
        rest = others;
        &mut part[..len]
    })
}

/// Values of scratch memory that [`parts`] needs.
pub fn parts_len(lens: &[usize]) -> usize {
    lens.iter().map(|len| len.next_multiple_of(LINE)).sum()
}

/// A slice that several tasks write at once, each to places of its own.
pub struct Scattered<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `at`, whose callers promise that no two live pieces overlap; then
// sharing the pointer is like having split the slice beforehand.
unsafe impl<T: Send> Sync for Scattered<'_, T> {}

impl<'a, T> Scattered<'a, T> {
    /// Takes the slice over for the time of the tasks.
    pub fn new(values: &'a mut [T]) -> Self {
        Scattered {
            start: values.as_mut_ptr(),
            len: values.len(),
            lifetime: std::marker::PhantomData,
        }
    }

    /// Where the piece `offset .. offset + len` starts, for pieces of which only some places are a task's
    /// own; out of range is a bug and panics.
    pub fn start_of(&self, offset: usize, len: usize) -> *mut T {
        assert!(offset + len <= self.len, "piece outside of its buffer");
        // SAFETY: in range by the assertion.
        unsafe { self.start.add(offset) }
    }

    /// The piece `offset .. offset + len`; out of range is a bug and panics.
    ///
    /// # Safety
    /// No other piece that overlaps it may be alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn at(&self, offset: usize, len: usize) -> &mut [T] {
        // SAFETY: in range by the assertion there, alive for 'a, and unshared by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start_of(offset, len), len) }
    }
}
