//! A file that several families explain alike may be written only where all of them would be written alike.

use crate::adapter::Adapter;
use crate::error::{Code, Error, Result};
use crate::table::pattern::Skeleton;
use crate::table::{Dialect, Op};

/// How a dialect writes a canonical module: the name with its prefix, the part of a fused one, and whether its halves
/// are exchanged.
type Written = (String, Option<usize>, bool);

/// An error if the family was taken for being the first of several, and the dialect names modules of another one
/// differently.
pub(super) fn check(adapter: &Adapter, dialect: &Dialect) -> Result<()> {
    if adapter.detection.tie_break != Some("order") {
        return Ok(());
    }
    let registry = &adapter.registry;
    let others = adapter.detection.candidates.iter().copied().filter(|&f| f != adapter.family && dialect.writes(f));
    for other in others {
        for key in adapter.modules.keys() {
            let ours = written(adapter, dialect, adapter.family, key.component, &key.path);
            let name = &adapter.component(key.component).name;
            let theirs = registry.families[other].component(name);
            let theirs = theirs.and_then(|component| written(adapter, dialect, other, component, &key.path));
            if let (Some(ours), Some(theirs)) = (ours, theirs)
                && ours != theirs
            {
                let labels: Vec<String> =
                    adapter.detection.candidates.iter().map(|&f| registry.families[f].label()).collect();
                let message = format!(
                    "the file fits {} alike, and `{}` calls `{}` either `{}` or `{}`",
                    labels.join(" and "),
                    dialect.name,
                    key.path,
                    ours.0,
                    theirs.0
                );
                let error = Error::new(Code::AmbiguousFamily, message).at(adapter.source.path());
                return Err(error.hint(format!("add `--family {}`", labels.join("` or `--family "))));
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
            Some((format!("{}{name}", place.prefix), part, row.op == Op::SwapHalves && other))
        })
    })
}
