//! Checkpoints of a toy family: four-part rows, swapped halves, norms under two names.
#![allow(clippy::unwrap_used)]

mod checkpoint;
mod fuse;

use std::path::Path;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::io::{Control, Layout, WriteOptions, write_file};
use crate::plan::Output;
use crate::table::Registry;
use crate::tensor::Tensor;

/// The toy family and its dialects.
fn toy() -> Arc<Registry> {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/tables").join(name);
        std::fs::read_to_string(path).unwrap()
    };
    Registry::with_tables(&["toy.toml", "toy-fused.toml", "toy-split.toml"].map(read)).unwrap()
}

/// Small numbers that differ, exactly representable in every type.
fn values(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 60) as f64 - 7.5) / 8.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(dtype: Dtype, shape: &[usize], values: &[f64]) -> Tensor {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let exact = Tensor::constant(Dtype::F64, shape.to_vec(), bytes).cast(dtype);
    let mut bytes = Vec::new();
    exact.read_rows_into(0..exact.rows(), &mut bytes);
    Tensor::constant(dtype, shape.to_vec(), bytes)
}

/// FP8 codes that are numbers.
fn fp8(dtype: Dtype, shape: &[usize], seed: u64) -> Tensor {
    let count = shape.iter().product();
    let codes: Vec<u8> =
        values(count, seed).iter().enumerate().map(|(i, v)| (v * 64.0) as i8 as u8 ^ (i as u8 & 7)).collect();
    Tensor::constant(
        dtype,
        shape.to_vec(),
        codes.iter().map(|c| if c & 0x7c == 0x7c { c & 0x8f } else { *c }).collect::<Vec<u8>>(),
    )
}

fn save(path: &Path, tensors: &[(&str, Tensor)]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let outputs: Vec<Output> =
        tensors.iter().map(|(key, tensor)| Output { key: (*key).to_owned(), tensor: tensor.clone() }).collect();
    let layout = Layout::new(&outputs, &[]);
    write_file(path, &layout, WriteOptions { overwrite: true }, &Control::default()).unwrap();
}
