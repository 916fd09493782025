//! Files of which only some bytes are here: what `Source` needs to look at a header without its body.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::MmapOptions;

use super::header::TensorInfo;
use super::source::Bytes;
use crate::error::{Code, Error, Result};

/// Which tensors are here, and which others were asked for.
pub(super) struct Presence {
    here: Vec<bool>,
    asked: Vec<AtomicBool>,
}

impl Presence {
    /// Tensors whose bytes one of the pieces holds. Pieces neither overlap nor touch half a tensor that is needed whole:
    /// of two pieces that meet inside a tensor it counts as missing.
    pub(super) fn of(tensors: &[TensorInfo], pieces: &[(u64, Vec<u8>)]) -> Self {
        let covers = |(at, bytes): &(u64, Vec<u8>), range: &Range<usize>| {
            *at <= range.start as u64 && range.end as u64 <= at + bytes.len() as u64
        };
        let here = tensors.iter().map(|t| t.range.is_empty() || pieces.iter().any(|p| covers(p, &t.range))).collect();
        Self { here, asked: tensors.iter().map(|_| AtomicBool::new(false)).collect() }
    }

    /// Notes that somebody wants the bytes of a tensor.
    pub(super) fn ask(&self, index: usize) {
        if !self.here[index] {
            self.asked[index].store(true, Ordering::Relaxed);
        }
    }

    /// The tensors that were asked for in vain.
    pub(super) fn missed(&self) -> Vec<usize> {
        (0..self.asked.len()).filter(|&i| self.asked[i].load(Ordering::Relaxed)).collect()
    }
}

/// `len` bytes of zeros with the pieces at their places. Pages that nobody touches take no memory.
pub(super) fn sparse(len: u64, pieces: &[(u64, Vec<u8>)]) -> Result<Bytes> {
    let fail = |what: String| Error::new(Code::Io, format!("cannot hold a file of {len} bytes: {what}"));
    let size = usize::try_from(len).map_err(|e| fail(e.to_string()))?;
    if size == 0 {
        return Ok(Box::new(Vec::new()));
    }
    let mut map = MmapOptions::new().len(size).no_reserve_swap().map_anon().map_err(|e| fail(e.to_string()))?;
    for (at, bytes) in pieces {
        let start = usize::try_from(*at).unwrap_or(usize::MAX);
        let place = start.checked_add(bytes.len()).and_then(|end| map.get_mut(start..end));
        place.ok_or_else(|| fail(format!("a piece at {at} lies outside")))?.copy_from_slice(bytes);
    }
    Ok(Box::new(map))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::io::Source;

    fn file() -> Vec<u8> {
        let json = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[0],"data_offsets":[4,4]},"c":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}"#;
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend_from_slice(&[1, 2, 3, 4, 5, 6]);
        bytes
    }

    #[test]
    fn what_is_not_here_is_noted_when_it_is_asked_for() {
        let whole = file();
        let head = whole.len() - 6;
        let len = whole.len() as u64;
        let source = Source::partial(Path::new("x"), len, &[(0, whole[..head].to_vec())]).expect("a header");
        assert!(source.missed().is_empty());
        assert_eq!(source.bytes(1), [0u8; 0]);
        assert!(source.missed().is_empty());
        source.bytes(2);
        assert_eq!(source.missed(), [2]);
        assert_eq!(source.sha256(), None);

        let pieces = [(0, whole[..head].to_vec()), (len - 2, whole[head + 4..].to_vec())];
        let source = Source::partial(Path::new("x"), len, &pieces).expect("a header");
        assert_eq!(source.bytes(2), [5, 6]);
        assert!(source.missed().is_empty());
        source.bytes(0);
        assert_eq!(source.missed(), [0]);
    }

    #[test]
    fn a_header_that_is_wrong_is_an_error_as_in_a_whole_file() {
        let whole = file();
        let code = |len, pieces: &[(u64, Vec<u8>)]| {
            Source::partial(Path::new("x"), len, pieces).map(drop).map_err(|e| e.code().as_str())
        };
        let head = vec![(0, whole[..whole.len() - 6].to_vec())];
        assert_eq!(code(whole.len() as u64 - 1, &head), Err("truncated"));
        assert_eq!(code(whole.len() as u64 + 1, &head), Err("invalid-offsets"));
        assert_eq!(code(0, &[]), Err("truncated"));
        assert_eq!(code(4, &head), Err("io"));
    }
}
