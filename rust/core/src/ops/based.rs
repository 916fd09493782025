//! The weight difference of kinds that say it only together with the weight.

use std::ops::Range;

use super::delta::{delta_rows, shape};
use super::rotation::Rotation;
use crate::dtype::Dtype;
use crate::kind::{Kind, Module, Refusal, Slot};
use crate::linalg::Matrix;
use crate::tensor::Tensor;

/// Rows of a weight that are held at a time, in elements.
const TILE: usize = 1 << 20;

/// A module on the weight that it was made for: `W' - W`, some rows at a time.
///
/// At a strength s the difference is `s (W' - W)`: between what is and what is wanted lies a straight line. (Tools
/// disagree for DoRA and OFT at strengths other than 1; this is what ComfyUI does.) The weight is seen as a matrix of
/// its first dimension and all others together.
#[derive(Debug)]
pub struct Based {
    weight: Tensor,
    form: Form,
}

#[derive(Debug)]
enum Form {
    /// `D`, which needs no weight.
    Added(Module),
    /// `g * (W + D) - W`, where row i has norm `g_i^-1 magnitude_i`.
    PerOutput {
        module: Module,
        magnitude: Vec<f64>,
    },
    /// The same over columns, whose factors were found by a first pass over the rows.
    PerInput {
        module: Module,
        gain: Vec<f64>,
    },
    /// `scale (W a1 a2 + b1 b2)`, over the channels of a kernel.
    Glora(Box<Glora>),
    Rotated(Rotation),
    /// Rows or columns times `1 + factor`.
    Scaled {
        factor: Vec<f64>,
        columns: bool,
    },
    /// The weight is replaced.
    Replaced(Tensor),
}

/// The factors of a GLoRA.
#[derive(Debug)]
struct Glora {
    /// (in, r) and (r, in).
    a: [Matrix; 2],
    /// (out, r) and (r, in * kernel).
    b: [Matrix; 2],
    scale: f64,
    /// Elements of the kernel.
    kernel: usize,
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(reason.into()))
}

impl Based {
    /// Whether a module says nothing about the difference without the weight.
    pub fn needs_weight(module: &Module) -> bool {
        module.is_dora() || matches!(module.kind, Kind::Glora | Kind::Oft | Kind::Ia3)
    }

    /// A module on its weight. Reads the weight once where a norm over its rows must be known, and for BOFT.
    ///
    /// Refused if the shapes do not fit, and for modules that are no difference of a weight (biases, norms).
    pub fn new(module: &Module, weight: &Tensor) -> Result<Self, Refusal> {
        let form = match module.kind {
            Kind::Lora | Kind::Loha | Kind::Lokr | Kind::Full => added(module, weight)?,
            Kind::Glora => Form::Glora(Box::new(glora(module, weight)?)),
            Kind::Oft => Form::Rotated(Rotation::new(module, weight)?),
            Kind::Ia3 => ia3(module, weight)?,
            Kind::Set => match module.get(Slot::Set) {
                Some(set) if (set.rows(), set.cols()) == (weight.rows(), weight.cols()) => Form::Replaced(set.clone()),
                _ => return refuse("replaces a parameter by one of another shape"),
            },
            Kind::Norm | Kind::Bias => {
                return refuse(format!("is {} and no difference of a weight", module.kind.name()));
            }
        };
        Ok(Self { weight: weight.clone(), form })
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.weight.rows(), self.weight.cols())
    }

    /// Some rows of `W' - W` at strength 1, row by row, in float64.
    pub fn rows(&self, rows: Range<usize>) -> Vec<f64> {
        let weight = |rows: &Range<usize>| self.weight.rows_f64(rows.clone());
        match &self.form {
            Form::Added(module) => plain(module, rows),
            Form::PerOutput { module, magnitude } => {
                let (mut w, first) = (weight(&rows), rows.start);
                let d = plain(module, rows);
                let cols = self.weight.cols().max(1);
                for (i, (w, d)) in w.chunks_exact_mut(cols).zip(d.chunks_exact(cols)).enumerate() {
                    let norm = w.iter().zip(d).map(|(w, d)| (w + d) * (w + d)).sum::<f64>().sqrt();
                    let gain = if norm == 0.0 { 0.0 } else { magnitude[first + i] / norm };
                    w.iter_mut().zip(d).for_each(|(w, d)| *w = (gain - 1.0) * *w + gain * d);
                }
                w
            }
            Form::PerInput { module, gain } => {
                let mut w = weight(&rows);
                let d = plain(module, rows);
                for (w, d) in w.chunks_exact_mut(gain.len()).zip(d.chunks_exact(gain.len())) {
                    w.iter_mut().zip(d).zip(gain).for_each(|((w, d), g)| *w = (g - 1.0) * *w + g * d);
                }
                w
            }
            Form::Glora(glora) => glora.rows(&self.weight, rows),
            Form::Rotated(rotation) => rotation.rows(&self.weight, rows),
            Form::Scaled { factor, columns } => {
                let (mut w, first) = (weight(&rows), rows.start);
                for (i, line) in w.chunks_exact_mut(self.weight.cols().max(1)).enumerate() {
                    match columns {
                        true => line.iter_mut().zip(factor).for_each(|(w, f)| *w *= f),
                        false => line.iter_mut().for_each(|w| *w *= factor[first + i]),
                    }
                }
                w
            }
            Form::Replaced(set) => {
                let mut out = set.rows_f64(rows.clone());
                out.iter_mut().zip(weight(&rows)).for_each(|(s, w)| *s -= w);
                out
            }
        }
    }

    /// `up`, `down` and the scale of a LoRA with the same difference, where there is one of low rank (GLoRA): `[b1, W a1]`
    /// and `[b2; a2]`, where `a2` stands once for each element of a kernel. Computed now, in float64; the largest part
    /// has as many elements as the weight has rows times twice the rank.
    pub fn factors(&self) -> Option<(Tensor, Tensor, f64)> {
        let Form::Glora(glora) = &self.form else { return None };
        let (up, down) = glora.factors(&self.weight);
        Some((Tensor::of_matrix(&up, Dtype::F64), Tensor::of_matrix(&down, Dtype::F64), glora.scale))
    }
}

