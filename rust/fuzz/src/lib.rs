//! Fuzz targets, each a function of bytes that panics when its property does not hold.
//!
//! `tests/brief.rs` runs them for a few seconds on a fixed set of inputs; `fuzz_targets/` hands them to libFuzzer.

mod bytes;
mod files;
mod header;
mod round_trip;

pub use files::{decode_accounts_for_every_tensor, encode_gives_every_tensor_a_fate};
pub use header::header_parse_never_panics;
pub use round_trip::round_trip_keeps_deltas;
