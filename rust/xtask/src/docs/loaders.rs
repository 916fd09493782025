//! Who loads what: a page of all programs, and the part of it that is about one family.

use lorafmt_core::kind::{Kind, Slot};
use lorafmt_core::table::{Answer, Dialect, Program, Registry, Rule};

use super::formats::holds;
use super::places::{families, link};
use crate::markdown::{GENERATED, codes, table};

/// Kinds of a whole adapter that a rule can be about, as `inspect` tells them.
const ALL: [&str; 9] = ["lora", "dora", "loha", "lokr", "full", "norm", "oft", "glora", "ia3"];

/// Those that a dialect has names for.
fn held(dialect: &Dialect) -> Vec<&'static str> {
    let dora = [Slot::Magnitude, Slot::MagnitudeIn].iter().any(|s| dialect.spelling.contains_key(s));
    let kinds: Vec<Kind> = Slot::ALL.iter().filter_map(|s| s.kind()).filter(|&kind| holds(dialect, kind)).collect();
    let named = |name: &&str| kinds.iter().any(|kind| kind.name() == *name) || dora && *name == "dora";
    ALL.into_iter().filter(named).collect()
}

fn word(answer: Answer) -> &'static str {
    match answer {
        Answer::Yes => "yes",
        Answer::Part => "in part",
        Answer::No => "no",
    }
}

pub(super) fn page(registry: &Registry) -> String {
    let mut out = format!(
        "{GENERATED}# Who loads what\n\n\
         What programs make of a file as it is, by dialect, family and kind. `inspect` looks here, and where another form\n\
         is better it says which command makes it. The first table of a program is about plain LoRA; the rules below it have\n\
         everything, with the source of every claim (\"measured\" is: run). The first rule that fits decides; what no rule\n\
         fits is not known, and shown as a dot. Some rules are only about files that have one of some texts in a key,\n\
         or none of them in any; where there are such rules, the table has a star at what is true of usual files.\n"
    );
    for program in registry.programs() {
        let version =
            if program.version.is_empty() { String::new() } else { format!("Version: {}.\n\n", program.version) };
        out += &format!("\n## {}\n\n{version}{}\n{}", program.name, matrix(registry, program), rules(program));
    }
    out
}

fn same(one: &Rule, other: &Rule) -> bool {
    std::ptr::eq(one, other)
}

/// Whether a rule is about some keys.
fn special(rule: &Rule) -> bool {
    rule.keys.is_some() || rule.without.is_some()
}

/// The texts in keys of a file that a rule is about, and that is otherwise as usual in its dialect: it has what other
/// rules miss first of all, and nothing that they note.
fn usual<'a>(program: &'a Program, dialect: &'a str, rule: Option<&'a Rule>) -> impl Fn(&str) -> bool + 'a {
    let listed = |texts: &Option<Vec<String>>, text: &str| texts.iter().flatten().any(|t| t == text);
    move |text| {
        let own = |of: fn(&Rule) -> &Option<Vec<String>>| rule.is_some_and(|r| listed(of(r), text));
        let about = |r: &&Rule| r.dialects.is_none() || listed(&r.dialects, dialect);
        let missed = || program.rules.iter().filter(about).any(|r| r.without.iter().any(|w| w[0] == text));
        own(|r| &r.keys) || missed() && !own(|r| &r.without)
    }
}

/// The keys that a rule is about.
fn about(rule: &Rule) -> String {
    let parts = [("with ", &rule.keys), ("without ", &rule.without)];
    let parts = parts.iter().filter_map(|(word, texts)| texts.as_ref().map(|t| format!("{word}{}", codes(t))));
    let parts: Vec<String> = parts.collect();
    if parts.is_empty() { "any".to_owned() } else { parts.join("; ") }
}

