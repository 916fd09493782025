//! One adapted layer and the operations on it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::{Kind, Role, Slot};
use crate::tensor::Tensor;

/// Why an operation is impossible for a module, in words that follow its name.
#[derive(Debug, Clone)]
pub struct Refusal(pub String);

pub(super) fn refuse<T>(reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(reason.into()))
}

/// Where a module's scale was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AlphaSource {
    /// An alpha tensor beside the factors.
    Tensor,
    /// The header's metadata.
    Metadata,
    /// `adapter_config.json` beside the file.
    Config,
    /// Nowhere: alpha is the rank, the scale 1.
    Rank,
}

impl AlphaSource {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            AlphaSource::Tensor => "tensor",
            AlphaSource::Metadata => "metadata",
            AlphaSource::Config => "config",
            AlphaSource::Rank => "rank",
        }
    }
}

/// The fused module that a part was cut from, kept so that unused rank can be cut off where that is exact.
#[derive(Debug, Clone)]
pub(super) struct CutFrom {
    up: Tensor,
    /// Output rows of all parts.
    pub(super) parts: Arc<[usize]>,
    index: usize,
}

/// One adapted layer: its tensors (without alpha) and its scale.
#[derive(Debug, Clone)]
pub struct Module {
    /// The algebra.
    pub kind: Kind,
    /// The tensors; alpha is in `scale` and `alpha` instead.
    pub tensors: BTreeMap<Slot, Tensor>,
    /// The factor on the delta: alpha / rank, or what takes its place.
    pub scale: f64,
    /// The alpha tensor as the file had it, while it still says what `scale` says.
    pub alpha: Option<Tensor>,
    /// Where the scale was found.
    pub alpha_source: AlphaSource,
    /// Numbers of the input tensors it was made of.
    pub inputs: Vec<usize>,
    /// Whether factors were joined into new ones: same delta, other tensors.
    pub regrouped: bool,
    /// Whether its delta is only near to that of its inputs, as was asked for.
    pub approximate: bool,
    pub(super) cut_from: Option<CutFrom>,
}

impl Module {
    /// A module of given tensors and scale 1.
    pub fn new(kind: Kind, tensors: BTreeMap<Slot, Tensor>) -> Self {
        Self {
            kind,
            tensors,
            scale: 1.0,
            alpha: None,
            alpha_source: AlphaSource::Rank,
            inputs: Vec::new(),
            regrouped: false,
            approximate: false,
            cut_from: None,
        }
    }

    /// Forgets what it was cut from: its factors are others now.
    pub(crate) fn without_origin(&mut self) {
        self.cut_from = None;
    }

    /// The tensor in a slot.
    pub fn get(&self, slot: Slot) -> Option<&Tensor> {
        self.tensors.get(&slot)
    }

    /// Whether it is a LoRA (or other) with weight decomposition.
    pub fn is_dora(&self) -> bool {
        self.tensors.contains_key(&Slot::Magnitude) || self.tensors.contains_key(&Slot::MagnitudeIn)
    }

