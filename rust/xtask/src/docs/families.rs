//! One page for a family: its modules under every name, with shapes.

use std::collections::BTreeMap;

use lorafmt_core::table::{Component, Op, Registry, Row};

use super::{names, symbolic};
use crate::markdown::{GENERATED, code, codes, lines, table};

pub(super) fn page(registry: &Registry, index: usize) -> String {
    let family = &registry.families[index];
    let mut out = format!("{GENERATED}# {} (`{}`)\n\n", family.title, family.name);
    let with = |wanted: fn(&lorafmt_core::table::Dialect, usize) -> bool| {
        let dialects = registry.dialects.iter().filter(|d| wanted(d, index));
        dialects.map(|d| format!("[`{0}`](../dialects/{0}.md)", d.name)).collect::<Vec<_>>().join(", ")
    };
    out += &format!("- Read from: {}\n", with(|d, f| d.reads(f)));
    out += &format!("- Written as: {}\n", with(|d, f| d.writes(f)));
    out += &format!("- Metadata that speaks for it where the keys fit several families: {}\n", codes(&family.hints));
    let parts: Vec<String> = family.components.iter().map(|c| code(&c.name)).collect();
    out += &format!("- Components: {}\n\n", parts.join(", "));
    out += "`fuse` stacks the modules of the first column by output rows; `swap_halves` exchanges the two halves of the\n\
            output rows; `only` marks parameters that are replaced or shifted and never get factors. The first namespace of a\n\
            component is the canonical one.\n";
    for component in &family.components {
        out += &section(component);
    }
    out
}

fn section(component: &Component) -> String {
    let mut out = format!("\n## {}\n\n", component.name);
    let counts: Vec<String> =
        counts(component).iter().map(|(name, n)| format!("`{{{name}}}` 0 to {}", n - 1)).collect();
    let modules: usize = distinct(component).len();
    out += &format!("{modules} modules. Block numbers: {}.\n\n", counts.join(", "));
    let mut head: Vec<String> = component.namespaces.iter().map(|n| code(n)).collect();
    head.extend(["operation".to_owned(), "in".to_owned(), "out".to_owned()]);
    let rows: Vec<Vec<String>> = component.rows.iter().map(|row| cells(component, row)).collect();
    out + &table(&head, &rows)
}

fn cells(component: &Component, row: &Row) -> Vec<String> {
    let spelled = |namespace: usize| {
        let param = row.params[namespace].as_ref().map_or_else(String::new, |p| format!(".{p}"));
        let texts: Vec<String> =
            names(row, namespace).iter().map(|t| format!("{}{param}", symbolic(t, component))).collect();
        if texts.is_empty() { "-".to_owned() } else { lines(texts) }
    };
    let numbers = |all: &[usize], between: &str| all.iter().map(usize::to_string).collect::<Vec<_>>().join(between);
    let mut out: Vec<String> = (0..component.namespaces.len()).map(spelled).collect();
    out.push(row.op.name().to_owned());
    out.push(if row.inputs.is_empty() { "-".to_owned() } else { numbers(&row.inputs, " or ") });
    out.push(numbers(&row.outputs, " + "));
    out
}

/// How many blocks there are of each kind, by the variable's name.
fn counts(component: &Component) -> BTreeMap<&str, u32> {
    let bounds = component.rows.iter().flat_map(|r| r.canonical.iter().flat_map(|t| t.bounds()));
    bounds.map(|(variable, below)| (component.variables[variable].as_str(), below)).collect()
}

/// The canonical names of all layers (parameters under `only` are none).
fn distinct(component: &Component) -> std::collections::BTreeSet<String> {
    let mut out = std::collections::BTreeSet::new();
    for row in component.rows.iter().filter(|r| r.op != Op::Only) {
        for template in &row.canonical {
            let mut all = vec![vec![0; component.variables.len()]];
            for (variable, below) in template.bounds() {
                let set = |v: &Vec<u32>, n: u32| {
                    let mut v = v.clone();
                    v[variable] = n;
                    v
                };
                all = all.iter().flat_map(|v| (0..below).map(move |n| set(v, n))).collect();
            }
            out.extend(all.iter().map(|v| template.render(v)));
        }
    }
    out
}
