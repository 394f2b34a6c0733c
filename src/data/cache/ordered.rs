//! Work spread over threads, its results in the order of the work, and never much of it in memory.

use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::progress::INTERVAL;
use crate::data::DataError;

/// A batch is complete with so many items, or so many bytes.
const BATCH_ITEMS: usize = 512;
const BATCH_BYTES: usize = 256 << 10;
/// Batches under way per thread.
const AHEAD: usize = 4;

/// What a thread works on, and where the result goes.
type Task<T, R> = (Vec<T>, Sender<R>);
/// What comes next in order: a result that is awaited, or the error that the items end with.
type Next<R> = Result<Receiver<R>, DataError>;

/// Takes `items` in batches, gives each batch to one of `threads` threads to `work` on, and the
/// results to `take` in the order of the items. `idle` is called while there is nothing to take.
///
/// At most a few batches per thread are under way; `size` is what an item counts against the size of
/// a batch, in bytes.
///
/// # Errors
/// The first error of the items, after what came before it was taken; else that of `take` or `idle`,
/// which end the work.
pub(super) fn in_order<T: Send, R: Send>(
    items: impl Iterator<Item = Result<T, DataError>> + Send,
    size: impl Fn(&T) -> usize + Send,
    threads: usize,
    work: impl Fn(Vec<T>) -> R + Sync,
    mut take: impl FnMut(R) -> Result<(), DataError>,
    mut idle: impl FnMut() -> Result<(), DataError>,
) -> Result<(), DataError> {
    let threads = threads.max(1);
    let (give, tasks) = bounded::<Task<T, R>>(AHEAD * threads);
    let (announce, results) = bounded::<Next<R>>(AHEAD * threads);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (tasks, work) = (tasks.clone(), &work);
            scope.spawn(move || {
                for (batch, result) in tasks {
                    // Nobody waits for it any more if the work was ended.
                    let _ = result.send(work(batch));
                }
            });
        }
        drop(tasks);
        scope.spawn(move || feed(items, size, &give, &announce));
        // Dropped on the way out, which ends the threads, whatever the way out is.
        let results = results;
        while let Some(next) = wait(&results, INTERVAL, &mut idle)? {
            // A thread that panicked sends nothing; the scope passes the panic on.
            let Some(result) = wait(&next?, INTERVAL, &mut idle)? else {
                break;
            };
            take(result)?;
        }
        Ok(())
    })
}

/// Waits for a message; `None` when none can come.
fn wait<M>(
    messages: &Receiver<M>,
    interval: Duration,
    idle: &mut impl FnMut() -> Result<(), DataError>,
) -> Result<Option<M>, DataError> {
    loop {
        match messages.recv_timeout(interval) {
            Ok(message) => return Ok(Some(message)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => idle()?,
        }
    }
}

fn feed<T, R>(
    items: impl Iterator<Item = Result<T, DataError>>,
    size: impl Fn(&T) -> usize,
    give: &Sender<Task<T, R>>,
    announce: &Sender<Next<R>>,
) {
    // Where nobody receives any more the work was ended.
    let submit = |batch: Vec<T>| {
        let (send, receive) = bounded(1);
        announce.send(Ok(receive)).is_ok() && give.send((batch, send)).is_ok()
    };
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for item in items {
        match item {
            Ok(item) => {
                bytes += size(&item);
                batch.push(item);
            }
            Err(error) => {
                if batch.is_empty() || submit(batch) {
                    let _ = announce.send(Err(error));
                }
                return;
            }
        }
        if batch.len() >= BATCH_ITEMS || bytes >= BATCH_BYTES {
            if !submit(std::mem::take(&mut batch)) {
                return;
            }
            bytes = 0;
        }
    }
    if !batch.is_empty() {
        submit(batch);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn numbers(n: usize) -> impl Iterator<Item = Result<usize, DataError>> + Send {
        (0..n).map(Ok)
    }

    #[test]
    fn results_come_in_order_from_any_number_of_threads() {
        for (n, threads) in [(0, 3), (1, 1), (511, 2), (5000, 1), (20_000, 4)] {
            let mut taken = Vec::new();
            let uneven = |batch: Vec<usize>| {
                if batch[0].is_multiple_of(1024) {
                    std::thread::sleep(Duration::from_millis(2));
                }
                batch
            };
            in_order(
                numbers(n),
                |_| 1000,
                threads,
                uneven,
                |batch| {
                    taken.extend(batch);
                    Ok(())
                },
                || Ok(()),
            )
            .unwrap();
            assert_eq!(taken, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn items_before_an_error_are_taken_and_none_behind_it() {
        let items = numbers(700)
            .chain([Err(DataError::Interrupted)])
            .chain(numbers(9));
        let mut taken = 0;
        let count = |batch: Vec<usize>| batch.len();
        let add = |count| {
            taken += count;
            Ok(())
        };
        let error = in_order(items, |_| 1, 2, count, add, || Ok(())).unwrap_err();
        assert!(matches!(error, DataError::Interrupted));
        assert_eq!(taken, 700);
    }

    #[test]
    fn little_is_read_ahead_and_an_end_is_an_end() {
        let read = AtomicUsize::new(0);
        let items = numbers(1_000_000).inspect(|_| {
            read.fetch_add(1, Ordering::Relaxed);
        });
        let stop = |_| Err(DataError::Interrupted);
        in_order(items, |_| BATCH_BYTES, 2, |batch| batch, stop, || Ok(())).unwrap_err();
        // Of batches of one item: those announced, one in the feeder's hands, and the one taken.
        assert!(read.into_inner() <= 2 * AHEAD + 2);
    }

    #[test]
    fn the_one_who_waits_may_end_it() {
        let slow = |batch: Vec<usize>| {
            std::thread::sleep(Duration::from_millis(300));
            batch.len()
        };
        let idle = || Err(DataError::Interrupted);
        let error = in_order(numbers(1), |_| 1, 1, slow, |_| Ok(()), idle).unwrap_err();
        assert!(matches!(error, DataError::Interrupted));
    }
}
