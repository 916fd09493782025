//! Several modules as one: parts stacked by their output rows, and sums of adapters.

use std::collections::BTreeMap;

use super::module::refuse;
use super::{Kind, Module, Refusal, Role, Slot};
use crate::tensor::Tensor;

impl Module {
    /// The sum of two claims on one module within a file.
    pub fn plus(&self, other: &Module) -> Result<Module, Refusal> {
        if self.kind != Kind::Lora || other.kind != Kind::Lora || self.is_dora() || other.is_dora() {
            return refuse("is claimed twice, and only plain LoRA contributions can be added");
        }
        let width = |m: &Module| m.get(Slot::Down).map(Tensor::cols);
        if width(self) != width(other) {
            return refuse("is claimed twice, with different input widths");
        }
        if self.get(Slot::DiffB).is_some() && other.get(Slot::DiffB).is_some() {
            return refuse("is claimed twice, each time with a bias");
        }
        Module::sum(&[self, other]).map_err(|Refusal(reason)| Refusal(format!("is claimed twice: it {reason}")))
    }

    /// The sum of two parts of a module that have different inputs. Where they share `up`, their ranks stay one.
    pub fn beside(&self, other: &Module) -> Result<Module, Refusal> {
        let pair = |slot| self.get(slot).zip(other.get(slot));
        let shared = pair(Slot::Up).is_some_and(|(a, b)| a.same_as(b)) && self.scale == other.scale;
        let overlaid = pair(Slot::Down).filter(|_| shared).and_then(|(a, b)| a.overlaid(b));
        let Some(down) = overlaid else { return Module::sum(&[self, other]) };
        let mut out = self.clone();
        out.tensors.insert(Slot::Down, down);
        out.inputs = union([self, other].into_iter());
        Ok(out)
    }

    /// The sum of several adapters' modules: ranks side by side, biases and differences added.
    ///
    /// Exact: factors are copied, and scaled (rounded once) only where the terms' scales differ. Narrower inputs
    /// (FLUX.1 beside its Control or Fill variant) are widened with zeros.
    pub fn sum(terms: &[&Module]) -> Result<Module, Refusal> {
        if let [one] = terms {
            return Ok(one.tightened());
        }
        if terms.iter().any(|m| m.is_dora()) {
            return refuse("is DoRA in one of them, which adds to nothing else");
        }
        if terms.iter().any(|m| m.get(Slot::Mid).is_some()) {
            return refuse("has a Tucker core (`lora_mid`) in one of them, which cannot be added");
        }
        // A bias alone goes with any layer.
        let mut kinds: Vec<Kind> = terms.iter().map(|m| m.kind).filter(|k| *k != Kind::Bias).collect();
        kinds.dedup();
        let mut out = match kinds.as_slice() {
            [] => Module::new(Kind::Bias, BTreeMap::new()),
            [Kind::Lora] => sum_of_factors(terms),
            [kind @ (Kind::Full | Kind::Norm)] => Module::new(*kind, BTreeMap::new()),
            [Kind::Set] if terms.windows(2).all(|w| w[0].same_parameter(w[1])) => {
                let mut out = terms[0].clone();
                out.inputs = union(terms.iter().copied());
                return Ok(out);
            }
            [Kind::Set] => return refuse("is replaced by more than one of them, each time by something else"),
            [kind] => return refuse(format!("is {} in more than one of them, and these do not add", kind.name())),
            [a, b, ..] => {
                return refuse(format!("is {} in one and {} in another of them", a.name(), b.name()));
            }
        };
        for slot in [Slot::Diff, Slot::DiffB, Slot::WNorm, Slot::BNorm] {
            let parts: Vec<Tensor> = terms.iter().filter_map(|m| m.get(slot).cloned()).collect();
            if parts.windows(2).any(|w| w[0].shape() != w[1].shape()) {
                return refuse("has differences of other shapes in each of them");
            }
            if !parts.is_empty() {
                out.tensors.insert(slot, Tensor::sum(&parts));
            }
        }
        out.alpha_source = terms.iter().map(|m| m.alpha_source).min().unwrap_or(out.alpha_source);
        out.inputs = union(terms.iter().copied());
        out.regrouped = true;
        Ok(out)
    }

