//! The safetensors header: 8 bytes of length, then JSON. Everything is checked before anything is allocated from it.
//!
//! The format is that of the `safetensors` project; unlike its crate this reader keeps the order of tensors and
//! metadata, refuses duplicate names, and names the offending tensor in every error.

use std::fmt;
use std::ops::Range;

use rustc_hash::FxHashSet;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::dtype::Dtype;
use crate::error::{Code, Error, Result};

/// Longest header that is read, in bytes; the limit of the format's own implementation.
pub const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The key.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape, outermost dimension first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes are, counted from the start of the file.
    pub range: Range<usize>,
}

/// A checked header: the ranges of its tensors tile the body without gap or overlap.
#[derive(Debug, Clone, Default)]
pub struct Header {
    /// The `__metadata__` entries in the file's order.
    pub metadata: Vec<(String, String)>,
    /// The tensors in the file's order.
    pub tensors: Vec<TensorInfo>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

#[derive(Default)]
struct RawHeader {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, RawTensor)>,
}

/// A JSON object as pairs, in order and with repetitions.
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut raw = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        let pairs: Pairs =
                            map.next_value().map_err(|e| A::Error::custom(format!("`__metadata__`: {e}")))?;
                        raw.metadata.extend(pairs.0);
                    } else {
                        let tensor = map.next_value().map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
                        raw.tensors.push((name, tensor));
                    }
                }
                Ok(raw)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads and checks the header of a whole file's bytes. Copies names and metadata, never tensor bytes.
pub fn parse(file: &[u8]) -> Result<Header> {
    let json = header_bytes(file)?;
    let raw: RawHeader = serde_json::from_slice(json)
        .map_err(|e| Error::new(Code::InvalidHeader, format!("the header is not valid: {e}")))?;
    check_unique(&raw)?;
    let body = 8 + json.len();
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    for (name, tensor) in raw.tensors {
        tensors.push(check_tensor(name, &tensor, body)?);
    }
    check_tiling(&tensors, body, file.len())?;
    Ok(Header { metadata: raw.metadata, tensors })
}

/// Reads and checks a header by itself, without the body that its ranges point into.
pub(crate) fn parse_head(head: &[u8]) -> Result<Header> {
    let json = header_bytes(head)?;
    let raw: RawHeader = serde_json::from_slice(json)
        .map_err(|e| Error::new(Code::InvalidHeader, format!("the header is not valid: {e}")))?;
    check_unique(&raw)?;
    let body = 8 + json.len();
    let tensors: Vec<TensorInfo> =
        raw.tensors.into_iter().map(|(name, tensor)| check_tensor(name, &tensor, body)).collect::<Result<_>>()?;
    let end = tensors.iter().map(|t| t.range.end).max().unwrap_or(body);
    check_tiling(&tensors, body, end)?;
    Ok(Header { metadata: raw.metadata, tensors })
}

fn header_bytes(file: &[u8]) -> Result<&[u8]> {
    if file.is_empty() {
        return Err(Error::new(Code::Truncated, "the file is empty"));
    }
    let starts_json = file.get(8) == Some(&b'{');
    if !starts_json && (file.starts_with(b"PK\x03\x04") || (file[0] == 0x80 && matches!(file.get(1), Some(2..=5)))) {
        return Err(Error::new(Code::Pickle, "this is a Python pickle, which can run any code when it is opened"));
    }
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(Error::new(Code::NotSafetensors, "the file is shorter than the 8 bytes of a header length"));
    };
    let length = u64::from_le_bytes(*length);
    // A text or image file read as a length gives an absurd one: say what it is rather than how long it would be.
    if !starts_json && length > MAX_HEADER {
        return Err(Error::new(Code::NotSafetensors, "the file does not start like a safetensors file"));
    }
    if length > MAX_HEADER {
        return Err(Error::new(
            Code::HeaderTooLarge,
            format!("the header claims {length} bytes; the limit is {MAX_HEADER}"),
        ));
    }
    let length = length as usize;
    rest.get(..length).ok_or_else(|| {
        Error::new(
            Code::HeaderTooLarge,
            format!("the header claims {length} bytes, the file has {} after the length", rest.len()),
        )
    })
}

fn check_unique(raw: &RawHeader) -> Result<()> {
    let mut seen = FxHashSet::default();
    for (name, _) in &raw.tensors {
        if !seen.insert(name.as_str()) {
            return Err(Error::new(Code::DuplicateKey, format!("the header names `{name}` twice")).key(name));
        }
    }
    seen.clear();
    for (name, _) in &raw.metadata {
        if !seen.insert(name.as_str()) {
            return Err(Error::new(Code::DuplicateKey, format!("the metadata names `{name}` twice")).key(name));
        }
    }
    Ok(())
}