fn plain(module: &Module, rows: Range<usize>) -> Vec<f64> {
    delta_rows(module, rows).expect("a module with a shape has a delta")
}

fn added(module: &Module, weight: &Tensor) -> Result<Form, Refusal> {
    let have = shape(module);
    let want = (weight.rows(), weight.cols());
    if have != Some(want) {
        let (m, n) = have.unwrap_or((0, 0));
        return refuse(format!("is {m}x{n} and its weight {}x{}", want.0, want.1));
    }
    let module = module.flattened();
    if let Some(magnitude) = module.get(Slot::Magnitude) {
        let magnitude = magnitude.to_f64();
        return match magnitude.len() == want.0 {
            true => Ok(Form::PerOutput { magnitude, module }),
            false => refuse(format!("has {} magnitudes for {} outputs", magnitude.len(), want.0)),
        };
    }
    let Some(magnitude) = module.get(Slot::MagnitudeIn) else { return Ok(Form::Added(module)) };
    let magnitude = magnitude.to_f64();
    if magnitude.is_empty() || !want.1.is_multiple_of(magnitude.len()) {
        return refuse(format!("has {} magnitudes for {} inputs", magnitude.len(), want.1));
    }
    let gain = column_gain(&module, weight, &magnitude);
    Ok(Form::PerInput { module, gain })
}

/// What each column is multiplied with: a magnitude over the norm of its channel, which is a column for linear layers
/// and the elements of a kernel for convolutions, over all rows (LyCORIS `functional/general.py: apply_dora_scale`).
fn column_gain(module: &Module, weight: &Tensor, magnitude: &[f64]) -> Vec<f64> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let kernel = cols / magnitude.len();
    let mut squares = vec![0.0; magnitude.len()];
    let step = (TILE / cols.max(1)).max(1);
    for start in (0..rows).step_by(step) {
        let range = start..rows.min(start + step);
        let (w, d) = (weight.rows_f64(range.clone()), plain(module, range));
        for (i, (w, d)) in w.iter().zip(d).enumerate() {
            squares[i % cols / kernel] += (w + d) * (w + d);
        }
    }
    let gain = |j: usize| match squares[j / kernel].sqrt() {
        0.0 => 0.0,
        norm => magnitude[j / kernel] / norm,
    };
    (0..cols).map(gain).collect()
}

fn ia3(module: &Module, weight: &Tensor) -> Result<Form, Refusal> {
    let factor = module.get(Slot::Ia3Weight).map(Tensor::to_f64).unwrap_or_default();
    let columns = module.get(Slot::Ia3OnInput).is_some_and(|t| t.to_f64().iter().any(|v| *v != 0.0));
    let (rows, cols) = (weight.rows(), weight.cols());
    let fits = if columns { !factor.is_empty() && cols.is_multiple_of(factor.len()) } else { factor.len() == rows };
    if !fits {
        let (side, want) = if columns { ("inputs", cols) } else { ("outputs", rows) };
        return refuse(format!("is ia3 and has {} factors for {want} {side}", factor.len()));
    }
    let kernel = if columns { cols / factor.len() } else { 1 };
    let factor = factor.iter().flat_map(|f| std::iter::repeat_n(*f, kernel)).collect();
    Ok(Form::Scaled { factor, columns })
}

