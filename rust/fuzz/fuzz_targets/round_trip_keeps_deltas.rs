//! The libFuzzer entry of the target of the same name.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lorafmt_fuzz::round_trip_keeps_deltas(data));
