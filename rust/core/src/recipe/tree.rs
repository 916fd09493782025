//! YAML, TOML and JSON as one kind of tree.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_saphyr::{DuplicateKeyPolicy, Location, MessageFormatter, Spanned, UserMessageFormatter, budget};
use toml::de::{DeString, DeTable, DeValue};

use super::{Fault, Format, Found, LONGEST};

/// A value, and the byte at which it stands.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) at: usize,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    /// In the order of the file; a key can stand twice.
    Map(Vec<Entry>),
}

/// A key, the byte at which it stands, and its value.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) at: usize,
    pub(super) key: String,
    pub(super) node: Node,
}

/// Reads a text. Without a format every one is tried, and the one that understood most tells what is wrong.
pub(super) fn read(text: &str, format: Option<Format>) -> Found<Node> {
    let mut furthest = Fault::new(0, "");
    for format in format.as_ref().map_or(&Format::ALL[..], std::slice::from_ref) {
        let read = match format {
            Format::Json => json(text),
            Format::Toml => toml(text),
            Format::Yaml => yaml(text),
        };
        let fault = match read {
            Ok(node @ Node { value: Value::List(_) | Value::Map(_), .. }) => return Ok(node),
            Ok(Node { value: Value::Null, .. }) => Fault::new(0, "the file is empty"),
            // Most words are valid YAML.
            Ok(node) => Fault::new(node.at, "a recipe is a mapping or a list of LoRAs"),
            Err(fault) => Fault { message: format!("not valid {}: {}", format.name(), fault.message), ..fault },
        };
        if fault.at >= furthest.at {
            furthest = fault;
        }
    }
    Err(furthest)
}

/// The byte at which a line of the text begins; lines count from 1.
fn line_start(text: &str, line: usize) -> usize {
    text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum()
}

/// A message of a parser that ends with the place; the place is said in front.
fn without_place(message: &str) -> &str {
    message.split(" at line ").next().unwrap_or(message)
}

fn json(text: &str) -> Found<Node> {
    // serde_json's columns count bytes, and are 0 at the end of a line.
    let fault = |e: serde_json::Error| {
        let at = line_start(text, e.line()) + e.column().saturating_sub(1);
        Fault::new(at, without_place(&e.to_string()))
    };
    // Says what is wrong and limits the depth; what is raw below is known to be sound.
    serde_json::from_str::<serde_json::Value>(text).map_err(fault)?;
    json_node(text, text.trim())
}

/// `raw` is a part of `text`, which tells where it stands.
fn json_node(text: &str, raw: &str) -> Found<Node> {
    let at = raw.as_ptr() as usize - text.as_ptr() as usize;
    let fault = |e: serde_json::Error| Fault::new(at, e.to_string());
    let value = match raw.bytes().next() {
        Some(b'{') => {
            let Pairs(pairs) = serde_json::from_str(raw).map_err(fault)?;
            let entry = |(key, value): (&RawValue, &RawValue)| match json_node(text, key.get())? {
                Node { at, value: Value::Text(key) } => Ok(Entry { at, key, node: json_node(text, value.get())? }),
                Node { at, .. } => Err(Fault::new(at, "a key must be text")),
            };
            Value::Map(pairs.into_iter().map(entry).collect::<Found<_>>()?)
        }
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(raw).map_err(fault)?;
            Value::List(items.into_iter().map(|item| json_node(text, item.get())).collect::<Found<_>>()?)
        }
        Some(b'"') => Value::Text(serde_json::from_str(raw).map_err(fault)?),
        Some(b't' | b'f') => Value::Bool(serde_json::from_str(raw).map_err(fault)?),
        Some(b'n') => Value::Null,
        _ => Value::Number(serde_json::from_str(raw).map_err(fault)?),
    };
    Ok(Node { at, value })
}

/// The pairs of an object, in order and with repeated keys.
struct Pairs<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Pairs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

fn toml(text: &str) -> Found<Node> {
    let root = DeTable::parse(text).map_err(|e| Fault::new(e.span().map_or(0, |span| span.start), e.message()))?;
    Ok(Node { at: 0, value: toml_table(root.into_inner()) })
}

fn toml_node(at: usize, value: DeValue<'_>) -> Node {
    let value = match value {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Number(number as f64),
            Err(_) => Value::Text(number.as_str().to_owned()),
        },
        DeValue::Float(number) => match number.as_str().parse() {
            Ok(number) => Value::Number(number),
            Err(_) => Value::Text(number.as_str().to_owned()),
        },
        DeValue::Boolean(value) => Value::Bool(value),
        DeValue::Datetime(date) => Value::Text(date.to_string()),
        DeValue::Array(items) => {
            let item = |item: toml::Spanned<DeValue<'_>>| toml_node(item.span().start, item.into_inner());
            Value::List(items.into_iter().map(item).collect())
        }
        DeValue::Table(table) => toml_table(table),
    };
    Node { at, value }
}

