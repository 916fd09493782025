//! Merges of small modules against dense matrices.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::*;
use crate::linalg::{Tall, svd};
use crate::ops::factors::{Downs, Ups};
use crate::random::Counter;

const M: usize = 40;
const N: usize = 30;

fn noise(rows: usize, cols: usize, name: &str) -> Matrix {
    let noise = Counter::new(11, name);
    Matrix::from_fn(rows, cols, |i, j| noise.normal((i * cols + j) as u64))
}

fn tensor(matrix: &Matrix) -> Tensor {
    held(matrix, Dtype::F64, vec![matrix.rows(), matrix.cols()])
}

fn lora(up: &Matrix, down: &Matrix, scale: f64) -> Module {
    let mut module = Module::new(Kind::Lora, BTreeMap::from([(Slot::Up, tensor(up)), (Slot::Down, tensor(down))]));
    module.scale = scale;
    module
}

/// Three adapters of other ranks and scales.
fn adapters() -> Vec<(Matrix, Matrix, f64)> {
    let make = |(i, rank): (usize, usize)| {
        (noise(M, rank, &format!("up {i}")), noise(rank, N, &format!("down {i}")), [0.5, 1.0, -0.25][i])
    };
    [3, 5, 2].into_iter().enumerate().map(make).collect()
}

fn dense(module: &Module) -> Matrix {
    let (up, down) = (module.get(Slot::Up).unwrap(), module.get(Slot::Down).unwrap());
    let up = Ups(up).read(0..up.rows());
    let down = Downs(down).read(0..down.cols());
    up.times_transpose(&down).scaled_cols(&vec![module.scale; down.rows()])
}

fn difference(a: &Matrix, b: &Matrix) -> f64 {
    let values = a.data().iter().zip(b.data()).map(|(x, y)| x - y).collect();
    Matrix::new(a.rows(), a.cols(), values).norm() / b.norm().max(1e-300)
}

fn options(method: Method, space: Space) -> MergeOptions {
    let density = (method != Method::Linear).then_some(0.5);
    MergeOptions { space: Some(space), density, seed: 3, ..MergeOptions::new(method) }
}

fn run(modules: &[Module], weights: &[f64], options: &MergeOptions, rank: Option<usize>) -> Merged {
    options.check(modules.len()).unwrap();
    let terms: Vec<Weighted<'_>> = modules
        .iter()
        .zip(weights)
        .enumerate()
        .map(|(term, (module, &weight))| Weighted { module, weight, term })
        .collect();
    merge(&terms, options, "m", rank).unwrap()
}

const WEIGHTS: [f64; 3] = [0.8, -0.5, 1.2];

#[test]
fn core_results_do_not_depend_on_the_factors() {
    let plain: Vec<Module> = adapters().iter().map(|(up, down, s)| lora(up, down, *s)).collect();
    let turned = adapters().into_iter().enumerate().map(|(i, (up, down, s))| {
        // Any invertible matrix, not only an orthogonal one: up G and G^-1 down.
        let g = noise(up.cols(), up.cols(), &format!("g {i}"));
        let f = svd(&g).unwrap();
        let inverse: Vec<f64> = f.s.iter().map(|s| s.recip()).collect();
        lora(&up.times(&g), &f.v.scaled_cols(&inverse).times_transpose(&f.u).times(&down), s)
    });
    let turned: Vec<Module> = turned.collect();
    for method in Method::ALL.iter().filter(|m| **m != Method::Linear) {
        for sign in [None, Some(Sign::Frequency)] {
            let mut options = options(*method, Space::Core);
            options.sign = sign.filter(|_| options.election().is_some());
            let (a, b) = (run(&plain, &WEIGHTS, &options, None), run(&turned, &WEIGHTS, &options, None));
            let error = difference(&dense(&b.module), &dense(&a.module));
            assert!(error < 1e-9, "{}: {error}", method.name());
            assert!(a.report.norm.unwrap() > 0.0);
        }
    }
}

#[test]
fn whole_density_loses_nothing_in_the_core() {
    let modules: Vec<Module> = adapters().iter().map(|(up, down, s)| lora(up, down, *s)).collect();
    let whole = |method| MergeOptions { density: Some(1.0), ..options(method, Space::Core) };
    let one = run(&modules[..1], &[1.0], &whole(Method::Ties), None);
    assert!(difference(&dense(&one.module), &dense(&modules[0])) < 1e-12);
    assert_eq!(one.report.rank, Some(3));
    // Without an election nothing is left of the rule but the sum.
    let sum = run(&modules, &WEIGHTS, &whole(Method::DareLinear), None);
    let mut wanted = Matrix::zeros(M, N);
    for (module, weight) in modules.iter().zip(WEIGHTS) {
        wanted.add_product(weight, &dense(module), &Matrix::identity(N));
    }
    assert!(difference(&dense(&sum.module), &wanted) < 1e-12);
    assert_eq!(sum.report.rank, Some(10));
    assert!((sum.report.norm.unwrap() / wanted.norm() - 1.0).abs() < 1e-12);
}

