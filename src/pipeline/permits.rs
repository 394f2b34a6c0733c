//! A `--threads` budget smaller than the number of stages.

use std::sync::{Condvar, Mutex, PoisonError};

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
    pub fn acquire(&self) -> Permit<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self
            .returned
            .wait_while(free, |free| *free == 0)
            .unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Permit(self)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.returned.notify_one();
    }
}
