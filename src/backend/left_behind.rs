//! Threads that nobody waits for any more.

use std::sync::atomic::{AtomicBool, Ordering};

static LEFT_BEHIND: AtomicBool = AtomicBool::new(false);

/// Notes that a thread hangs in a call that does not come back, and was given up.
pub fn leave_behind() {
    LEFT_BEHIND.store(true, Ordering::Release);
}

/// Whether this process has given up a thread. It cannot end in the ordinary way then: see
/// `cli::leave`.
pub fn any_left_behind() -> bool {
    LEFT_BEHIND.load(Ordering::Acquire)
}