/// Bases by dense decompositions, and TIES on them as PEFT has it, written a second time.
#[test]
fn core_ties_by_the_definition() {
    let modules: Vec<Module> = adapters().iter().map(|(up, down, s)| lora(up, down, *s)).collect();
    let deltas: Vec<Matrix> = modules.iter().map(dense).collect();
    let side = |of: &dyn Fn(&Matrix) -> Matrix| {
        let of: Vec<Matrix> = deltas.iter().map(of).collect();
        let (rows, cols) = (of[0].rows(), of[0].cols());
        let basis =
            svd(&Matrix::from_fn(rows, 3 * cols, |i, j| of[j / cols].get(i, j % cols))).unwrap().u.first_cols(10);
        let peak = |j: usize| {
            let column = (0..rows).map(|i| basis.get(i, j));
            column.fold(0.0f64, |most, x| if x.abs() > most.abs() { x } else { most }).signum()
        };
        let signs: Vec<f64> = (0..10).map(peak).collect();
        basis.scaled_cols(&signs)
    };
    let (left, right) = (side(&Matrix::clone), side(&Matrix::transposed));
    let cores: Vec<Vec<f64>> = deltas
        .iter()
        .map(|d| {
            let mut core = left.transpose_times(d).times(&right).into_data();
            let mut sizes: Vec<f64> = core.iter().map(|x| x.abs()).collect();
            sizes.sort_by(|a, b| b.total_cmp(a));
            core.iter_mut().for_each(|x| *x = if x.abs() >= sizes[49] { *x } else { 0.0 });
            core
        })
        .collect();
    let merged = (0..100).map(|i| {
        let positive = cores.iter().map(|c| c[i]).sum::<f64>() >= 0.0;
        let agreeing: Vec<usize> = (0..3).filter(|&t| cores[t][i] != 0.0 && (cores[t][i] > 0.0) == positive).collect();
        agreeing.iter().map(|&t| WEIGHTS[t] * cores[t][i]).sum::<f64>() / agreeing.len().max(1) as f64
    });
    let wanted = left.times(&Matrix::new(10, 10, merged.collect())).times_transpose(&right);
    let found = run(&modules, &WEIGHTS, &options(Method::Ties, Space::Core), None);
    assert!(difference(&dense(&found.module), &wanted) < 1e-10);
}

#[test]
fn stacks_of_fewer_directions_than_ranks() {
    let (up, down, _) = &adapters()[1];
    let one = lora(up, down, 1.0);
    let zero = lora(&Matrix::zeros(M, 2), &noise(2, N, "zero"), 1.0);
    let options = MergeOptions { density: Some(1.0), ..options(Method::Ties, Space::Core) };
    let twice = run(&[one.clone(), one.clone()], &[1.0, 1.0], &options, None);
    assert!(difference(&dense(&twice.module), &dense(&one)) < 1e-10);
    assert_eq!(twice.report.rank, Some(5));
    let padded = run(&[zero.clone(), one.clone()], &[1.0, 1.0], &options, None);
    assert!(difference(&dense(&padded.module), &dense(&one)) < 1e-10);
    let nothing = run(&[zero.clone(), zero], &[1.0, 1.0], &options, None);
    assert_eq!((dense(&nothing.module).norm(), nothing.report.rank), (0.0, Some(1)));
    let dropped = run(&[one], &[1.0], &MergeOptions { density: Some(0.0), ..options }, None);
    assert_eq!(dense(&dropped.module).norm(), 0.0);
}

#[test]
fn deltas_are_merged_whole_and_compressed() {
    let modules: Vec<Module> = adapters().iter().map(|(up, down, s)| lora(up, down, *s)).collect();
    let prune = options(Method::MagnitudePrune, Space::Delta);
    let mut wanted = Matrix::zeros(M, N);
    for (module, weight) in modules.iter().zip(WEIGHTS) {
        let mut delta = dense(module);
        let mut sizes: Vec<f64> = delta.data().iter().map(|x| x.abs()).collect();
        sizes.sort_by(|a, b| b.total_cmp(a));
        delta.data_mut().iter_mut().for_each(|x| *x = if x.abs() >= sizes[M * N / 2 - 1] { *x } else { 0.0 });
        wanted.add_product(weight, &delta, &Matrix::identity(N));
    }
    let whole = run(&modules, &WEIGHTS, &prune, Some(N));
    assert!(difference(&dense(&whole.module), &wanted) < 1e-6, "held in float64");
    assert!(whole.report.relative_error.unwrap() < 1e-7);
    let low = run(&modules, &WEIGHTS, &prune, None);
    let s = svd(&wanted).unwrap().s;
    let tail = s[5..].iter().map(|x| x * x).sum::<f64>().sqrt();
    assert_eq!(low.report.rank, Some(5));
    assert!((low.report.relative_error.unwrap() - tail / wanted.norm()).abs() < 1e-10);
    assert!((difference(&dense(&low.module), &wanted) - tail / wanted.norm()).abs() < 1e-10);
}