    /// The kind in reports, with DoRA named.
    pub fn kind_name(&self) -> &'static str {
        if self.kind == Kind::Lora && self.is_dora() { "dora" } else { self.kind.name() }
    }

    /// Whether it is a difference that is none of plain LoRA, and could be one.
    pub fn has_plain_form(&self) -> bool {
        match self.kind {
            Kind::Lora => self.is_dora() || self.has_core(),
            Kind::Loha | Kind::Lokr | Kind::Oft | Kind::Glora | Kind::Ia3 => true,
            Kind::Full | Kind::Norm | Kind::Set | Kind::Bias => false,
        }
    }

    /// The rank that alpha is divided by; `None` where alpha means nothing (LoKr of two full factors, full differences).
    pub fn rank(&self) -> Option<usize> {
        rank_of(&self.tensors)
    }

    /// The tensor that a factor on the delta can be put on.
    pub(super) fn factor_slot(&self) -> Option<Slot> {
        let order = [Slot::Up, Slot::HadaW1A, Slot::LokrW1, Slot::LokrW1A];
        order.into_iter().find(|s| self.tensors.contains_key(s))
    }

    /// The rows `range` of the output: part `index` of `parts`.
    pub fn cut(&self, parts: &Arc<[usize]>, index: usize) -> Result<Module, Refusal> {
        let start: usize = parts[..index].iter().sum();
        let range = start..start + parts[index];
        let mut tensors = BTreeMap::new();
        for (&slot, tensor) in &self.tensors {
            let part = match slot.role() {
                Role::Rows => tensor.slice_rows(range.clone()),
                Role::KronRows => tensor.slice_rows(self.kron_rows(&range)?),
                Role::Shared => tensor.clone(),
                Role::Global => {
                    return refuse("has a DoRA magnitude over all its outputs, which cannot be cut into parts");
                }
                Role::Note => continue,
                Role::Opaque => return refuse(format!("is {} and cannot be cut into parts", self.kind.name())),
            };
            tensors.insert(slot, part);
        }
        // A Tucker core ties down and up together: no column of the one goes without the other.
        let plain = self.kind == Kind::Lora && !self.tensors.contains_key(&Slot::Mid);
        let up = self.get(Slot::Up).filter(|_| plain);
        let cut_from = up.map(|up| CutFrom { up: up.clone(), parts: Arc::clone(parts), index });
        Ok(Module { tensors, cut_from, ..self.clone() })
    }

    /// Which rows of the outer Kronecker factor make the output rows `range`.
    pub(super) fn kron_rows(&self, range: &Range<usize>) -> Result<Range<usize>, Refusal> {
        let inner = self.get(Slot::LokrW2).or_else(|| self.get(Slot::LokrW2A)).map_or(1, Tensor::rows).max(1);
        if !range.start.is_multiple_of(inner) || !range.end.is_multiple_of(inner) {
            return refuse("is LoKr and its Kronecker factors do not divide at the parts");
        }
        Ok(range.start / inner..range.end / inner)
    }

    /// The two halves of the output rows exchanged.
    pub fn swap_halves(&self) -> Result<Module, Refusal> {
        let mut tensors = BTreeMap::new();
        for (&slot, tensor) in &self.tensors {
            let swapped = match slot.role() {
                Role::Rows | Role::KronRows => match tensor.swap_halves() {
                    Some(swapped) => swapped,
                    None => return refuse("has an odd number of rows, which have no halves to exchange"),
                },
                Role::Shared | Role::Global | Role::Note => tensor.clone(),
                Role::Opaque => {
                    return refuse(format!("is {} and its output rows cannot be exchanged", self.kind.name()));
                }
            };
            tensors.insert(slot, swapped);
        }
        Ok(Module { tensors, cut_from: None, ..self.clone() })
    }

    /// Without the columns of `up` that the fused module keeps for its other parts.
    ///
    /// Trainers that split a fused layer save one block-diagonal `up` (zeros outside the blocks); cutting it by rows
    /// leaves each part with the columns of all others, all zero. Equal blocks are recognised as diffusers does;
    /// otherwise columns are given to the one part that uses them, if their order allows.
    #[must_use]
    pub fn tightened(&self) -> Module {
        let Some(CutFrom { up, parts, index }) = &self.cut_from else { return self.clone() };
        let Some(columns) = block_columns(up, parts, *index) else { return Module { cut_from: None, ..self.clone() } };
        if columns.len() == up.cols() {
            return Module { cut_from: None, ..self.clone() };
        }
        let mut out = Module { cut_from: None, alpha: None, ..self.clone() };
        for (slot, tensor) in &mut out.tensors {
            *tensor = match slot {
                Slot::Up => tensor.slice_cols(columns.clone()),
                Slot::Down => tensor.slice_rows(columns.clone()),
                _ => continue,
            };
        }
        out
    }

    /// The delta times `strength`.
    pub fn strengthened(&self, strength: f64) -> Result<Module, Refusal> {
        if strength == 1.0 {
            return Ok(self.clone());
        }
        if self.is_dora() || matches!(self.kind, Kind::Set | Kind::Oft | Kind::Glora | Kind::Ia3) {
            return refuse(format!("is {}, which is not linear in a strength", self.kind_name()));
        }
        let mut out = Module { alpha: None, ..self.clone() };
        let scales_by_alpha = out.rank().is_some();
        if scales_by_alpha {
            out.scale *= strength;
        } else if let Some(slot) = out.factor_slot() {
            out.scale_slot(slot, strength);
        }
        for slot in [Slot::Diff, Slot::DiffB, Slot::WNorm, Slot::BNorm] {
            out.scale_slot(slot, strength);
        }
        Ok(out)
    }

    fn scale_slot(&mut self, slot: Slot, factor: f64) {
        if let Some(tensor) = self.tensors.remove(&slot) {
            self.tensors.insert(slot, tensor.scaled(factor));
        }
    }

    /// The scale multiplied into the factors, so that it is 1.
    ///
    /// Of a LoRA the scale goes on `down`, and factors of two move to `up` while that keeps the two balanced; this is
    /// where diffusers puts it (`lora_conversion_utils.py`), so equal inputs give equal bytes.
    #[must_use]
    pub fn folded(&self) -> Module {
        let mut out = Module { scale: 1.0, alpha: None, ..self.clone() };
        if self.scale == 1.0 {
            return out;
        }
        if self.kind == Kind::Lora {
            let (down, up) = balance(self.scale);
            out.scale_slot(Slot::Down, down);
            out.scale_slot(Slot::Up, up);
        } else if let Some(slot) = out.factor_slot() {
            out.scale_slot(slot, self.scale);
        }
        out
    }
}