/// New files have a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in); old ones the two of each pair exchanged (LyCORIS
/// `modules/glora.py`; ComfyUI tells them apart by their shapes, too). The scale is alpha / r.
fn glora(module: &Module, weight: &Tensor) -> Result<Glora, Refusal> {
    let get = |slot| module.get(slot).map(Tensor::to_matrix).ok_or_else(|| Refusal("lacks a factor".to_owned()));
    let [a1, a2, b1, b2] = [get(Slot::GloraA1)?, get(Slot::GloraA2)?, get(Slot::GloraB1)?, get(Slot::GloraB2)?];
    let (rows, cols) = (weight.rows(), weight.cols());
    let fits = |a: &[Matrix; 2], b: &[Matrix; 2]| {
        let inputs = a[0].rows();
        let ranks = a[0].cols() == a[1].rows() && b[0].cols() == b[1].rows();
        let outer = inputs > 0 && cols.is_multiple_of(inputs) && a[1].cols() == inputs;
        ranks && outer && (b[0].rows(), b[1].cols()) == (rows, cols)
    };
    let (new, old) = (([a1.clone(), a2.clone()], [b1.clone(), b2.clone()]), ([a2, a1], [b2, b1]));
    let Some((a, b)) = [new, old].into_iter().find(|(a, b)| fits(a, b)) else {
        return refuse(format!("is glora, and its factors do not fit a weight of {rows}x{cols}"));
    };
    let alpha = module.alpha.as_ref().and_then(|t| t.to_f64().first().copied());
    let rank = a[0].cols().max(1) as f64;
    let scale = alpha.filter(|v| v.is_finite() && *v != 0.0).map_or(1.0, |alpha| alpha / rank);
    let kernel = cols / a[0].rows();
    Ok(Glora { a, b, scale: scale * module.scale, kernel })
}

impl Glora {
    /// Rows of W a1: for each row of the weight (r, kernel), as the sum over its input channels.
    fn mixed(&self, weight: &Tensor, rows: Range<usize>) -> Matrix {
        let (inputs, rank) = (self.a[0].rows(), self.a[0].cols());
        let values = weight.rows_f64(rows.clone());
        if self.kernel == 1 {
            return Matrix::new(rows.len(), inputs, values).times(&self.a[0]);
        }
        let mut out = Vec::with_capacity(rows.len() * rank * self.kernel);
        for line in values.chunks_exact(inputs * self.kernel) {
            out.extend(self.a[0].transpose_times(&Matrix::new(inputs, self.kernel, line.to_vec())).into_data());
        }
        Matrix::new(rows.len(), rank * self.kernel, out)
    }

    /// a2, once for each element of the kernel: row (p, k) has `a2[p, j]` in column (j, k).
    fn spread(&self) -> Matrix {
        let (a2, kernel) = (&self.a[1], self.kernel);
        Matrix::from_fn(a2.rows() * kernel, a2.cols() * kernel, |i, j| match i % kernel == j % kernel {
            true => a2.get(i / kernel, j / kernel),
            false => 0.0,
        })
    }

    fn rows(&self, weight: &Tensor, rows: Range<usize>) -> Vec<f64> {
        let b1 = Matrix::from_fn(rows.len(), self.b[0].cols(), |i, j| self.b[0].get(rows.start + i, j));
        let mut out = b1.times(&self.b[1]);
        out.add_product(1.0, &self.mixed(weight, rows), &self.spread());
        out.into_data().into_iter().map(|v| v * self.scale).collect()
    }

    fn factors(&self, weight: &Tensor) -> (Matrix, Matrix) {
        let (rows, cols) = (weight.rows(), weight.cols());
        let left = self.b[0].cols();
        let rank = left + self.a[0].cols() * self.kernel;
        let mut up = Matrix::zeros(rows, rank);
        let step = (TILE / cols.max(1)).max(1);
        for start in (0..rows).step_by(step) {
            let range = start..rows.min(start + step);
            let mixed = self.mixed(weight, range.clone());
            for row in range {
                let target = &mut up.data_mut()[row * rank..(row + 1) * rank];
                target[..left].copy_from_slice(self.b[0].row(row));
                target[left..].copy_from_slice(mixed.row(row - start));
            }
        }
        let down = [self.b[1].data(), self.spread().data()].concat();
        (up, Matrix::new(rank, cols, down))
    }
}
