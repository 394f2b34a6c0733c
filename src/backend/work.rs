//! Where the time of a worker goes, by the kind of work; measured on demand.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use serde::Serialize;

use super::BackendError;

/// What the ops of a backend are counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Matrix products, those of an adapter included.
    Products,
    /// Attention, forward and backward.
    Attention,
    /// Norms, activations, rotary, residual sums, dropout, casts, copies of rows, clearing.
    Elementwise,
    /// Cross-entropy and its sums.
    Loss,
    /// Norm of the gradient and AdamW.
    Optimizer,
}

/// Seconds of one stage by what they were spent on. On a GPU they are those of its compute stream: a
/// transfer that hides behind compute counts nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WorkSeconds {
    /// [`Work::Products`].
    pub products: f64,
    /// [`Work::Attention`].
    pub attention: f64,
    /// [`Work::Elementwise`].
    pub elementwise: f64,
    /// [`Work::Loss`].
    pub loss: f64,
    /// [`Work::Optimizer`].
    pub optimizer: f64,
    /// Giving activations and their gradients to other stages.
    pub communication: f64,
    /// For input, for a turn to compute, for the other stages at the end of a step.
    pub waiting: f64,
    /// All else: micro-batches laid out, gaps between ops, gradients that stages share.
    pub other: f64,
}

impl WorkSeconds {
    /// Counts `seconds` as `work`.
    pub fn count(&mut self, work: Work, seconds: f64) {
        *match work {
            Work::Products => &mut self.products,
            Work::Attention => &mut self.attention,
            Work::Elementwise => &mut self.elementwise,
            Work::Loss => &mut self.loss,
            Work::Optimizer => &mut self.optimizer,
        } += seconds;
    }

    /// All of them.
    pub fn total(&self) -> f64 {
        self.products
            + self.attention
            + self.elementwise
            + self.loss
            + self.optimizer
            + self.communication
            + self.waiting
            + self.other
    }
}

/// A device that can tell what its time goes into. Results are the same bits, measured or not.
pub trait Measuring {
    /// Begins to measure: ops are timed until [`Measuring::measured`]. What was queued before is waited for.
    ///
    /// # Errors
    /// The device fails, as in all of these.
    fn measure(&self) -> Result<(), BackendError>;

    /// Notes, where it measures, when everything queued so far is done, without waiting for it.
    ///
    /// # Errors
    /// As [`Measuring::measure`].
    fn stamp(&self) -> Result<(), BackendError>;

    /// Ends measuring, when everything queued is done.
    ///
    /// # Errors
    /// As [`Measuring::measure`].
    fn measured(&self) -> Result<Measured, BackendError>;
}

/// What a backend measured between [`Measuring::measure`] and [`Measuring::measured`].
#[derive(Clone, Debug)]
pub struct Measured {
    /// When it began.
    pub began: Instant,
    /// When everything queued before each [`Measuring::stamp`] was done, in seconds after that.
    pub stamps: Vec<f64>,
    /// Seconds of the ops.
    pub work: WorkSeconds,
}

impl Measured {
    /// Nothing yet, from now on.
    pub(super) fn nothing() -> Self {
        Measured {
            began: Instant::now(),
            stamps: Vec::new(),
            work: WorkSeconds::default(),
        }
    }
}

/// The clock of a backend whose ops are done when they return.
#[derive(Debug, Default)]
pub struct HostClock {
    /// Measures, and no op is under way.
    ready: Cell<bool>,
    measured: RefCell<Option<Measured>>,
}

impl HostClock {
    /// Begins to measure, anew.
    pub fn start(&self) {
        self.ready.set(true);
        *self.measured.borrow_mut() = Some(Measured::nothing());
    }

    /// Notes the time, where it measures.
    pub fn stamp(&self) {
        if let Some(measured) = &mut *self.measured.borrow_mut() {
            measured.stamps.push(measured.began.elapsed().as_secs_f64());
        }
    }

    /// Ends measuring; where it was not begun, nothing was measured.
    pub fn stop(&self) -> Measured {
        self.ready.set(false);
        let measured = self.measured.borrow_mut().take();
        measured.unwrap_or_else(Measured::nothing)
    }

    /// Counts the time until what it gives is dropped, all of it as `work`: what is counted inside of that
    /// belongs to it. When nothing is measured, this is one look at a flag.
    pub fn count(&self, work: Work) -> Counting<'_> {
        let counts = self.ready.replace(false);
        Counting {
            since: counts.then(Instant::now),
            clock: self,
            work,
        }
    }
}

/// An op under way.
#[derive(Debug)]
pub struct Counting<'a> {
    clock: &'a HostClock,
    work: Work,
    since: Option<Instant>,
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        let Some(since) = self.since else { return };
        if let Some(measured) = &mut *self.clock.measured.borrow_mut() {
            let seconds = since.elapsed().as_secs_f64();
            measured.work.count(self.work, seconds);
            self.clock.ready.set(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_counts_only_between_start_and_stop() {
        let clock = HostClock::default();
        clock.stamp();
        drop(clock.count(Work::Loss));
        assert!(clock.stop().stamps.is_empty());
        clock.start();
        clock.stamp();
        {
            let _counting = clock.count(Work::Attention);
            let _within = clock.count(Work::Elementwise);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        clock.stamp();
        let measured = clock.stop();
        drop(clock.count(Work::Products));
        assert!(measured.work.attention >= 0.005);
        assert_eq!(measured.work.total(), measured.work.attention);
        let [first, last] = measured.stamps[..] else {
            panic!("two stamps: {:?}", measured.stamps);
        };
        assert!(last - first >= measured.work.attention);
        assert_eq!(clock.stop().work, WorkSeconds::default());
    }
}