/// The columns of `up` that part `index` uses, if `up` is block-diagonal over the parts.
fn block_columns(up: &Tensor, parts: &[usize], index: usize) -> Option<Range<usize>> {
    let rank = up.cols();
    let starts: Vec<usize> = parts
        .iter()
        .scan(0, |at, n| {
            let start = *at;
            *at += n;
            Some(start)
        })
        .collect();
    let rows = |j: usize| starts[j]..starts[j] + parts[j];
    let n = parts.len();
    if n > 1 && rank.is_multiple_of(n) {
        let width = rank / n;
        let zero_outside = |j: usize| up.is_zero(rows(j), 0..j * width) && up.is_zero(rows(j), (j + 1) * width..rank);
        if (0..n).all(zero_outside) {
            return Some(index * width..(index + 1) * width);
        }
    }
    uneven_columns(up, n, rank, rows).map(|ranges| ranges[index].clone())
}

/// Blocks of unequal width: column by column, in order. `None` as soon as a column serves two parts or is out of order.
fn uneven_columns(
    up: &Tensor,
    n: usize,
    rank: usize,
    rows: impl Fn(usize) -> Range<usize>,
) -> Option<Vec<Range<usize>>> {
    let users: Vec<Vec<bool>> = (0..n).map(|j| up.used_columns(rows(j))).collect();
    let mut owners = Vec::with_capacity(rank);
    for column in 0..rank {
        let mut owning = users.iter().enumerate().filter(|(_, used)| used[column]).map(|(j, _)| j);
        let owner = owning.next();
        if owning.next().is_some() {
            return None;
        }
        owners.push(owner);
    }
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let used: Vec<usize> = owners.iter().flatten().copied().collect();
    if used.is_empty() || used.windows(2).any(|w| w[0] > w[1]) {
        return None;
    }
    for j in 0..n {
        let first = owners.iter().position(|o| *o == Some(j));
        let last = owners.iter().rposition(|o| *o == Some(j));
        ranges.push(match (first, last) {
            (Some(first), Some(last)) => first..last + 1,
            // A part that uses no column keeps one: its rows there are zero, and so is its delta.
            _ => 0..1,
        });
    }
    Some(ranges)
}