    /// Whether both replace a parameter by the same numbers.
    fn same_parameter(&self, other: &Module) -> bool {
        self.get(Slot::Set).zip(other.get(Slot::Set)).is_some_and(|(a, b)| a.same_as(b))
    }

    /// The same sum without repetitions: a LoRA with the very factors of an earlier one adds its scale to it.
    #[must_use]
    pub fn distinct(terms: Vec<Module>) -> Vec<Module> {
        let mut out: Vec<Module> = Vec::new();
        for term in terms {
            let same = |m: &Module, slot| m.get(slot).zip(term.get(slot)).is_some_and(|(x, y)| x.same_as(y));
            let plain = |m: &Module| m.kind == Kind::Lora && m.tensors.len() == 2;
            let twin = out.iter_mut().find(|m| plain(m) && plain(&term) && same(m, Slot::Down) && same(m, Slot::Up));
            match twin {
                Some(twin) => {
                    twin.scale += term.scale;
                    twin.alpha = None;
                    twin.inputs = union([&*twin, &term].into_iter());
                }
                None => out.push(term),
            }
        }
        out
    }

    /// One module of several parts, stacked by output rows; absent parts are zero.
    ///
    /// Parts that share everything but their rows (equal `down`) keep sharing it. Otherwise ranks stand side by side
    /// and the row factors become block-diagonal, which is what sd-scripts writes for split training; single rows of
    /// `down` that several parts have are still written once.
    pub fn fuse(parts: &[Option<&Module>], rows: &[usize]) -> Result<Module, Refusal> {
        // Parts of something larger do not need the columns that belong to its other parts.
        let of_these = |m: &Module| m.cut_from.as_ref().is_none_or(|c| *c.parts == *rows);
        if !parts.iter().flatten().all(|m| of_these(m)) {
            let tight: Vec<Option<Module>> = parts.iter().map(|p| p.map(Module::tightened)).collect();
            return Self::fuse(&tight.iter().map(Option::as_ref).collect::<Vec<_>>(), rows);
        }
        let present: Vec<&Module> = parts.iter().flatten().copied().collect();
        let first = present[0];
        if present.iter().any(|m| m.kind != first.kind || m.is_dora() != first.is_dora()) {
            return refuse("would join parts of different kinds");
        }
        if first.is_dora() && present.len() < parts.len() {
            return refuse("is DoRA, and a part of the fused module is absent, whose magnitude is unknown");
        }
        let mut out = if shares_all_but_rows(&present) {
            Self::fuse_sharing(parts, rows)?
        } else {
            Self::fuse_blocks(parts, rows)?
        };
        out.inputs = union(present.into_iter());
        Ok(out)
    }

    fn fuse_sharing(parts: &[Option<&Module>], rows: &[usize]) -> Result<Module, Refusal> {
        let present: Vec<&Module> = parts.iter().flatten().copied().collect();
        let first = present[0];
        let same_scale = present.iter().all(|m| m.scale == first.scale);
        let mut out = first.clone();
        out.cut_from = None;
        out.regrouped |= present.len() < parts.len();
        if !same_scale {
            (out.scale, out.alpha) = (1.0, None);
        } else if !present.iter().all(|m| same_alpha(m, first)) {
            out.alpha = None;
        }
        let factor = first.factor_slot();
        for (&slot, tensor) in &first.tensors {
            let role = slot.role();
            if matches!(role, Role::Global | Role::Opaque) {
                return refuse(format!("is {} and cannot be joined with others", first.kind_name()));
            }
            if !matches!(role, Role::Rows | Role::KronRows) {
                continue;
            }
            let mut pieces = Vec::new();
            for (part, &count) in parts.iter().zip(rows) {
                let count = match role {
                    Role::KronRows => first.kron_rows(&(0..count))?.len(),
                    _ => count,
                };
                let piece = match part.and_then(|m| m.get(slot)) {
                    Some(t) if Some(slot) == factor && !same_scale => t.clone().scaled(part.map_or(1.0, |m| m.scale)),
                    Some(t) => t.clone(),
                    None => zeros_like(tensor, count),
                };
                pieces.push(piece);
            }
            out.tensors.insert(slot, Tensor::stack_rows(&pieces));
        }
        Ok(out)
    }

