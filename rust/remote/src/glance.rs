//! Looking at a file without fetching it: the header first, then the tensors that somebody asked for, by ranges.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt};
use lorafmt_core::io::{Control, MAX_HEADER, Source, Store};
use lorafmt_core::{Error, Result};

use crate::{Address, HubAddress, Remote, S3Address};

/// Bytes that are read at once at the beginning, where most headers end.
const HEAD: u64 = 64 << 10;

/// What a request costs, in bytes that could have been read in its time while others run beside it.
const REQUEST: u64 = 16 << 10;

/// Requests at a time.
const REQUESTS_AT_A_TIME: usize = 16;

/// Rounds of asking after which the whole file is fetched.
const MOST_ROUNDS: usize = 4;

/// A file at one version, of which ranges are read.
enum Place {
    Hub(HubAddress),
    /// With its ETag.
    S3(S3Address, String),
}

/// What is here of a file.
struct Partial {
    place: Place,
    url: String,
    size: u64,
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Remote {
    /// Calls `work` with a file of which only the header is here, and again with more of it as long as it asks for
    /// tensors that are not. Where that would be as much as fetching the file, it is fetched.
    ///
    /// `work` must look at the file only while it runs. Its result counts if it asked for nothing in vain.
    pub fn glance<T>(&self, url: &str, control: &Control, work: impl Fn(Arc<Source>) -> Result<T>) -> Result<T> {
        let url = self.file(url, control)?;
        let Some(mut partial) = self.head(&url, control).map_err(|e| e.at(Path::new(&url)))? else {
            return work(Arc::new(self.open(&url, control)?));
        };
        for _ in 0..MOST_ROUNDS {
            let source = Source::partial(Path::new(&url), partial.size, &partial.pieces)?;
            let source = Arc::new(source.with_beside(self.beside(&url)));
            let result = work(Arc::clone(&source));
            let missed = source.missed();
            if missed.is_empty() {
                return result;
            }
            let wanted = missed.iter().map(|&i| &source.tensors()[i].range);
            let ranges = joined(wanted.map(|r| r.start as u64..r.end as u64).collect());
            if cost(&ranges) > partial.size / 2 {
                break;
            }
            let read = self.block(control, self.parts(&partial.place, &ranges)).map_err(|e| e.at(Path::new(&url)))?;
            partial.pieces.extend(read);
        }
        work(Arc::new(self.open(&partial.url, control)?))
    }

    /// The header of a file; `None` if the file is in the cache, or too small to be worth it.
    fn head(&self, url: &str, control: &Control) -> Result<Option<Partial>> {
        let (place, size) = match Address::parse(url)? {
            Address::Hub(at) => match self.block(control, self.hub()?.ranged(&at))? {
                Ok((at, size)) => (Place::Hub(at), size),
                Err(_) => return Ok(None),
            },
            Address::S3(at) => match self.block(control, self.buckets().stat(&at))? {
                Some(object) => (Place::S3(at, object.version), object.size),
                // Fetching it says what is wrong.
                None => return Ok(None),
            },
        };
        if size <= 8 {
            return Ok(None);
        }
        let first = 0..HEAD.min(size);
        let mut pieces = self.block(control, self.parts(&place, std::slice::from_ref(&first)))?;
        if matches!(place, Place::Hub(_)) && !self.hub()?.knows_ranges() {
            return Ok(None);
        }
        let length = pieces.first().and_then(|(_, bytes)| bytes.first_chunk::<8>()).map(|b| u64::from_le_bytes(*b));
        // What makes no sense is left to the reader of headers, which says what.
        let end = length.filter(|&n| n <= MAX_HEADER).map_or(0, |n| n + 8).min(size);
        if end > first.end {
            let rest = self.block(control, self.parts(&place, std::slice::from_ref(&(first.end..end))))?;
            // One piece, so that nothing lies on a seam.
            if let (Some((_, head)), Some((_, more))) = (pieces.first_mut(), rest.into_iter().next()) {
                head.extend(more);
            }
        }
        Ok(Some(Partial { place, url: url.to_owned(), size, pieces }))
    }

    /// Ranges of a file, several at a time.
    async fn parts(&self, place: &Place, ranges: &[Range<u64>]) -> Result<Vec<(u64, Vec<u8>)>> {
        let read = |range: Range<u64>| async move {
            let start = range.start;
            let bytes = match place {
                Place::Hub(at) => self.hub()?.part(at, range).await?.0,
                Place::S3(at, etag) => self.buckets().part(at, etag, range).await?,
            };
            Ok::<_, Error>((start, bytes))
        };
        futures_util::stream::iter(ranges.iter().cloned().map(read)).buffered(REQUESTS_AT_A_TIME).try_collect().await
    }
}

/// Ranges in order; those between which it is cheaper to read on than to ask again are one.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|r| (r.start, r.end));
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end + REQUEST => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

/// What reading them costs, in bytes.
fn cost(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|r| r.end - r.start + REQUEST).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_ranges_are_read_at_once() {
        let far = 10 * REQUEST;
        assert_eq!(joined(vec![far..far + 4, 0..4, 8..12]), [0..12, far..far + 4]);
        assert_eq!(joined(vec![0..100, 10..20, far..far]), [0..100, far..far]);
        assert_eq!(cost(&joined(vec![0..4, far..far + 4])), 8 + 2 * REQUEST);
    }
}
