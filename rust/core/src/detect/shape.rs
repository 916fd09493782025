//! Whether tensors have shapes that modules of a family can have.

use std::collections::BTreeMap;

use crate::kind::Slot;
use crate::table::{Hit, Registry, Row};

fn row<'r>(registry: &'r Registry, hit: &Hit) -> &'r Row {
    &registry.families[hit.family].components[hit.component].rows[hit.row]
}

/// Whether the shape is one that the tensor can have in this module. Of a product only one factor is seen at a time, so
/// there it is enough that the other can make up the rest.
pub(super) fn fits(registry: &Registry, hit: &Hit, slot: Slot, shape: &[usize]) -> bool {
    let row = row(registry, hit);
    let output = hit.part.map_or_else(|| row.output(), |part| row.outputs[part]);
    let rows = shape.first().copied().unwrap_or(1);
    let cols = shape.iter().skip(1).product::<usize>();
    let area: usize = row.kernel.iter().product();
    // Beside a core a factor has the channels alone.
    let channels = |cols: usize| row.inputs.iter().any(|&width| width == cols || width == cols * area);
    let divides = |part: usize, whole: usize| part > 0 && whole.is_multiple_of(part);
    match slot {
        Slot::Down => channels(cols),
        Slot::Up | Slot::Bias | Slot::DiffB | Slot::WNorm | Slot::BNorm => rows == output,
        Slot::Diff | Slot::Set => rows == output && (row.inputs.is_empty() || row.inputs.contains(&cols)),
        // With a core the factors of the output are transposed.
        Slot::HadaW1A | Slot::HadaW2A => rows == output || cols == output,
        Slot::HadaW1B | Slot::HadaW2B => channels(cols),
        Slot::LokrW1 => divides(rows, output) && row.inputs.iter().any(|&width| divides(cols, width)),
        Slot::LokrW2 => divides(rows, output) && row.inputs.iter().any(|&width| divides(cols, width)),
        Slot::LokrW1A => divides(rows, output),
        Slot::LokrW1B => row.inputs.iter().any(|&width| divides(cols, width)),
        Slot::LokrW2A => divides(rows, output) || divides(cols, output),
        Slot::LokrW2B => row.inputs.iter().any(|&width| divides(cols, width)),
        Slot::Magnitude => rows == output || channels(cols) || cols == 1 && channels(rows),
        _ => true,
    }
}

/// The size of the product of two factors, each whole or a product itself.
pub(super) fn kronecker(slots: &BTreeMap<Slot, &[usize]>) -> Option<(usize, usize)> {
    let rows = |slot: Slot| slots.get(&slot)?.first().copied();
    let cols = |slot: Slot| Some(slots.get(&slot)?.iter().skip(1).product::<usize>());
    let factor = |whole: Slot, a: Slot, b: Slot| {
        let pair = || Some((rows(a)?, cols(b)?));
        rows(whole).zip(cols(whole)).or_else(pair)
    };
    let one = factor(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B)?;
    let two = factor(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B)?;
    Some((one.0 * two.0, one.1 * two.1))
}

/// Whether a product is as large as the module.
pub(super) fn is_size(registry: &Registry, hit: &Hit, (rows, cols): (usize, usize)) -> bool {
    let row = row(registry, hit);
    rows == hit.part.map_or_else(|| row.output(), |part| row.outputs[part]) && row.inputs.contains(&cols)
}
