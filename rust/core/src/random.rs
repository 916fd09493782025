//! Random numbers by their place: the same seed, name and index give the same number, in whatever order they are asked
//! for and by however many threads.

use sha2::{Digest, Sha256};

/// Multipliers and key increments of Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// A stream of independent random numbers that is read at any index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    key: [u32; 2],
    stream: [u32; 2],
}

impl Counter {
    /// The stream of a seed and a name. Names are told apart by 64 bits of their SHA-256.
    pub fn new(seed: u64, name: &str) -> Self {
        let hash = Sha256::digest(name.as_bytes());
        let stream = u64::from_le_bytes(std::array::from_fn(|i| hash[i]));
        Self { key: halves(seed), stream: halves(stream) }
    }

    /// Number `index`, uniform in [0, 1), with 53 random bits.
    pub fn uniform(&self, index: u64) -> f64 {
        let [a, b, ..] = self.block(index);
        fraction(a, b)
    }

    /// Number `index`, of the standard normal distribution (Box and Muller 1958).
    pub fn normal(&self, index: u64) -> f64 {
        let [a, b, c, d] = self.block(index);
        let radius = (-2.0 * (1.0 - fraction(a, b)).ln()).sqrt();
        radius * (std::f64::consts::TAU * fraction(c, d)).cos()
    }

    /// Number `index`, 64 random bits.
    pub fn bits(&self, index: u64) -> u64 {
        let [a, b, ..] = self.block(index);
        u64::from(b) << 32 | u64::from(a)
    }

    fn block(&self, index: u64) -> [u32; 4] {
        let [low, high] = halves(index);
        philox([low, high, self.stream[0], self.stream[1]], self.key)
    }
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// 53 bits of 64 as a number in [0, 1).
fn fraction(low: u32, high: u32) -> f64 {
    ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 * 2f64.powi(-53)
}

/// Philox4x32-10: a bijection of the counter for every key.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [low0, high0] = halves(u64::from(MULTIPLIERS[0]) * u64::from(counter[0]));
        let [low1, high1] = halves(u64::from(MULTIPLIERS[1]) * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the authors' Random123 (`kat_vectors`).
    #[test]
    fn philox_is_philox() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn numbers_have_their_distribution() {
        let n = 100_000u64;
        let stream = Counter::new(7, "a");
        let moments = |f: &dyn Fn(u64) -> f64| {
            let mean = (0..n).map(f).sum::<f64>() / n as f64;
            (mean, (0..n).map(|i| (f(i) - mean).powi(2)).sum::<f64>() / n as f64)
        };
        let (mean, variance) = moments(&|i| stream.uniform(i));
        assert!((mean - 0.5).abs() < 4e-3 && (variance - 1.0 / 12.0).abs() < 2e-3, "{mean} {variance}");
        let (mean, variance) = moments(&|i| stream.normal(i));
        assert!(mean.abs() < 1.3e-2 && (variance - 1.0).abs() < 2e-2, "{mean} {variance}");
        let fourth = (0..n).map(|i| stream.normal(i).powi(4)).sum::<f64>() / n as f64;
        assert!((fourth - 3.0).abs() < 0.15, "{fourth}");
        assert!((0..n).all(|i| (0.0..1.0).contains(&stream.uniform(i))));
    }

    #[test]
    fn streams_differ_in_seed_and_name() {
        let first = |seed, name| Counter::new(seed, name).uniform(3);
        assert_eq!(first(1, "a"), first(1, "a"));
        assert_ne!(first(1, "a"), first(2, "a"));
        assert_ne!(first(1, "a"), first(1, "b"));
    }
}
