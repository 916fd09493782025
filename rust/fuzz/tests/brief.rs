//! Every target on a fixed set of pseudo-random inputs, for a few seconds. The same inputs on every machine.
#![allow(clippy::print_stderr, missing_docs)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

fn run(target: fn(&[u8]), count: usize, mut input: impl FnMut(&mut Random) -> Vec<u8>) {
    // `LORAFMT_FUZZ_SCALE=100` searches a hundred times as long.
    let scale = std::env::var("LORAFMT_FUZZ_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let mut random = Random(1);
    for _ in 0..count * scale {
        let data = input(&mut random);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(&data))) {
            let hex: String = data.iter().map(|b| format!("{b:02x}")).collect();
            eprintln!("failing input: {hex}");
            resume_unwind(panic);
        }
    }
}

/// Bytes with some small numbers among them, which decide more than large ones.
fn decisions(random: &mut Random) -> Vec<u8> {
    let count = 16 + random.below(600);
    let mut data = random.bytes(count);
    for byte in &mut data {
        if random.below(4) == 0 {
            *byte %= 8;
        }
    }
    data
}

/// A valid header with a few bytes changed, inserted, removed or repeated.
fn headers(random: &mut Random) -> Vec<u8> {
    const SEEDS: [(&str, usize); 4] = [
        ("{}", 0),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8),
        (
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},"a":{"dtype":"F8_E4M3","shape":[2,3],"data_offsets":[2,8]}}"#,
            8,
        ),
        (
            r#"{"a":{"dtype":"I64","shape":[0,4],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
            1,
        ),
    ];
    let (json, body) = SEEDS[random.below(SEEDS.len())];
    let mut text = json.as_bytes().to_vec();
    let whole = random.below(2) == 0;
    if whole {
        mutate(random, &mut text);
    }
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text);
    file.resize(file.len() + body, 0);
    if !whole {
        mutate(random, &mut file);
    }
    file
}

fn mutate(random: &mut Random, data: &mut Vec<u8>) {
    const PIECES: [&[u8]; 10] =
        [b"18446744073709551615", b"-1", b"1e9", b"0", b"\"", b"\\u0000", b"}", b"[", b"\xff", b"PK\x03\x04"];
    for _ in 0..1 + random.below(3) {
        let at = random.below(data.len() + 1);
        match random.below(5) {
            0 if at < data.len() => data[at] = random.next() as u8,
            1 if at < data.len() => drop(data.remove(at)),
            2 => drop(data.splice(at..at, PIECES[random.below(PIECES.len())].iter().copied())),
            3 => data.truncate(at),
            _ => {
                let end = (at + random.below(24)).min(data.len());
                let copy = data[at..end].to_vec();
                drop(data.splice(at..at, copy));
            }
        }
    }
}

#[test]
fn header_parse_never_panics() {
    run(lorafmt_fuzz::header_parse_never_panics, 200_000, headers);
}

#[test]
fn decode_accounts_for_every_tensor() {
    run(lorafmt_fuzz::decode_accounts_for_every_tensor, 5_000, decisions);
}

#[test]
fn encode_gives_every_tensor_a_fate() {
    run(lorafmt_fuzz::encode_gives_every_tensor_a_fate, 5_000, decisions);
}

#[test]
fn round_trip_keeps_deltas() {
    run(lorafmt_fuzz::round_trip_keeps_deltas, 3_000, |random| {
        let count = 64 + random.below(4000);
        random.bytes(count)
    });
}
