//! How long what is queued takes on the GPU: timing events around every launch and product, only while a
//! step is measured. They are read when everything is done, so that measuring waits for nothing in between.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use super::Cuda;
use super::device::Device;
use super::events::Event;
use crate::backend::{BackendError, Measured, Measuring, Work};

type Result<T> = std::result::Result<T, BackendError>;

/// The events of a measurement, and those of earlier ones to use again.
#[derive(Default)]
pub(super) struct Timing {
    running: Cell<bool>,
    events: RefCell<Events>,
}

#[derive(Default)]
struct Events {
    /// When the measurement began, on the GPU and on the host.
    began: Option<(Event, Instant)>,
    stamps: Vec<Event>,
    /// Begin and end of what was queued.
    work: Vec<(Work, Event, Event)>,
    spare: Vec<Event>,
}

impl Measuring for Cuda {
    fn measure(&self) -> Result<()> {
        self.device.measure()
    }

    fn stamp(&self) -> Result<()> {
        self.device.stamp()
    }

    fn measured(&self) -> Result<Measured> {
        self.device.measured()
    }
}

impl Device {
    /// Begins to measure, when everything queued is done: then the GPU reaches the first event at once, and
    /// the host knows when.
    ///
    /// # Errors
    /// The device fails.
    pub fn measure(&self) -> Result<()> {
        self.synchronize()?;
        let base = self.timed_event()?;
        self.wait_for(&base)?;
        let mut events = self.timing().events.borrow_mut();
        events.began = Some((base, Instant::now()));
        self.timing().running.set(true);
        Ok(())
    }

    /// Notes when everything queued so far is done, where it measures.
    ///
    /// # Errors
    /// The device fails.
    pub fn stamp(&self) -> Result<()> {
        if !self.timing().running.get() {
            return Ok(());
        }
        let event = self.timed_event()?;
        self.timing().events.borrow_mut().stamps.push(event);
        Ok(())
    }

    /// Queues something that counts as `work`. When nothing is measured, that is one look at a flag more.
    ///
    /// # Errors
    /// Those of `queue`, or the device fails.
    pub fn counted<R, E: From<BackendError>>(
        &self,
        work: Work,
        queue: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        if !self.timing().running.get() {
            return queue();
        }
        let begin = self.timed_event()?;
        let queued = queue()?;
        let end = self.timed_event()?;
        let mut events = self.timing().events.borrow_mut();
        events.work.push((work, begin, end));
        Ok(queued)
    }

    /// Waits for everything queued and reads what was measured; where it was not begun, nothing was.
    ///
    /// # Errors
    /// The device fails.
    pub fn measured(&self) -> Result<Measured> {
        self.timing().running.set(false);
        let mut events = self.timing().events.borrow_mut();
        let Some((base, began)) = events.began.take() else {
            return Ok(Measured::nothing());
        };
        self.synchronize()?;
        let mut measured = Measured {
            began,
            ..Measured::nothing()
        };
        let Events {
            stamps,
            work,
            spare,
            ..
        } = &mut *events;
        for event in stamps.drain(..) {
            measured.stamps.push(event.seconds_since(self, &base)?);
            spare.push(event);
        }
        for (work, begin, end) in work.drain(..) {
            measured.work.count(work, end.seconds_since(self, &begin)?);
            spare.extend([begin, end]);
        }
        spare.push(base);
        Ok(measured)
    }

    /// A timing event behind everything queued.
    fn timed_event(&self) -> Result<Event> {
        let spare = self.timing().events.borrow_mut().spare.pop();
        let event = match spare {
            Some(event) => event,
            None => Event::timed(self)?,
        };
        event.record(self, self.stream())?;
        Ok(event)
    }
}
