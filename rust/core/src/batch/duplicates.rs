//! Files of the same content: one is converted, the others get its output.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use super::manifest::Record;
use crate::error::{Error, Result};

/// The file that was converted.
#[derive(Debug)]
pub(super) struct Original {
    pub record: Record,
    /// Where its content is, to be compared; `None` where the store vouches for it.
    pub source: Option<PathBuf>,
    /// Its name, where the result depends on that.
    pub stem: Option<String>,
}

#[derive(Debug)]
enum State {
    Working,
    Done(Arc<Original>),
}

/// What is being made of which content.
#[derive(Debug, Default)]
pub(super) struct Contents {
    states: Mutex<FxHashMap<u128, State>>,
    changed: Condvar,
}

/// The right to convert a content. Dropping it without a result lets the next one try.
pub(super) struct Claim<'c> {
    contents: &'c Contents,
    key: Option<u128>,
}

impl Contents {
    /// The file whose content has that hash, when it is done; or the claim to be that file.
    ///
    /// Waits while another thread converts it. That thread holds one claim and waits for none, so this ends.
    pub(super) fn claim(&self, key: u128) -> Result<Arc<Original>, Claim<'_>> {
        let mut states = self.lock();
        loop {
            match states.get(&key) {
                Some(State::Done(original)) => return Ok(Arc::clone(original)),
                Some(State::Working) => states = self.changed.wait(states).unwrap_or_else(PoisonError::into_inner),
                None => {
                    states.insert(key, State::Working);
                    return Err(Claim { contents: self, key: Some(key) });
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<u128, State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim<'_> {
    /// It is converted.
    pub(super) fn settle(mut self, original: Original) {
        if let Some(key) = self.key.take() {
            self.contents.lock().insert(key, State::Done(Arc::new(original)));
            self.contents.changed.notify_all();
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.contents.lock().remove(&key);
            self.contents.changed.notify_all();
        }
    }
}

/// Whether two files hold the same bytes.
pub(super) fn same(one: &Path, other: &Path) -> Result<bool> {
    let open = |path: &Path| File::open(path).map_err(|e| Error::io(path, "open the file", e));
    let (mut a, mut b) = (open(one)?, open(other)?);
    let (mut left, mut right) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    loop {
        let n = fill(&mut a, &mut left).map_err(|e| Error::io(one, "read the file", e))?;
        let m = fill(&mut b, &mut right).map_err(|e| Error::io(other, "read the file", e))?;
        if left[..n] != right[..m] {
            return Ok(false);
        }
        if n == 0 {
            return Ok(true);
        }
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}
