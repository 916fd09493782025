//! What a conversion did, or would do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use lorafmt_core::plan::Plan;
use lorafmt_core::report::{Fidelity, Report, Warning};
use lorafmt_core::strength::Strength;
use serde_json::{Map, Value, json};

use super::text::{BOLD, DIM, GREEN, by_place, bytes, clean, number, paint, plural, seconds};
use super::{Answer, View, ranks};

/// A conversion that was done or planned.
pub(crate) struct Converted {
    pub(crate) report: Report,
    /// Modules as the one source names them; the report counts those of the target.
    pub(crate) modules: Option<usize>,
    /// What it is composed of, if it is a composition.
    pub(crate) parts: Vec<Part>,
    /// Written to standard output.
    pub(crate) stdout: bool,
    pub(crate) planned: Option<Planned>,
}

/// One adapter of a composition.
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) path: String,
    pub(crate) strength: Strength,
}

/// What would be written.
pub(crate) struct Planned {
    target: String,
    tensors: Vec<(String, &'static str, Vec<usize>)>,
    metadata: Vec<(String, String)>,
    beside: Option<String>,
}

/// The parts of a plan that are shown.
pub(crate) fn planned(plan: &Plan, target: String) -> Planned {
    let tensor = |o: &lorafmt_core::plan::Output| {
        let key = o.key.clone();
        (key, o.tensor.dtype().name(), o.tensor.shape().to_vec())
    };
    Planned {
        target,
        tensors: plan.outputs.iter().map(tensor).collect(),
        metadata: plan.full_metadata(),
        beside: plan.sidecar.as_ref().map(|(name, _)| name.clone()),
    }
}

impl Answer for Converted {
    fn json(&self) -> Value {
        let mut value = serde_json::to_value(&self.report).unwrap_or_default();
        if let (Some(planned), Some(object)) = (&self.planned, value.as_object_mut()) {
            object.insert("dry_run".into(), true.into());
            if let Some(target) = object.get_mut("target").and_then(Value::as_object_mut) {
                target.insert("planned".into(), planned.target.clone().into());
            }
            object.insert("plan".into(), planned.json());
        }
        value
    }

    fn human(&self, view: &View) -> String {
        match &self.planned {
            Some(planned) => planned.human(self, view),
            None if view.quiet => String::new(),
            None => {
                let path = self.report.target.path.as_deref().unwrap_or("-");
                let (wrote, path) = (paint(GREEN, "wrote"), paint(BOLD, clean(path)));
                let parts = self.ingredients(view);
                format!("{wrote} {path}  ({})\n{parts}{}", self.summary(true), self.ranks(view))
            }
        }
    }

    fn warnings(&self) -> &[Warning] {
        &self.report.warnings
    }

    fn aside(&self) -> bool {
        self.stdout && self.planned.is_none()
    }
}

impl Converted {
    /// Every adapter of a composition with its strength.
    fn ingredients(&self, view: &View) -> String {
        if !view.verbose {
            return String::new();
        }
        let numbers: Vec<String> = self.parts.iter().map(|p| number(p.strength.all)).collect();
        let width = numbers.iter().map(String::len).max().unwrap_or(0);
        let several = |part: &Part| self.parts.iter().any(|p| p.path == part.path && p.name != part.name);
        let line = |(part, number): (&Part, &String)| {
            let inside = if several(part) { format!(": {}", clean(&part.name)) } else { String::new() };
            format!("  {number:>width$}  {}{inside}{}\n", clean(&part.path), by_place(&part.strength))
        };
        self.parts.iter().zip(&numbers).map(line).collect()
    }

    /// What happened to ranks.
    fn ranks(&self, view: &View) -> String {
        self.report.resize.as_ref().map_or_else(String::new, |r| ranks::ranks(r, view))
    }

    fn summary(&self, done: bool) -> String {
        let (r, t) = (&self.report, &self.report.tensors);
        let mut parts = vec![
            match self.parts.len() {
                0 | 1 => format!("{} -> {}", r.source.dialect, r.target.dialect),
                several => format!("{several} adapters -> {}", r.target.dialect),
            },
            r.source.family.clone(),
            match self.modules.filter(|n| *n != r.modules) {
                None => plural(r.modules, "module", "modules"),
                Some(modules) => format!("{modules} -> {} modules", r.modules),
            },
            format!("{} used", plural(t.used, "tensor", "tensors")),
        ];
        let others = [(t.carried, "carried"), (t.dropped, "dropped"), (t.unknown, "unknown")];
        parts.extend(others.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")));
        parts.push(bytes(r.target.bytes));
        parts.push(fidelity(r.fidelity).to_owned());
        if done {
            parts.push(seconds(r.seconds));
        }
        clean(&parts.join(", ")).into_owned()
    }
}

fn fidelity(fidelity: Fidelity) -> &'static str {
    match fidelity {
        Fidelity::Exact => "exact",
        Fidelity::Regrouped => "regrouped",
        Fidelity::Rescaled => "rescaled",
        Fidelity::Approximate => "approximate",
    }
}

impl Planned {
    fn json(&self) -> Value {
        let tensor =
            |(key, dtype, shape): &(String, &str, Vec<usize>)| json!({"key": key, "dtype": dtype, "shape": shape});
        let metadata: Map<String, Value> = self.metadata.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
        json!({
            "tensors": self.tensors.iter().map(tensor).collect::<Vec<_>>(),
            "metadata": metadata,
            "beside": self.beside,
        })
    }