fn check_tensor(name: String, raw: &RawTensor, body: usize) -> Result<TensorInfo> {
    let bad = |code, message: String| Err(Error::new(code, message).key(&name));
    let Some(dtype) = Dtype::from_name(&raw.dtype) else {
        return bad(Code::InvalidHeader, format!("`{name}` has the unknown dtype `{}`", raw.dtype));
    };
    // The dimensions that are not zero must fit too: products of some of them are taken later.
    let product = |dims: &[u64]| dims.iter().try_fold(dtype.size() as u64, |n, &d| n.checked_mul(d));
    let nonzero: Vec<u64> = raw.shape.iter().copied().filter(|&d| d > 0).collect();
    let (Some(bytes), Some(_)) = (product(&raw.shape), product(&nonzero)) else {
        return bad(Code::InvalidOffsets, format!("`{name}` has a shape whose size overflows: {:?}", raw.shape));
    };
    let (start, end) = raw.data_offsets;
    if start > end {
        return bad(Code::InvalidOffsets, format!("`{name}` ends before it starts: {start}..{end}"));
    }
    if end - start != bytes {
        return bad(
            Code::InvalidOffsets,
            format!("`{name}` is {} of shape {:?}, {bytes} bytes, but spans {}", dtype.name(), raw.shape, end - start),
        );
    }
    let absolute = |offset: u64| usize::try_from(offset).ok().and_then(|o| o.checked_add(body));
    let (Some(start), Some(end)) = (absolute(start), absolute(end)) else {
        return bad(Code::InvalidOffsets, format!("`{name}` has offsets out of range: {start}..{end}"));
    };
    let shape = raw.shape.iter().map(|&d| d as usize).collect();
    Ok(TensorInfo { name, dtype, shape, range: start..end })
}

fn check_tiling(tensors: &[TensorInfo], body: usize, len: usize) -> Result<()> {
    let mut sorted: Vec<&TensorInfo> = tensors.iter().collect();
    sorted.sort_by_key(|t| (t.range.start, t.range.end));
    let mut at = body;
    for t in sorted {
        if t.range.start != at {
            let what = if t.range.start < at { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(Error::new(Code::InvalidOffsets, format!("`{}` {what}", t.name)).key(&t.name));
        }
        if t.range.end > len {
            let message = format!("`{}` ends at byte {}, the file at {len}", t.name, t.range.end);
            return Err(Error::new(Code::Truncated, message).key(&t.name));
        }
        at = t.range.end;
    }
    if at != len {
        let message = format!("{} bytes follow the last tensor", len - at);
        return Err(Error::new(Code::InvalidOffsets, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, body: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + body, 0);
        bytes
    }

    fn code(bytes: &[u8]) -> &'static str {
        parse(bytes).err().map_or("ok", |e| e.code().as_str())
    }

    #[test]
    fn reads_order_and_metadata() {
        let json = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"z":"1","a":"2"},"a":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}"#;
        let header = parse(&file(json, 10)).expect("valid");
        assert_eq!(header.tensors[0].name, "b");
        assert_eq!(header.tensors[1].shape, Vec::<usize>::new());
        assert_eq!(header.metadata[0].0, "z");
    }

    #[test]
    fn refuses_what_is_wrong() {
        let t = |offsets: &str, shape: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (vec![], "truncated"),
            (vec![1, 2, 3], "not-safetensors"),
            (b"PK\x03\x04aaaaaaaaaa".to_vec(), "pickle-file"),
            (b"\x80\x02}q\x00.aaaaaaa".to_vec(), "pickle-file"),
            (b"\x89PNG\r\n\x1a\n0000".to_vec(), "not-safetensors"),
            (u64::MAX.to_le_bytes().into_iter().chain(*b"{}").collect(), "header-too-large"),
            (1000u64.to_le_bytes().into_iter().chain(*b"{}").collect(), "header-too-large"),
            (file("{", 0), "invalid-header"),
            (file("[]", 0), "invalid-header"),
            (file(r#"{"__metadata__":{"a":1}}"#, 0), "invalid-header"),
            (file(r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#, 4), "invalid-header"),
            (file(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4), "invalid-header"),
            (file(&t("[0,4]", "[1]"), 0), "truncated"),
            (file(&t("[0,4]", "[1]"), 8), "invalid-offsets"),
            (file(&t("[4,8]", "[1]"), 8), "invalid-offsets"),
            (file(&t("[4,0]", "[1]"), 8), "invalid-offsets"),
            (file(&t("[0,8]", "[1]"), 8), "invalid-offsets"),
            (file(&t("[0,4]", "[4294967296,4294967296,4294967296]"), 8), "invalid-offsets"),
            (file(&t("[18446744073709551611,18446744073709551615]", "[1]"), 8), "invalid-offsets"),
            (
                file(
                    r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
                    3,
                ),
                "invalid-offsets",
            ),
            (
                file(
                    r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
                    2,
                ),
                "duplicate-key",
            ),
        ];
        for (bytes, want) in cases {
            assert_eq!(code(&bytes), want, "{:?}", String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn accepts_empty_tensors_and_no_tensors() {
        assert_eq!(code(&file("{}", 0)), "ok");
        assert_eq!(code(&file(r#"{"a":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}}"#, 0)), "ok");
    }
}