fn toml_table(table: DeTable<'_>) -> Value {
    let entry = |(key, value): (toml::Spanned<DeString<'_>>, toml::Spanned<DeValue<'_>>)| Entry {
        at: key.span().start,
        key: key.into_inner().into_owned(),
        node: toml_node(value.span().start, value.into_inner()),
    };
    let mut entries: Vec<Entry> = table.into_iter().map(entry).collect();
    // A table forgets the order of its keys.
    entries.sort_by_key(|entry| entry.at);
    Value::Map(entries)
}

fn yaml(text: &str) -> Found<Node> {
    // Columns count characters.
    let at = |line: usize, column: usize| {
        let start = line_start(text, line);
        start + text[start..].chars().take(column.saturating_sub(1)).map(char::len_utf8).sum::<usize>()
    };
    let place = |location: Location| {
        let number = |n: u64| usize::try_from(n).unwrap_or(0);
        location.span().byte_offset().map_or_else(|| at(number(location.line()), number(location.column())), number)
    };
    // A recipe is a page; what its aliases repeat counts again.
    let budget = serde_saphyr::budget! {
        max_depth: 64, max_nodes: 100_000, max_aliases: 1_000, max_total_scalar_bytes: 16 * LONGEST,
    };
    let options = serde_saphyr::options! {
        budget: budget.clone(),
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 10_000 },
        // Repeated keys are found later, and only where they mean something.
        duplicate_keys: DuplicateKeyPolicy::LastWins,
        strict_booleans: true,
        reject_non_finite_typeless_float: false,
        with_snippet: false,
    };
    let read: Spanned<Yaml> = serde_saphyr::from_str_with_options(text, options)
        .map_err(|e| Fault::new(e.location().map_or(0, place), yaml_reason(&e)))?;
    // The reader above overlooks what is malformed behind the end of the first document.
    budget::parse_yaml(text, budget.unwrap_or_default())
        .map_err(|e| Fault::new(at(e.marker().line(), e.marker().col() + 1), e.info()))?;
    Ok(yaml_node(read, &place))
}

fn yaml_reason(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::Error as E;
    match error {
        E::UnknownAnchor { .. } => {
            "no value has the name behind the `*`; a text that begins so stands in quotes".into()
        }
        E::Budget { .. } => "it is nested too deep, or too large".into(),
        // Raised inside of an alias, it comes with its text only.
        E::AliasReplayLimitExceeded { .. } | E::AliasError { .. } => "its aliases repeat too much".into(),
        _ => without_place(&UserMessageFormatter.format_message(error)).to_owned(),
    }
}

fn yaml_node(node: Spanned<Yaml>, place: &impl Fn(Location) -> usize) -> Node {
    let value = match node.value {
        Yaml::Leaf(value) => value,
        Yaml::List(items) => Value::List(items.into_iter().map(|item| yaml_node(item, place)).collect()),
        Yaml::Map(pairs) => {
            let entry = |(key, value): (Spanned<String>, Spanned<Yaml>)| Entry {
                at: place(key.referenced),
                key: key.value,
                node: yaml_node(value, place),
            };
            Value::Map(pairs.into_iter().map(entry).collect())
        }
    };
    Node { at: place(node.referenced), value }
}

enum Yaml {
    Leaf(Value),
    List(Vec<Spanned<Yaml>>),
    Map(Vec<(Spanned<String>, Spanned<Yaml>)>),
}

impl<'de> Deserialize<'de> for Yaml {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(YamlVisitor)
    }
}

struct YamlVisitor;

macro_rules! leaves {
    ($($visit:ident $type:ty => $leaf:expr;)*) => {
        $(fn $visit<E>(self, value: $type) -> Result<Yaml, E> { Ok(Yaml::Leaf($leaf(value))) })*
    };
}

impl<'de> Visitor<'de> for YamlVisitor {
    type Value = Yaml;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    leaves! {
        visit_bool bool => Value::Bool;
        visit_i64 i64 => |n| Value::Number(n as f64);
        visit_u64 u64 => |n| Value::Number(n as f64);
        visit_i128 i128 => |n| Value::Number(n as f64);
        visit_u128 u128 => |n| Value::Number(n as f64);
        visit_f64 f64 => Value::Number;
        // How the reader spells what is no finite number, whatever stands in the file.
        visit_str &str => |text| match text {
            ".nan" => Value::Number(f64::NAN),
            ".inf" => Value::Number(f64::INFINITY),
            "-.inf" => Value::Number(f64::NEG_INFINITY),
            _ => Value::Text(text.to_owned()),
        };
    }

    fn visit_unit<E>(self) -> Result<Yaml, E> {
        Ok(Yaml::Leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Yaml, E> {
        Ok(Yaml::Leaf(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Yaml, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Yaml, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Yaml::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Yaml, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Yaml::Map(pairs))
    }
}
