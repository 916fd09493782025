//! Whether the tensors of a module have the types and shapes that its kind and its row need.

use std::collections::BTreeMap;

use super::Group;
use crate::error::{Code, Error, Result};
use crate::io::{Source, TensorInfo};
use crate::kind::{Kind, Role, Slot};
use crate::table::Row;
use crate::tensor::Tensor;

/// Slots whose first dimension is the module's output.
const OUTPUT: [Slot; 8] =
    [Slot::Up, Slot::Bias, Slot::DiffB, Slot::WNorm, Slot::BNorm, Slot::Magnitude, Slot::Diff, Slot::Set];

/// Slots that hold a vector.
const VECTORS: [Slot; 5] = [Slot::Bias, Slot::DiffB, Slot::WNorm, Slot::BNorm, Slot::Magnitude];

/// Slots whose other dimensions are the module's input, where it has one.
const INPUT: [Slot; 4] = [Slot::Down, Slot::Diff, Slot::Set, Slot::MagnitudeIn];

/// Checks one module of a file.
pub(super) fn check(
    source: &Source,
    group: &Group<'_>,
    row: &Row,
    kind: Kind,
    tensors: &BTreeMap<Slot, Tensor>,
) -> Result<()> {
    let output = group.hit.part.map_or_else(|| row.output(), |part| row.outputs[part]);
    let module = Module { source, group, row, tensors, output };
    tensors.keys().try_for_each(|&slot| module.check_slot(slot))?;
    match kind {
        Kind::Lora => module.check_lora(),
        Kind::Loha => module.check_loha(),
        Kind::Lokr => module.check_lokr(),
        _ => Ok(()),
    }
}

struct Module<'a> {
    source: &'a Source,
    group: &'a Group<'a>,
    row: &'a Row,
    tensors: &'a BTreeMap<Slot, Tensor>,
    /// Output rows.
    output: usize,
}

