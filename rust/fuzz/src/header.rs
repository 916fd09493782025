//! The safetensors header.

use std::path::Path;

use lorafmt_core::io::{Source, parse};

/// Any bytes are a valid file or an error; the ranges of a valid one tile what follows its header.
pub fn header_parse_never_panics(data: &[u8]) {
    let Ok(header) = parse(data) else { return };
    let mut ranges: Vec<_> = header.tensors.iter().map(|t| t.range.clone()).collect();
    ranges.sort_by_key(|r| (r.start, r.end));
    assert!(ranges.windows(2).all(|w| w[0].end == w[1].start), "a gap or an overlap: {ranges:?}");
    assert!(ranges.last().is_none_or(|r| r.end == data.len()), "the last tensor ends elsewhere than the file");
    for tensor in &header.tensors {
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.range.len(), elements * tensor.dtype.size(), "{}", tensor.name);
    }
    let source = Source::from_bytes(Path::new("fuzz"), Box::new(data.to_vec())).expect("it was valid just now");
    for (index, tensor) in header.tensors.iter().enumerate() {
        assert_eq!(source.bytes(index).len(), tensor.range.len(), "{}", tensor.name);
    }
}
