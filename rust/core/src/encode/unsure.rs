//! A file that several families explain alike may be written only where all of them would be written alike.

use crate::adapter::Adapter;
use crate::detect::ambiguous;
use crate::error::Result;
use crate::table::pattern::Skeleton;
use crate::table::{Dialect, Op};

/// How a dialect writes a canonical module: the name with its prefix, the part of a fused one, and whether its halves
/// are exchanged.
type Written = (String, Option<usize>, bool);

/// An error if the family was taken for being the first of several, and another one would be written differently.
pub(super) fn check(adapter: &Adapter, dialect: &Dialect) -> Result<()> {
    let registry = &adapter.registry;
    let error = |why: &str| Err(ambiguous(registry, &adapter.detection, &adapter.source, why));
    match adapter.detection.tie_break {
        Some("unsure") => return error(""),
        Some("order") => {}
        _ => return Ok(()),
    }
    // A family that is much more common is meant; the warning about it is enough.
    let own = registry.families[adapter.family].order;
    let equal = |f: &usize| *f != adapter.family && registry.families[*f].order <= own && dialect.writes(*f);
    for other in adapter.detection.candidates.iter().copied().filter(equal) {
        for key in adapter.modules.keys() {
            let ours = written(adapter, dialect, adapter.family, key.component, &key.path);
            let name = &adapter.component(key.component).name;
            let theirs = registry.families[other].component(name);
            let theirs = theirs.and_then(|component| written(adapter, dialect, other, component, &key.path));
            if let (Some(ours), Some(theirs)) = (ours, theirs)
                && ours != theirs
            {
                let (path, dialect) = (&key.path, &dialect.name);
                return error(&format!("; in `{dialect}`, `{path}` is `{}` or `{}`", ours.0, theirs.0));
            }
        }
    }
    Ok(())
}

fn written(adapter: &Adapter, dialect: &Dialect, family: usize, component: usize, path: &str) -> Option<Written> {
    let place = dialect.place(family, component)?;
    let table = &adapter.registry.families[family].components[component];
    let skeleton = Skeleton::of(path)?;
    table.rows.iter().find_map(|row| {
        row.canonical.iter().enumerate().find_map(|(part, template)| {
            let variables = template.matches(&skeleton.digits, table.variables.len())?;
            if template.render(&variables) != path {
                return None;
            }
            let name = match place.namespace {
                0 => path.to_owned(),
                n => row.names[n].as_ref()?.render(&variables),
            };
            let other = place.namespace != 0;
            let part = (row.op == Op::Fuse && other).then_some(part);
            let name = if place.prefix.ends_with('_') { name.replace('.', "_") } else { name };
            Some((format!("{}{name}", place.prefix), part, row.op == Op::SwapHalves && other))
        })
    })
}
