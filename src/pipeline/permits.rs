//! A `--threads` budget smaller than the number of stages.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::backend::Pulse;
use crate::comm::CommError;

/// How often a wait looks whether it is to give up.
const GLANCE: Duration = Duration::from_millis(20);

/// Lets at most so many stages compute at once.
pub struct Permits {
    free: Mutex<usize>,
    returned: Condvar,
}

/// The right to compute, until dropped.
pub struct Permit<'a>(&'a Permits);

impl Permits {
    /// `count` permits, at least one.
    pub fn new(count: usize) -> Self {
        Permits {
            free: Mutex::new(count.max(1)),
            returned: Condvar::new(),
        }
    }

    /// Waits for a permit. Never held while waiting for another stage.
    ///
    /// # Errors
    /// `pulse` was stopped meanwhile.
    pub fn acquire(&self, pulse: &Pulse) -> Result<Permit<'_>, CommError> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            if pulse.is_stopped() {
                return Err(CommError::Stopped);
            }
            let waited = self.returned.wait_timeout(free, GLANCE);
            (free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Ok(Permit(self))
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.returned.notify_one();
    }
}