    fn fuse_blocks(parts: &[Option<&Module>], rows: &[usize]) -> Result<Module, Refusal> {
        let present: Vec<&Module> = parts.iter().flatten().copied().collect();
        let kind = present[0].kind;
        let (row_slots, shared_slots): (&[Slot], &[Slot]) = match kind {
            Kind::Lora => (&[Slot::Up], &[Slot::Down]),
            Kind::Loha => (&[Slot::HadaW1A, Slot::HadaW2A], &[Slot::HadaW1B, Slot::HadaW2B]),
            Kind::Bias => (&[], &[]),
            _ => return refuse(format!("is {} whose parts share no factor, so they have no fused form", kind.name())),
        };
        let known =
            |s: &Slot| row_slots.contains(s) || shared_slots.contains(s) || matches!(s, Slot::DiffB | Slot::Magnitude);
        if let Some(other) = present.iter().flat_map(|m| m.tensors.keys()).find(|s| !known(s)) {
            return refuse(format!("has a `{}` tensor, which has no fused form", other.name()));
        }
        let tight: Vec<Option<Module>> = parts.iter().map(|part| part.map(Module::tightened)).collect();
        let same_scale = present.iter().all(|m| m.scale == present[0].scale);
        let mut tensors = BTreeMap::new();
        let shared = if kind == Kind::Lora { fuse_factors(&tight, rows, same_scale) } else { None };
        if let Some((down, up)) = shared {
            tensors.insert(Slot::Down, down);
            tensors.insert(Slot::Up, up);
        } else {
            let terms: Vec<Option<Module>> =
                tight.into_iter().map(|m| m.map(|m| if same_scale { m } else { m.folded() })).collect();
            for &slot in shared_slots {
                let stacked: Vec<Tensor> = terms.iter().flatten().filter_map(|m| m.get(slot).cloned()).collect();
                tensors.insert(slot, Tensor::stack_rows(&stacked));
            }
            for &slot in row_slots {
                let block = |(term, &count): (&Option<Module>, &usize)| match term.as_ref().and_then(|m| m.get(slot)) {
                    Some(t) => t.clone(),
                    None => Tensor::zeros(present[0].tensors[&slot].dtype(), vec![count, 0]),
                };
                let blocks: Vec<Tensor> = terms.iter().zip(rows).map(block).collect();
                tensors.insert(slot, Tensor::block_diagonal(&blocks));
            }
        }
        for slot in [Slot::DiffB, Slot::Magnitude] {
            let Some(like) = present.iter().find_map(|m| m.get(slot)) else { continue };
            let piece = |(part, &count): (&Option<&Module>, &usize)| {
                part.and_then(|m| m.get(slot)).cloned().unwrap_or_else(|| zeros_like(like, count))
            };
            tensors.insert(slot, Tensor::stack_rows(&parts.iter().zip(rows).map(piece).collect::<Vec<_>>()));
        }
        let mut out = Module::new(kind, tensors);
        out.scale = if same_scale { present[0].scale } else { 1.0 };
        out.alpha_source = present[0].alpha_source;
        out.regrouped = true;
        Ok(out)
    }
}

/// The input tensors of all of them, each once.
fn union<'m>(modules: impl Iterator<Item = &'m Module>) -> Vec<usize> {
    let mut inputs: Vec<usize> = modules.flat_map(|m| m.inputs.iter().copied()).collect();
    inputs.sort_unstable();
    inputs.dedup();
    inputs
}

/// The factors of a sum of LoRA.
fn sum_of_factors(terms: &[&Module]) -> Module {
    let width = terms.iter().filter_map(|m| m.get(Slot::Down)).map(Tensor::cols).max().unwrap_or(0);
    let mut wide: Vec<Module> = Vec::new();
    for term in terms.iter().filter(|m| m.kind == Kind::Lora) {
        let mut term = term.tightened();
        if let Some(down) = term.tensors.get_mut(&Slot::Down) {
            *down = down.padded(down.rows(), width);
        }
        wide.push(term);
    }
    let same_scale = wide.iter().all(|m| m.scale == wide[0].scale);
    let scale = if same_scale { wide[0].scale } else { 1.0 };
    let terms: Vec<Module> = wide.into_iter().map(|m| if same_scale { m } else { m.folded() }).collect();
    let pick = |slot| terms.iter().filter_map(|m| m.get(slot).cloned()).collect::<Vec<_>>();
    let (downs, ups) = (pick(Slot::Down), pick(Slot::Up));
    let mut out = Module::new(
        Kind::Lora,
        BTreeMap::from([(Slot::Down, Tensor::stack_rows(&downs)), (Slot::Up, Tensor::stack_cols(&ups))]),
    );
    out.scale = scale;
    out
}

