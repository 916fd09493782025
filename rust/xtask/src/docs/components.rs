//! Rows as tables write them, and the page of components that several families share.

use std::collections::BTreeSet;

use toml::{Table, Value};

use super::families::LEGEND;
use crate::markdown::{GENERATED, code, lines, table};
use crate::tables::{Part, Tables, text, texts};

pub(super) fn page(tables: &Tables) -> String {
    let mut out =
        format!("{GENERATED}# Shared components\n\nParts that several families have, mostly text encoders.\n{LEGEND}");
    for (name, source) in tables.shared() {
        let users = tables.users(name);
        if users.len() < 2 {
            continue;
        }
        let users: Vec<String> = users.iter().map(|f| format!("[`{f}`](families/{f}.md)")).collect();
        out += &format!("\n## {name}\n\n{}\n\nUsed by {}.", source.about, users.join(", "));
        let numbers = |field| source.numbers(field, None);
        let blocks = numbers("blocks").into_iter().map(|(name, n)| format!("`{{{name}}}` 0 to {}", n - 1));
        let widths = numbers("sizes").into_iter().map(|(name, n)| format!("`{name}` {n}"));
        let all: Vec<String> = blocks.chain(widths).collect();
        if !all.is_empty() {
            out += &format!(" Blocks and widths: {}.", all.join(", "));
        }
        out += &format!("\n\n{}", rows(&source.part()));
    }
    out
}

/// The rows of a component with the lists that they name.
pub(super) fn rows(part: &Part<'_>) -> String {
    let has = |field: &str| part.rows.iter().any(|row| row.contains_key(field));
    let mut head: Vec<String> = part.namespaces.iter().map(|n| code(n)).collect();
    head.extend(["operation", "in", "out"].map(str::to_owned));
    head.extend(
        ["kernel", "variants"]
            .into_iter()
            .filter(|f| has(f))
            .map(|f| if f == "variants" { "sizes" } else { f }.to_owned()),
    );
    let cells = |row: &&Table| {
        let mut cells: Vec<String> = part.namespaces.iter().map(|n| name(row, n)).collect();
        cells.push(text(row, "op").unwrap_or("rename").to_owned());
        cells.push(row.get("in").map_or("-".to_owned(), |v| widths(v, " or ")));
        cells.push(row.get("out").map_or("-".to_owned(), |v| widths(v, ", ")));
        let kernel = |value: &Value| widths(value, " x ");
        cells.extend(has("kernel").then(|| row.get("kernel").map_or("-".to_owned(), kernel)));
        let sizes = |value: &Value| texts(value).join(", ");
        cells.extend(has("variants").then(|| row.get("variants").map_or("all".to_owned(), sizes)));
        cells
    };
    table(&head, &part.rows.iter().map(cells).collect::<Vec<_>>()) + &lists(part)
}

/// The name of a row in a namespace, with the parameter's where it has one.
fn name(row: &Table, namespace: &str) -> String {
    let Some(path) = text(row, namespace) else { return "-".to_owned() };
    let param = row.get("param").and_then(|p| text(p.as_table()?, namespace));
    code(&param.map_or_else(|| path.to_owned(), |param| format!("{path}.{param}")))
}

/// One width, or several; sums and products are written out.
fn widths(value: &Value, between: &str) -> String {
    match value {
        Value::Array(all) => all.iter().map(|v| widths(v, between)).collect::<Vec<_>>().join(between),
        Value::String(text) => text.replace('*', " x "),
        other => other.as_integer().unwrap_or_default().to_string(),
    }
}

/// The lists that rows of this component name.
fn lists(part: &Part<'_>) -> String {
    let named: BTreeSet<&str> =
        part.rows.iter().flat_map(|row| part.namespaces.iter().filter_map(|n| text(row, n))).collect();
    let mut out = String::new();
    for (list, entries) in part.source.lists() {
        let word = format!("{{{list}}}");
        if !named.iter().any(|name| name.contains(&word)) {
            continue;
        }
        let namespaces: Vec<&str> = part.namespaces.iter().copied().filter(|n| entries.contains_key(n)).collect();
        let head: Vec<String> = namespaces.iter().map(|n| code(n)).collect();
        let row = vec![namespaces.iter().map(|n| lines(&entries[n])).collect::<Vec<_>>()];
        out += &format!("\nThe list `{word}`:\n\n{}", table(&head, &row));
    }
    out
}
