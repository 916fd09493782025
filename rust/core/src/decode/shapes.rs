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
    let has = |slot: Slot| tensors.contains_key(&slot);
    match kind {
        Kind::Lora => module.check_lora(),
        Kind::Loha if !has(Slot::HadaT1) => module.check_loha(),
        Kind::Lokr if !has(Slot::LokrT2) => module.check_lokr(),
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
        if INPUT.contains(&slot) && !self.row.inputs.is_empty() && !self.row.inputs.contains(&tensor.cols()) {
            return self.misfit(slot, &format!("{} inputs", self.widths()));
        }
        Ok(())
    }

    fn check_lora(&self) -> Result<()> {
        let (down, up) = (self.tensors[&Slot::Down].rows(), self.tensors[&Slot::Up].cols());
        if down == up {
            return Ok(());
        }
        let (down_name, up_name) = (&self.info(Slot::Down).name, &self.info(Slot::Up).name);
        let message = format!("`{down_name}` has rank {down}, `{up_name}` has rank {up}");
        Err(Error::new(Code::RankMismatch, message).key(up_name))
    }

    fn check_loha(&self) -> Result<()> {
        for (a, b) in [(Slot::HadaW1A, Slot::HadaW1B), (Slot::HadaW2A, Slot::HadaW2B)] {
            let (Some((rows, rank)), Some((rank_b, width))) = (self.dims(a), self.dims(b)) else { continue };
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
        for (a, b) in [(Slot::LokrW1A, Slot::LokrW1B), (Slot::LokrW2A, Slot::LokrW2B)] {
            let (Some((_, have)), Some((want, _))) = (self.dims(a), self.dims(b)) else { continue };
            if have != want {
                return self.misfit(a, &format!("{want} columns, the rank of its partner"));
            }
        }
        let factor =
            |whole, a, b| self.dims(whole).or_else(|| Some((self.dims(a)?.0, self.dims(b)?.1))).unwrap_or((0, 0));
        let w1 = factor(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B);
        let w2 = factor(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B);
        let (rows, cols) = (w1.0 * w2.0, w1.1 * w2.1);
        if rows == self.output && self.row.inputs.contains(&cols) {
            return Ok(());
        }
        let slot = if self.tensors.contains_key(&Slot::LokrW1) { Slot::LokrW1 } else { Slot::LokrW1A };
        self.misfit(slot, &format!("{}x{}; the Kronecker product is {rows}x{cols}", self.output, self.widths()))
    }
}
