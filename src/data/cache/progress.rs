//! How far it has come, told now and then.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::OnProgress;
use crate::data::DataError;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Files are read to find the cache file that belongs to them.
    Checking,
    /// Another run is making the cache file.
    Waiting,
    /// Rows become token ids.
    Tokenising,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes of the files done.
    pub bytes_done: u64,
    /// Bytes of all files.
    pub bytes_total: u64,
    /// Rows made.
    pub rows: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Since this phase began.
    pub elapsed: Duration,
    /// Whether the phase ends with this.
    pub finished: bool,
}

impl Progress {
    /// Tokens made per second of this phase.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// How often it is told at most.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);

/// Tells the caller of the progress, often enough and not too often.
pub(super) struct Meter<'a> {
    on_progress: OnProgress<'a>,
    began: Instant,
    told: Option<Instant>,
    now: Progress,
}

impl<'a> Meter<'a> {
    pub fn new(on_progress: OnProgress<'a>) -> Self {
        Self {
            on_progress,
            began: Instant::now(),
            told: None,
            now: Progress {
                phase: Phase::Checking,
                bytes_done: 0,
                bytes_total: 0,
                rows: 0,
                tokens: 0,
                elapsed: Duration::ZERO,
                finished: false,
            },
        }
    }

    /// Begins a phase that goes through so many bytes.
    pub fn begin(&mut self, phase: Phase, bytes_total: u64) {
        self.began = Instant::now();
        self.told = None;
        self.now = Progress {
            phase,
            bytes_done: 0,
            bytes_total,
            rows: 0,
            tokens: 0,
            elapsed: Duration::ZERO,
            finished: false,
        };
    }

    /// Changes what is known, and tells it if it is time.
    ///
    /// # Errors
    /// [`DataError::Interrupted`] if the caller wants no more.
    pub fn update(&mut self, change: impl FnOnce(&mut Progress)) -> Result<(), DataError> {
        change(&mut self.now);
        match self.told {
            Some(told) if told.elapsed() < INTERVAL => Ok(()),
            _ => self.tell(),
        }
    }

    /// Ends the phase, and tells it.
    ///
    /// # Errors
    /// As [`Meter::update`].
    pub fn finish(&mut self) -> Result<(), DataError> {
        self.now.finished = true;
        self.tell()
    }

    fn tell(&mut self) -> Result<(), DataError> {
        self.told = Some(Instant::now());
        self.now.elapsed = self.began.elapsed();
        match (self.on_progress)(self.now) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(DataError::Interrupted),
        }
    }
}
