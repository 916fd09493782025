//! Where modules stand in a model: components and blocks, as the family's tables count them.

use crate::adapter::{Adapter, Address, ModuleKey};

/// A block of a component, or what is outside of its blocks. Ordered as the family's table is: by component, then by
/// the row that names the blocks first, then by number; what is outside comes last.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    component: usize,
    row: usize,
    number: u32,
    /// The path of the block with its number; `None` outside of blocks.
    pub(super) block: Option<String>,
}

impl Place {
    pub(super) fn of(adapter: &Adapter, key: &ModuleKey, address: &Address) -> Self {
        let outside = Self { component: key.component, row: usize::MAX, number: 0, block: None };
        let row = adapter.row(key, address);
        // A fused module that could not be cut belongs where its parts do.
        let template = &row.canonical[address.part.unwrap_or(0)];
        let Some((stem, number)) = template.block(&address.variables) else { return outside };
        let rows = &adapter.component(key.component).rows;
        let names = |row: &crate::table::Row| row.canonical[0].block(&address.variables).is_some_and(|b| b.0 == stem);
        // Rows of other blocks have other variables, which may be unset here: their stems are compared all the same.
        let first = rows.iter().position(names).unwrap_or(address.row);
        Self { row: first, number, block: Some(format!("{stem}{number}")), ..outside }
    }

    /// The name of its component.
    pub(super) fn component<'a>(&self, adapter: &'a Adapter) -> &'a str {
        &adapter.component(self.component).name
    }
}
