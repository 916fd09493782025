//! Sketches against dense deltas in float64.

use std::collections::BTreeMap;

use super::*;
use crate::dtype::Dtype;

/// Values between -1 and 1.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let stream = Counter::new(seed, "test");
    (0..count as u64).map(|i| (2.0 * stream.uniform(i) - 1.0) as f32).collect()
}

fn tensor(shape: &[usize], values: &[f32]) -> Tensor {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Tensor::constant(Dtype::F32, shape.to_vec(), bytes)
}

fn random(seed: u64, shape: &[usize]) -> Tensor {
    tensor(shape, &noise(seed, shape.iter().product()))
}

fn module(kind: Kind, scale: f64, tensors: &[(Slot, Tensor)]) -> Module {
    let mut module = Module::new(kind, tensors.iter().cloned().collect::<BTreeMap<_, _>>());
    module.scale = scale;
    module
}

/// a @ b, from the definition.
fn product(a: &Tensor, b: &Tensor) -> Vec<Vec<f64>> {
    let (x, y, inner, cols) = (a.to_f64(), b.to_f64(), a.cols(), b.cols());
    let entry = |i: usize, j: usize| (0..inner).map(|k| x[i * inner + k] * y[k * cols + j]).sum();
    (0..a.rows()).map(|i| (0..cols).map(|j| entry(i, j)).collect()).collect()
}

/// u_k^T D v_k, from the definition, with signs one by one.
fn probed(delta: &[Vec<f64>], name: &str) -> Vec<f64> {
    let (rows, cols) = (Signs::new(name, "rows"), Signs::new(name, "cols"));
    let bit = |signs: &Signs, i: usize, k: usize| if signs.0.bits(i as u64) >> k & 1 == 1 { -1.0 } else { 1.0 };
    let term = |k: usize, i: usize, j: usize, d: f64| bit(&rows, i, k) * d * bit(&cols, j, k);
    let line = |k: usize, i: usize, row: &[f64]| row.iter().enumerate().map(|(j, d)| term(k, i, j, *d)).sum::<f64>();
    (0..PROBES).map(|k| delta.iter().enumerate().map(|(i, row)| line(k, i, row)).sum()).collect()
}

fn agrees(module: &Module, delta: &[Vec<f64>]) {
    let found = of_module(module, "a.b");
    let wanted = probed(delta, "a.b");
    let size = wanted.iter().map(|x| x.abs()).fold(0.0, f64::max);
    assert!(size > 0.0 && found.complete);
    for (x, y) in found.values.iter().zip(&wanted) {
        assert!((x - y).abs() <= 1e-6 * size, "{x} {y}");
    }
}

fn scaled(delta: Vec<Vec<f64>>, factor: f64) -> Vec<Vec<f64>> {
    delta.into_iter().map(|row| row.into_iter().map(|x| x * factor).collect()).collect()
}

#[test]
fn factors_give_what_the_dense_delta_gives() {
    let (up, down) = (random(1, &[700, 3]), random(2, &[3, 530]));
    let lora = module(Kind::Lora, 0.25, &[(Slot::Up, up.clone()), (Slot::Down, down.clone())]);
    agrees(&lora, &scaled(product(&up, &down), 0.25));
}

#[test]
fn every_kind_gives_what_its_dense_delta_gives() {
    let parts = [random(1, &[9, 2]), random(2, &[2, 7]), random(3, &[9, 2]), random(4, &[2, 7])];
    let (one, two) = (product(&parts[0], &parts[1]), product(&parts[2], &parts[3]));
    let both =
        one.iter().zip(&two).map(|(x, y)| x.iter().zip(y).map(|(a, b)| 2.0 * a * b).collect()).collect::<Vec<_>>();
    let slots = [Slot::HadaW1A, Slot::HadaW1B, Slot::HadaW2A, Slot::HadaW2B];
    let tensors: Vec<(Slot, Tensor)> = slots.into_iter().zip(parts).collect();
    agrees(&module(Kind::Loha, 2.0, &tensors), &both);

    let (w1, w2a, w2b) = (random(5, &[3, 2]), random(6, &[4, 2]), random(7, &[2, 5]));
    let inner = product(&w2a, &w2b);
    let outer = w1.to_f64();
    let kron: Vec<Vec<f64>> =
        (0..12).map(|i| (0..10).map(|j| 0.5 * outer[i / 4 * 2 + j / 5] * inner[i % 4][j % 5]).collect()).collect();
    let tensors = [(Slot::LokrW1, w1), (Slot::LokrW2A, w2a), (Slot::LokrW2B, w2b)];
    agrees(&module(Kind::Lokr, 0.5, &tensors), &kron);

    let full = random(8, &[6, 11]);
    let rows: Vec<Vec<f64>> = full.to_f64().chunks(11).map(<[f64]>::to_vec).collect();
    agrees(&module(Kind::Full, 1.0, &[(Slot::Diff, full)]), &rows);
}

