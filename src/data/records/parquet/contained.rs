//! Calls of the `parquet` crate, which panics on some damaged files: a panic becomes an error.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Calls into the crate; what it says of a file it cannot read, panics included. After an error
/// nothing of what `call` changed may be used.
pub(super) fn contained<T>(call: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    // A panic that is caught here is no news for the terminal; all others are reported as before.
    QUIET.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !CONTAINED.get() {
                report(panic);
            }
        }));
    });
    let outer = CONTAINED.replace(true);
    // What a panic leaves half-changed is not used again: the file ends with the error.
    let result = catch_unwind(AssertUnwindSafe(call));
    CONTAINED.set(outer);
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(format!("it is damaged ({error})")),
        Err(_) => Err("it is damaged (its pages do not fit its schema)".to_owned()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error() {
        let error = contained(|| -> parquet::errors::Result<()> { panic!("not to be seen") });
        assert!(error.unwrap_err().contains("damaged"));
        assert_eq!(contained(|| Ok(1)), Ok(1));
    }
}
