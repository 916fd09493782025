//! Hashes of contents.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};

/// Places of a file that are looked at, and bytes at each.
const PLACES: u64 = 16;
const PLACE: usize = 4096;

/// The text form of a hash.
pub(super) fn spelled(hash: u128) -> String {
    format!("xxh3:{hash:032x}")
}

/// The hash of that text form.
pub(super) fn parsed(text: &str) -> Option<u128> {
    u128::from_str_radix(text.strip_prefix("xxh3:")?, 16).ok()
}

/// The hash of a file's content, read in pieces.
pub(super) fn hash_file(path: &Path) -> Result<u128> {
    let mut file = File::open(path).map_err(|e| Error::io(path, "open the file", e))?;
    let mut state = Xxh3::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(state.digest128()),
            Ok(n) => state.update(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(path, "read the file", e)),
        }
    }
}

/// A hash of a file's size and of places from its first byte to its last. Files of one training script have one size
/// and one header, but other factors everywhere: this tells them apart without reading them.
pub(super) fn hash_places(path: &Path, size: u64) -> Result<u128> {
    if size <= PLACES * PLACE as u64 {
        return hash_file(path);
    }
    let fail = |e| Error::io(path, "read the file", e);
    let mut file = File::open(path).map_err(|e| Error::io(path, "open the file", e))?;
    let mut state = Xxh3::new();
    state.update(&size.to_le_bytes());
    let mut buffer = [0; PLACE];
    for place in 0..PLACES {
        let at = (size - PLACE as u64) / (PLACES - 1) * place;
        let at = if place == PLACES - 1 { size - PLACE as u64 } else { at };
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut buffer)).map_err(fail)?;
        state.update(&buffer);
    }
    Ok(state.digest128())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_at_the_first_bytes_and_at_the_last() {
        let folder = tempfile::tempdir().expect("a folder");
        let hash = |bytes: &[u8]| {
            let path = folder.path().join("file");
            std::fs::write(&path, bytes).expect("written");
            hash_places(&path, bytes.len() as u64).expect("read")
        };
        for size in [10, 65_536, 65_537, 1_000_003] {
            let plain = vec![0; size];
            for at in [0, size - 1] {
                let mut other = plain.clone();
                other[at] = 1;
                assert_ne!(hash(&plain), hash(&other), "{at} of {size}");
            }
            assert_eq!(hash(&plain), hash(&plain));
        }
    }
}