#[test]
fn what_cannot_be_seen_is_said() {
    let plain = [(Slot::Up, random(1, &[4, 2])), (Slot::Down, random(2, &[2, 3]))];
    let mut dora = plain.to_vec();
    dora.push((Slot::Magnitude, random(3, &[4])));
    let of = |tensors: &[(Slot, Tensor)]| of_module(&module(Kind::Lora, 1.0, tensors), "a");
    assert_eq!(of(&dora).values, of(&plain).values);
    assert!(!of(&dora).complete && of(&plain).complete);
    let nan = [(Slot::Up, tensor(&[4, 1], &[f32::NAN; 4])), (Slot::Down, random(2, &[1, 3]))];
    assert!(!of(&nan).complete && of(&nan).values == [0.0; PROBES]);
    let mut biased = plain.to_vec();
    biased.push((Slot::DiffB, random(4, &[4])));
    assert!(of(&biased).values != of(&plain).values && of(&biased).complete);
}

/// An adapter of several modules: sums of sketches, and all elements of all deltas.
fn adapter(seed: u64, other: f64) -> (DeltaSketch, Vec<f64>) {
    let (mut out, mut all) = (DeltaSketch::empty(), Vec::new());
    for m in 0..12 {
        let mixed = |side: u64, shape: &[usize]| {
            let count = shape.iter().product();
            let (x, y) = (noise(100 * side + m, count), noise(1000 * seed + 100 * side + m, count));
            let mix = |(x, y): (&f32, &f32)| ((1.0 - other) * f64::from(*x) + other * f64::from(*y)) as f32;
            tensor(shape, &x.iter().zip(&y).map(mix).collect::<Vec<_>>())
        };
        let (up, down) = (mixed(1, &[40, 4]), mixed(2, &[4, 30]));
        all.extend(product(&up, &down).into_iter().flatten());
        let part = of_module(&module(Kind::Lora, 1.0, &[(Slot::Up, up), (Slot::Down, down)]), &format!("block.{m}"));
        add(&mut out.values, 1.0, &part.values);
    }
    (out, all)
}

#[test]
fn cosines_are_estimated_within_their_error() {
    let (first, x) = adapter(1, 0.0);
    let mut sum = 0.0;
    let cases = [(2, 0.01), (3, 0.05), (4, 0.1), (5, 0.3), (6, 0.5), (7, 1.0), (8, 1.0), (9, 0.03)];
    for (seed, other) in cases {
        let (second, y) = adapter(seed, other);
        let exact = dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt();
        let found = first.similarity(&second).expect("both do something");
        let deviation = (found.cosine - exact) / found.error;
        assert!(deviation.abs() < 4.0, "{exact} {found:?}");
        let theory = (1.0 - exact * exact) / (PROBES as f64).sqrt();
        assert!((0.4..2.5).contains(&(found.error / theory)), "{theory} {found:?}");
        sum += deviation * deviation;
    }
    // Squares of standard normal numbers: their mean is 1.
    assert!((0.1..3.0).contains(&(sum / cases.len() as f64)), "{sum}");
}

#[test]
fn multiples_are_told_exactly() {
    let (first, _) = adapter(1, 0.0);
    let mut second = first.clone();
    second.values.iter_mut().for_each(|x| *x *= -0.8);
    let found = first.similarity(&second).expect("both do something");
    assert!((found.cosine + 1.0).abs() < 1e-12 && (found.ratio + 0.8).abs() < 1e-12 && found.error < 1e-12);
    assert!((first.distance(&second) - 1.8).abs() < 1e-12);
    assert_eq!(first.distance(&first), 0.0);
    assert_eq!(first.similarity(&DeltaSketch::empty()), None);
}
