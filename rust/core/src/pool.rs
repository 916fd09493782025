//! Things that are used again.

use std::sync::{Mutex, PoisonError};

/// As many of a thing as threads use at the same time. Thread pools make their own for every piece of work, and a large
/// buffer that is new is filled with zeros each time.
#[derive(Debug, Default)]
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T: Default> Pool<T> {
    /// Lends one, as it was left the last time. What a panic interrupts is dropped.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut one = lock().pop().unwrap_or_default();
        let result = work(&mut one);
        lock().push(one);
        result
    }
}
