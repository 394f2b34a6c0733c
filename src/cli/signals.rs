//! Ctrl-C and SIGTERM: the first asks, the second insists.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// A flag that the first SIGINT or SIGTERM sets; the second exits at once with code 130.
pub(super) fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the exit looks at the flag before the same signal sets it.
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// Ctrl-C in a conversation: during an answer the first stops it; at any other time it exits at once
/// with code 130.
pub(super) struct AnswerStop {
    stop: Arc<AtomicBool>,
    /// Whether the next signal exits.
    exits: Arc<AtomicBool>,
}

impl AnswerStop {
    pub(super) fn register() -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let exits = Arc::new(AtomicBool::new(true));
        // In this order: the exit looks at the flag before the same signal sets it.
        flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&exits))?;
        flag::register(SIGINT, Arc::clone(&stop))?;
        flag::register(SIGINT, Arc::clone(&exits))?;
        Ok(AnswerStop { stop, exits })
    }

    /// Gives an answer with a flag that the first signal sets; whether it was set.
    pub(super) fn during<R>(&self, answer: impl FnOnce(&AtomicBool) -> R) -> (R, bool) {
        self.stop.store(false, Ordering::Relaxed);
        self.exits.store(false, Ordering::Relaxed);
        let result = answer(&self.stop);
        self.exits.store(true, Ordering::Relaxed);
        (result, self.stop.swap(false, Ordering::Relaxed))
    }
}
