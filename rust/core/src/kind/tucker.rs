//! Tucker cores multiplied into their factors: the same delta, in the slots of the form without a core.

use super::{Module, Slot};
use crate::tensor::Tensor;

impl Module {
    /// Whether a core of shape (rank, rank, kernel) stands between its factors.
    pub fn has_core(&self) -> bool {
        [Slot::Mid, Slot::HadaT1, Slot::HadaT2, Slot::LokrT2].iter().any(|s| self.tensors.contains_key(s))
    }

    /// The same delta without Tucker cores (LyCORIS, `functional/general.py: rebuild_tucker`).
    ///
    /// LoCon: `down'[p, j, ..] = sum_q mid[p, q, ..] down[q, j]`. LoHa and LoKr, whose `a` is stored as (rank, out):
    /// `a' = a^T`, `b'[p, j, ..] = sum_q t[p, q, ..] b[q, j]`. Ranks, and with them alpha, stay what they were. New
    /// factors keep the type of the old ones, rounded once.
    #[must_use]
    pub fn flattened(&self) -> Module {
        if !self.has_core() {
            return self.clone();
        }
        let mut out = Module { regrouped: true, cut_from: None, ..self.clone() };
        for (core, outer, inner) in [
            (Slot::Mid, None, Slot::Down),
            (Slot::HadaT1, Some(Slot::HadaW1A), Slot::HadaW1B),
            (Slot::HadaT2, Some(Slot::HadaW2A), Slot::HadaW2B),
            (Slot::LokrT2, Some(Slot::LokrW2A), Slot::LokrW2B),
        ] {
            let Some(core) = out.tensors.remove(&core) else { continue };
            if let Some(b) = out.tensors.get_mut(&inner) {
                *b = core.contracted(b);
            }
            if let Some(a) = outer.and_then(|slot| out.tensors.get_mut(&slot)) {
                *a = a.transposed();
            }
        }
        out
    }

    /// The dimensions of the kernel of a convolution, as far as the shapes of its factors say; empty for linear layers.
    pub fn kernel(&self) -> &[usize] {
        let order = [Slot::Down, Slot::HadaW1B, Slot::LokrW2B, Slot::LokrW2, Slot::Diff];
        let cores = [Slot::Mid, Slot::HadaT1, Slot::LokrT2];
        let shape = |slot: &Slot| self.get(*slot).map(Tensor::shape).and_then(|s| s.get(2..));
        cores.iter().chain(&order).find_map(shape).unwrap_or(&[])
    }
}
