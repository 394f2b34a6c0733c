//! Signs of life of a worker, for whoever watches it; and the word that it is to give up.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Shared by a worker, its backend and its transport with the thread that watches them.
///
/// A worker beats when a byte is loaded, a kernel compiled, an action finished. Whatever it waits for, it
/// waits in small steps and gives up once the pulse is stopped, so that no wait is for ever.
#[derive(Debug)]
pub struct Pulse {
    since: Instant,
    /// Milliseconds after `since` of the last beat.
    beat: AtomicU64,
    /// Milliseconds after `since` of the last time that the worker asked whether it is to give up.
    asked: AtomicU64,
    /// Where the device is in the work of the worker.
    place: AtomicU64,
    stopped: AtomicBool,
}

impl Default for Pulse {
    fn default() -> Self {
        Pulse {
            since: Instant::now(),
            beat: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            place: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        }
    }
}

impl Pulse {
    /// A sign of life.
    pub fn beat(&self) {
        self.beat.fetch_max(self.now(), Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }

    fn time_since(&self, then: u64) -> Duration {
        let then = Duration::from_millis(then);
        self.since.elapsed().saturating_sub(then)
    }

    /// Everything before `place` is done; a sign of life too. What a place means is agreed between the
    /// worker that marks it and the watcher (see `pipeline::worker`).
    pub fn reach(&self, place: u64) {
        self.place.store(place, Ordering::Relaxed);
        self.beat();
    }

    /// The last place reached.
    pub fn place(&self) -> u64 {
        self.place.load(Ordering::Relaxed)
    }

    /// Time since the last sign of life.
    pub fn silent_for(&self) -> Duration {
        self.time_since(self.beat.load(Ordering::Relaxed))
    }

    /// Time since the worker's thread last beat or asked whether it is to give up. A thread that waits asks
    /// all the time: one that does not is in a call that does not come back, or computes.
    pub fn lost_for(&self) -> Duration {
        let asked = self.asked.load(Ordering::Relaxed);
        self.time_since(asked.max(self.beat.load(Ordering::Relaxed)))
    }

    /// Tells the worker to give up whatever it waits for.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Whether the worker is to give up; asked by its own thread, in every step of every wait.
    pub fn is_stopped(&self) -> bool {
        self.asked.fetch_max(self.now(), Ordering::Relaxed);
        self.stopped.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_ends_the_silence_and_a_stop_is_for_good() {
        let pulse = Pulse::default();
        std::thread::sleep(Duration::from_millis(30));
        assert!(pulse.silent_for() >= Duration::from_millis(30));
        pulse.reach(7);
        assert!(pulse.silent_for() < Duration::from_millis(30));
        assert_eq!(pulse.place(), 7);
        assert!(!pulse.is_stopped());
        std::thread::sleep(Duration::from_millis(30));
        assert!(pulse.lost_for() >= Duration::from_millis(30));
        assert!(!pulse.is_stopped(), "a wait is no silence of the thread");
        assert!(pulse.lost_for() < Duration::from_millis(30));
        assert!(pulse.silent_for() >= Duration::from_millis(30));
        pulse.stop();
        pulse.beat();
        assert!(pulse.is_stopped());
    }
}