#[test]
fn factors_need_one_rank_and_linear_tells_its_error() {
    let modules: Vec<Module> =
        (0..2).map(|i| lora(&noise(M, 4, &format!("u{i}")), &noise(4, N, &format!("d{i}")), 0.5)).collect();
    let linear = run(&modules, &[1.0, -0.5], &options(Method::Linear, Space::Factors), None);
    let mut sum = dense(&modules[0]);
    sum.add_product(-0.5, &dense(&modules[1]), &Matrix::identity(N));
    let error = difference(&dense(&linear.module), &sum);
    assert!((linear.report.relative_error.unwrap() - error).abs() < 1e-12 && error > 0.1);
    let (up, down, s) = &adapters()[0];
    let other = lora(up, down, *s);
    let terms = [&modules[0], &other].map(|module| Weighted { module, weight: 1.0, term: 0 });
    let Err(Trouble::Refused(Refusal(why))) = merge(&terms, &options(Method::Ties, Space::Factors), "m", None) else {
        panic!("ranks differ");
    };
    assert!(why.contains("rank 4") && why.contains("rank 3"));
}

#[test]
fn random_choices_are_those_of_seed_name_and_term() {
    let modules: Vec<Module> = adapters().iter().map(|(up, down, s)| lora(up, down, *s)).collect();
    let options = options(Method::DareTies, Space::Core);
    let bytes = |options: &MergeOptions| {
        let merged = run(&modules, &WEIGHTS, options, None);
        dense(&merged.module)
    };
    assert_eq!(bytes(&options), bytes(&options));
    assert!(difference(&bytes(&MergeOptions { seed: 4, ..options.clone() }), &bytes(&options)) > 0.1);
}

#[test]
fn what_cannot_be_merged_says_why() {
    let (up, down, s) = &adapters()[0];
    let plain = lora(up, down, *s);
    let mut spoiled = plain.clone();
    let mut values = up.clone();
    values.data_mut()[7] = f64::NAN;
    spoiled.tensors.insert(Slot::Up, tensor(&values));
    let mut dora = plain.clone();
    dora.tensors.insert(Slot::Magnitude, tensor(&noise(M, 1, "m")));
    let short = lora(&noise(M - 1, 3, "s"), down, 1.0);
    let options = options(Method::Ties, Space::Core);
    let pair =
        |other| merge(&[&plain, other].map(|module| Weighted { module, weight: 1.0, term: 0 }), &options, "m", None);
    assert!(matches!(pair(&spoiled), Err(Trouble::NotFinite(1))));
    for (other, words) in [(&dora, "DoRA"), (&short, "outputs")] {
        let Err(Trouble::Refused(Refusal(why))) = pair(other) else { panic!("{words}") };
        assert!(why.contains(words), "{why}");
    }
}

#[test]
fn vectors_are_merged_by_the_same_rule() {
    let bias = |values: &[f64]| {
        let tensors = BTreeMap::from([(Slot::DiffB, held(&Matrix::new(1, 4, values.to_vec()), Dtype::F64, vec![4]))]);
        Module::new(Kind::Bias, tensors)
    };
    let modules = [bias(&[1., -2., 3., 0.]), bias(&[-4., -1., 1., 2.])];
    let ties = MergeOptions { density: Some(1.0), ..options(Method::Ties, Space::Core) };
    let merged = run(&modules, &[1.0, 0.5], &ties, None);
    let found = merged.module.get(Slot::DiffB).unwrap();
    assert_eq!(found.shape(), [4]);
    assert_eq!(found.to_f64(), [-2., -1.25, 1.75, 1.]);
    assert_eq!(merged.report.rank, None);
    let mergekit = MergeOptions { rule: Some(Rule::Mergekit), ..ties };
    let merged = run(&modules, &[1.0, 0.5], &mergekit, None);
    // Weights first: -4 counts -2, which still wins; the divisor is the sum of the weights that agree.
    assert_eq!(merged.module.get(Slot::DiffB).unwrap().to_f64(), [-4., -2.5 / 1.5, 3.5 / 1.5, 2.]);
}