impl Module<'_> {
    fn info(&self, slot: Slot) -> &TensorInfo {
        &self.source.tensors()[self.group.slots[&slot].0]
    }

    fn dims(&self, slot: Slot) -> Option<(usize, usize)> {
        self.tensors.get(&slot).map(|t| (t.rows(), t.cols()))
    }

    /// A factor as it is beside a core: `a` is stored as (rank, out), and each column of `b` stands for a kernel.
    fn with_core(&self, core: Slot, a: Slot, b: Slot) -> Result<Option<[(usize, usize); 2]>> {
        let (Some(left), Some(right)) = (self.dims(a), self.dims(b)) else { return Ok(None) };
        let Some(tensor) = self.tensors.get(&core) else { return Ok(Some([left, right])) };
        let (outer, kernel) = (left.0, tensor.shape().get(2..).unwrap_or(&[]).iter().product::<usize>());
        if tensor.shape().len() < 2 || (tensor.rows(), tensor.shape()[1]) != (outer, right.0) {
            return self.misfit(core, &format!("shape [{outer}, {}, ..]", right.0)).map(|()| None);
        }
        Ok(Some([(left.1, left.0), (outer, right.1 * kernel)]))
    }

    fn widths(&self) -> String {
        self.row.inputs.iter().map(usize::to_string).collect::<Vec<_>>().join(" or ")
    }

    fn misfit(&self, slot: Slot, want: &str) -> Result<()> {
        let info = self.info(slot);
        let message = format!("`{}` has shape {:?}, but the module needs {want}", info.name, info.shape);
        Err(Error::new(Code::ShapeMismatch, message).key(&info.name))
    }

    fn check_slot(&self, slot: Slot) -> Result<()> {
        let tensor = &self.tensors[&slot];
        if !tensor.dtype().is_float() && slot.role() != Role::Note {
            let info = self.info(slot);
            let message = format!("`{}` is {}, but factors are floating point", info.name, info.dtype.name());
            return Err(Error::new(Code::InvalidDtype, message).key(&info.name));
        }
        if OUTPUT.contains(&slot) && tensor.rows() != self.output {
            return self.misfit(slot, &format!("{} output rows", self.output));
        }
        if VECTORS.contains(&slot) && tensor.cols() != 1 {
            return self.misfit(slot, &format!("a vector of {}", self.output));
        }
        // Down beside a core, and a magnitude over channels: their kernels are elsewhere.
        let beside = (slot == Slot::Down && self.tensors.contains_key(&Slot::Mid))
            || (slot == Slot::MagnitudeIn && tensor.shape().len() > 2);
        let fits = |width: &usize| *width == tensor.cols() || (beside && width.is_multiple_of(tensor.cols().max(1)));
        if INPUT.contains(&slot) && !self.row.inputs.is_empty() && !self.row.inputs.iter().any(fits) {
            return self.misfit(slot, &format!("{} inputs", self.widths()));
        }
        Ok(())
    }

    fn check_lora(&self) -> Result<()> {
        if let Some(mid) = self.tensors.get(&Slot::Mid) {
            return self.check_mid(mid);
        }
        let (down, up) = (self.tensors[&Slot::Down].rows(), self.tensors[&Slot::Up].cols());
        if down == up {
            return Ok(());
        }
        let (down_name, up_name) = (&self.info(Slot::Down).name, &self.info(Slot::Up).name);
        let message = format!("`{down_name}` has rank {down}, `{up_name}` has rank {up}");
        Err(Error::new(Code::RankMismatch, message).key(up_name))
    }

    /// A core of shape (rank of up, rank of down, kernel).
    fn check_mid(&self, mid: &Tensor) -> Result<()> {
        let (up, down) = (self.tensors[&Slot::Up].cols(), &self.tensors[&Slot::Down]);
        if mid.shape().len() < 2 || (mid.rows(), mid.shape()[1]) != (up, down.rows()) {
            return self.misfit(Slot::Mid, &format!("shape [{up}, {}, ..]", down.rows()));
        }
        let width = down.cols() * mid.shape()[2..].iter().product::<usize>();
        if self.row.inputs.is_empty() || self.row.inputs.contains(&width) {
            return Ok(());
        }
        self.misfit(Slot::Mid, &format!("{} inputs; with its kernel `lora_down` has {width}", self.widths()))
    }

    fn check_loha(&self) -> Result<()> {
        if let Some((lone, other)) = [(Slot::HadaT1, Slot::HadaT2), (Slot::HadaT2, Slot::HadaT1)]
            .into_iter()
            .find(|(a, b)| self.tensors.contains_key(a) && !self.tensors.contains_key(b))
        {
            let name = &self.info(lone).name;
            let message = format!("`{name}` lacks its partner `{}`", other.name());
            return Err(Error::new(Code::UnpairedModule, message).key(name));
        }
        for (core, a, b) in [(Slot::HadaT1, Slot::HadaW1A, Slot::HadaW1B), (Slot::HadaT2, Slot::HadaW2A, Slot::HadaW2B)]
        {
            let Some([(rows, rank), (rank_b, width)]) = self.with_core(core, a, b)? else { continue };
            if rows != self.output || rank != rank_b {
                return self.misfit(a, &format!("shape [{}, {rank_b}]", self.output));
            }
            if !self.row.inputs.contains(&width) {
                return self.misfit(b, &format!("{} inputs", self.widths()));
            }
        }
        Ok(())
    }

    fn check_lokr(&self) -> Result<()> {
        let mut products = [None; 2];
        let pairs = [(None, Slot::LokrW1A, Slot::LokrW1B), (Some(Slot::LokrT2), Slot::LokrW2A, Slot::LokrW2B)];
        for (product, (core, a, b)) in products.iter_mut().zip(pairs) {
            let pair = match core {
                Some(core) => self.with_core(core, a, b)?,
                None => self.dims(a).zip(self.dims(b)).map(|(a, b)| [a, b]),
            };
            let Some([(rows, have), (want, cols)]) = pair else { continue };
            *product = Some((rows, cols));
            if have != want {
                return self.misfit(a, &format!("{want} columns, the rank of its partner"));
            }
        }
        if self.tensors.contains_key(&Slot::LokrT2) && products[1].is_none() {
            return self.misfit(Slot::LokrT2, "`lokr_w2_a` and `lokr_w2_b` beside it");
        }
        let w1 = self.dims(Slot::LokrW1).or(products[0]).unwrap_or((0, 0));
        let w2 = self.dims(Slot::LokrW2).or(products[1]).unwrap_or((0, 0));
        let (rows, cols) = (w1.0 * w2.0, w1.1 * w2.1);
        if rows == self.output && self.row.inputs.contains(&cols) {
            return Ok(());
        }
        let slot = if self.tensors.contains_key(&Slot::LokrW1) { Slot::LokrW1 } else { Slot::LokrW1A };
        self.misfit(slot, &format!("{}x{}; the Kronecker product is {rows}x{cols}", self.output, self.widths()))
    }
}