/// `scale` as a factor on down and a power of two on up: the two are brought together while down is below half of up.
fn balance(scale: f64) -> (f64, f64) {
    let (mut down, mut up) = (scale.abs(), 1.0);
    while down > 0.0 && down * 2.0 < up {
        down *= 2.0;
        up /= 2.0;
    }
    (down.copysign(scale), up)
}

/// The rank that alpha is divided by.
pub(crate) fn rank_of(tensors: &BTreeMap<Slot, Tensor>) -> Option<usize> {
    let order = [Slot::Down, Slot::HadaW1B, Slot::LokrW2B, Slot::LokrW1B];
    order.iter().find_map(|slot| tensors.get(slot)).map(Tensor::rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn matrix(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f32) -> Tensor {
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| f(i / cols, i % cols).to_le_bytes()).collect();
        Tensor::constant(Dtype::F32, vec![rows, cols], bytes)
    }

    fn lora(out: usize, rank: usize, input: usize, up: impl Fn(usize, usize) -> f32) -> Module {
        let down = matrix(rank, input, |r, c| (r * input + c + 1) as f32);
        Module::new(Kind::Lora, BTreeMap::from([(Slot::Down, down), (Slot::Up, matrix(out, rank, up))]))
    }

    #[test]
    fn balance_follows_diffusers() {
        assert_eq!(balance(1.0), (1.0, 1.0));
        assert_eq!(balance(0.5), (0.5, 1.0));
        assert_eq!(balance(0.25), (0.5, 0.5));
        assert_eq!(balance(1.0 / 16.0), (0.25, 0.25));
        assert_eq!(balance(-0.25), (-0.5, 0.5));
        assert_eq!(balance(0.0), (0.0, 1.0));
    }

    #[test]
    fn fusing_what_was_cut_is_the_whole() {
        let whole = lora(6, 2, 3, |r, c| (10 * r + c) as f32);
        let parts: Arc<[usize]> = Arc::from([2, 2, 2]);
        let cut: Vec<Module> = (0..3).map(|j| whole.cut(&parts, j).expect("lora")).collect();
        let fused = Module::fuse(&cut.iter().map(Some).collect::<Vec<_>>(), &parts).expect("lora");
        assert!(fused.tensors[&Slot::Up].contiguous().is_some());
        assert!(fused.tensors[&Slot::Down].same_as(&whole.tensors[&Slot::Down]));
    }

    #[test]
    fn block_diagonal_is_recognised() {
        let even = lora(6, 3, 2, |r, c| if r / 2 == c { 1.0 } else { 0.0 });
        let parts: Arc<[usize]> = Arc::from([2, 2, 2]);
        assert_eq!(even.cut(&parts, 1).expect("lora").tightened().rank(), Some(1));
        let uneven = lora(6, 4, 2, |r, c| if r / 2 == [0, 0, 1, 2][c] { 1.0 } else { 0.0 });
        let ranks: Vec<_> = (0..3).map(|j| uneven.cut(&parts, j).expect("lora").tightened().rank()).collect();
        assert_eq!(ranks, [Some(2), Some(1), Some(1)]);
        let dense = lora(6, 3, 2, |_, _| 1.0);
        assert_eq!(dense.cut(&parts, 1).expect("lora").tightened().rank(), Some(3));
    }

    #[test]
    fn absent_parts_become_zero_rows() {
        let q = lora(2, 1, 3, |_, _| 1.0);
        let v = lora(2, 1, 3, |_, _| 2.0);
        let fused = Module::fuse(&[Some(&q), None, Some(&v)], &[2, 2, 2]).expect("lora");
        assert_eq!(fused.tensors[&Slot::Up].to_f64(), [1., 1., 0., 0., 2., 2.]);
    }
}