/// Families down, dialects across, for plain LoRA.
fn matrix(registry: &Registry, program: &Program) -> String {
    let answer = |f: usize, d: &Dialect| {
        let name = &registry.families[f].name;
        let rule = d.reads(f).then(|| program.rule(&d.name, name, "lora", usual(program, &d.name, None))).flatten();
        let decides = |r: &Rule| {
            program.rule(&d.name, name, "lora", usual(program, &d.name, Some(r))).is_some_and(|s| same(r, s))
        };
        let star = if program.rules.iter().filter(|r| special(r)).any(decides) { "*" } else { "" };
        rule.map(|r| format!("{}{star}", word(r.answer)))
    };
    let families = families(registry);
    let told = |d: &&Dialect| families.iter().any(|&f| answer(f, d).is_some());
    let dialects: Vec<&Dialect> = registry.dialects.iter().filter(told).collect();
    let mut head = vec!["family".to_owned()];
    head.extend(dialects.iter().map(|d| link("", d)));
    let row = |&f: &usize| {
        let name = &registry.families[f].name;
        let cells =
            dialects.iter().map(|d| if d.reads(f) { answer(f, d).unwrap_or(".".to_owned()) } else { String::new() });
        std::iter::once(format!("[`{name}`](families/{name}.md)")).chain(cells).collect::<Vec<String>>()
    };
    let known = |&&f: &&usize| dialects.iter().any(|d| answer(f, d).is_some());
    table(&head, &families.iter().filter(known).map(row).collect::<Vec<_>>())
}

/// All rules of a program, in their order.
fn rules(program: &Program) -> String {
    let any = |list: &Option<Vec<String>>| list.as_ref().map_or("any".to_owned(), codes);
    let row = |r: &Rule| {
        vec![
            word(r.answer).to_owned(),
            any(&r.dialects),
            any(&r.families),
            any(&r.kinds),
            about(r),
            r.note.clone(),
            r.source.clone(),
        ]
    };
    table(
        &["loads", "dialects", "families", "kinds", "keys", "what happens", "source"],
        &program.rules.iter().map(row).collect::<Vec<_>>(),
    )
}

/// What programs make of a family: one line for each rule that some dialect and kind of it meets.
pub(super) fn of_family(registry: &Registry, family: usize) -> String {
    let name = &registry.families[family].name;
    let mut rows = Vec::new();
    for program in registry.programs() {
        for rule in &program.rules {
            let met = met(registry, program, rule, family);
            for (kinds, dialects) in met {
                rows.push(vec![
                    program.name.clone(),
                    codes(dialects),
                    if kinds.is_empty() { "any".to_owned() } else { kinds.join(", ") },
                    about(rule),
                    word(rule.answer).to_owned(),
                    rule.note.clone(),
                    rule.source.clone(),
                ]);
            }
        }
    }
    if rows.is_empty() {
        return format!("Of no program is it known what it makes of adapters of `{name}`.\n");
    }
    let text = "What no line is about is not known.\n\n";
    text.to_owned() + &table(&["program", "dialects", "kinds", "keys", "loads it", "what happens", "source"], &rows)
}

/// The dialects of a family for which the rule decides, by the kinds for which it does; no kinds are all of them.
fn met<'r>(
    registry: &'r Registry,
    program: &Program,
    rule: &Rule,
    family: usize,
) -> Vec<(Vec<&'static str>, Vec<&'r str>)> {
    let name = &registry.families[family].name;
    let mut out: Vec<(Vec<&'static str>, Vec<&'r str>)> = Vec::new();
    for dialect in registry.dialects.iter().filter(|d| d.reads(family)) {
        let rule_for = |kind: &str| program.rule(&dialect.name, name, kind, usual(program, &dialect.name, Some(rule)));
        let decides = |kind: &&str| rule_for(kind).is_some_and(|r| same(r, rule));
        let mut decided: Vec<&str> = ALL.into_iter().filter(decides).collect();
        if !held(dialect).iter().any(|kind| decided.contains(kind)) {
            continue;
        }
        if decided.len() == ALL.len() {
            decided.clear();
        }
        match out.iter_mut().find(|(kinds, _)| *kinds == decided) {
            Some((_, dialects)) => dialects.push(&dialect.name),
            None => out.push((decided, vec![&dialect.name])),
        }
    }
    out
}