    fn human(&self, converted: &Converted, view: &View) -> String {
        let target = paint(BOLD, clean(&self.target));
        let mut out = format!("{} {target}  ({})\n", paint(GREEN, "would write"), converted.summary(false));
        if view.quiet {
            return out;
        }
        out += &converted.ingredients(view);
        out += &converted.ranks(view);
        let lines: Vec<(String, String, usize)> = if view.verbose {
            self.tensors.iter().map(|(key, dtype, shape)| (key.clone(), format!("{dtype} {shape:?}"), 1)).collect()
        } else {
            grouped(&self.tensors)
        };
        let width = lines.iter().map(|(key, ..)| key.chars().count()).max().unwrap_or(0);
        for (key, kind, count) in lines {
            let times = if count > 1 { paint(DIM, format!("  x{count}")) } else { String::new() };
            let _ = writeln!(out, "  {:width$}  {kind}{times}", clean(&key));
        }
        if let Some(beside) = &self.beside {
            let _ = writeln!(out, "  and {beside}");
        }
        out
    }
}

/// Keys that differ only in block numbers as one line: `blocks.{0..18}.attn`, what they are, how many.
fn grouped(tensors: &[(String, &'static str, Vec<usize>)]) -> Vec<(String, String, usize)> {
    struct Group<'a> {
        skeleton: Vec<&'a str>,
        kind: String,
        numbers: Vec<BTreeSet<u32>>,
        count: usize,
    }
    let mut groups: Vec<Group<'_>> = Vec::new();
    let mut index = BTreeMap::new();
    for (key, dtype, shape) in tensors {
        let (skeleton, numbers) = numbered(key);
        let kind = format!("{dtype} {shape:?}");
        let at = *index.entry((skeleton.clone(), kind.clone())).or_insert_with(|| {
            groups.push(Group { skeleton, kind, numbers: vec![BTreeSet::new(); numbers.len()], count: 0 });
            groups.len() - 1
        });
        groups[at].count += 1;
        for (seen, n) in groups[at].numbers.iter_mut().zip(numbers) {
            seen.insert(n);
        }
    }
    let render = |g: Group<'_>| {
        let mut numbers = g.numbers.iter();
        let mut text = String::new();
        for part in g.skeleton {
            match if part == "#" { numbers.next() } else { None } {
                Some(seen) => text += &span(seen),
                None => text += part,
            }
        }
        (text, g.kind, g.count)
    };
    groups.into_iter().map(render).collect()
}

/// `3`, `{0..18}`, or `{0,2}` where numbers are left out.
fn span(numbers: &BTreeSet<u32>) -> String {
    match (numbers.first(), numbers.last()) {
        (Some(first), Some(last)) if first == last => first.to_string(),
        (Some(first), Some(last)) if (last - first) as usize + 1 == numbers.len() => format!("{{{first}..{last}}}"),
        _ => format!("{{{}}}", numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(",")),
    }
}

/// A key cut at its separators, with `#` for the parts that are numbers.
fn numbered(key: &str) -> (Vec<&str>, Vec<u32>) {
    let mut numbers = Vec::new();
    let parts = key.split_inclusive(['.', '_']).flat_map(|part| {
        let (word, separator) = part.split_at(part.trim_end_matches(['.', '_']).len());
        [word, separator]
    });
    let parts = parts
        .map(|part| match part.parse::<u32>() {
            Ok(n) => {
                numbers.push(n);
                "#"
            }
            Err(_) => part,
        })
        .collect();
    (parts, numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_all_blocks_are_one_line() {
        let tensor = |key: &str| (key.to_owned(), "BF16", vec![1, 2]);
        let keys = ["b.0.net.2.lora_A.weight", "b.1.net.2.lora_A.weight", "lora_unet_x_7_y.alpha", "c.weight"];
        let lines = grouped(&keys.map(tensor));
        let texts: Vec<(&str, usize)> = lines.iter().map(|(text, _, n)| (text.as_str(), *n)).collect();
        assert_eq!(texts, [("b.{0..1}.net.2.lora_A.weight", 2), ("lora_unet_x_7_y.alpha", 1), ("c.weight", 1)]);
    }
}
