//! The libFuzzer entry of the target of the same name.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lorafmt_fuzz::decode_accounts_for_every_tensor(data));