/// Fused factors in which rows of `down` that several parts have stand once; `None` if no row is shared.
///
/// Where scales differ they go into `up`, so that shared rows stay what they are.
fn fuse_factors(parts: &[Option<Module>], rows: &[usize], same_scale: bool) -> Option<(Tensor, Tensor)> {
    let mut unique: Vec<Row<'_>> = Vec::new();
    let mut columns: Vec<Vec<usize>> = Vec::new();
    for part in parts {
        let mut mine = Vec::new();
        for row in part.iter().filter_map(|m| m.get(Slot::Down)).flat_map(Row::all) {
            // A part that has a row twice needs it twice: each has a column of its own.
            let twin = unique.iter().position(|other| *other == row).filter(|at| !mine.contains(at));
            mine.push(twin.unwrap_or_else(|| {
                unique.push(row);
                unique.len() - 1
            }));
        }
        columns.push(mine);
    }
    if unique.len() == columns.iter().map(Vec::len).sum::<usize>() {
        return None;
    }
    let downs: Vec<Tensor> = unique.iter().map(|row| row.tensor.slice_rows(row.index..row.index + 1)).collect();
    let mut ups = Vec::new();
    for ((part, &count), columns) in parts.iter().zip(rows).zip(&columns) {
        let Some(part) = part else {
            let like = parts.iter().flatten().find_map(|m| m.get(Slot::Up))?;
            ups.push(Tensor::zeros(like.dtype(), vec![count, unique.len()]));
            continue;
        };
        let scale = if same_scale { 1.0 } else { part.scale };
        ups.push(part.get(Slot::Up)?.clone().scaled(scale).spread_cols(columns, unique.len()));
    }
    Some((Tensor::stack_rows(&downs), Tensor::stack_rows(&ups)))
}

/// A row of a factor, compared by its bytes.
#[derive(Clone, Copy)]
struct Row<'t> {
    tensor: &'t Tensor,
    index: usize,
    /// Its first elements: unlike rows differ there already.
    head: [u64; 2],
}

impl<'t> Row<'t> {
    fn all(tensor: &'t Tensor) -> impl Iterator<Item = Row<'t>> {
        let heads = tensor.slice_cols(0..tensor.cols().min(2)).to_f64();
        let each = tensor.cols().clamp(1, 2);
        (0..tensor.rows()).map(move |index| {
            let head = |i: usize| if i < each { heads[index * each + i].to_bits() } else { 0 };
            Row { tensor, index, head: [head(0), head(1)] }
        })
    }
}

impl PartialEq for Row<'_> {
    fn eq(&self, other: &Self) -> bool {
        let line = |r: &Self| r.tensor.slice_rows(r.index..r.index + 1);
        self.head == other.head && line(self).same_as(&line(other))
    }
}

fn zeros_like(like: &Tensor, rows: usize) -> Tensor {
    let mut shape = like.shape().to_vec();
    if let Some(first) = shape.first_mut() {
        *first = rows;
    }
    Tensor::zeros(like.dtype(), shape)
}

fn same_alpha(a: &Module, b: &Module) -> bool {
    match (&a.alpha, &b.alpha) {
        (Some(x), Some(y)) => x.same_as(y),
        (None, None) => true,
        _ => false,
    }
}

/// Whether all parts have the same slots, and equal tensors in those that do not follow the rows.
fn shares_all_but_rows(parts: &[&Module]) -> bool {
    let first = parts[0];
    parts.iter().all(|m| {
        m.tensors.len() == first.tensors.len()
            && m.tensors.iter().zip(&first.tensors).all(|((sa, ta), (sb, tb))| {
                let follows_rows = matches!(sa.role(), Role::Rows | Role::KronRows);
                let fits = if follows_rows { ta.cols() == tb.cols() } else { ta.same_as(tb) };
                sa == sb && fits
            })
    })
}
