//! Scales as nested as the model: `{"transformer_blocks": {"0": 0.5}, "single_transformer_blocks": [1, 0.8, ...]}`.
//!
//! The form is that of diffusers' `set_adapters`, for the modules of every family: a name leads to what is below it, a
//! list has one entry for each numbered block, and what is not named stays as it is. Names and lengths are checked
//! against the family's table. diffusers' own words for the blocks of a U-Net are in the tables (`layout`).

use std::collections::BTreeMap;

use serde_json::Value;

use super::Selector;
use super::layout::{Tables, Word};
use super::weights::{by_value, ranges};
use crate::error::{Code, Error, Result};
use crate::table::{Component, Family};

/// Most names that a hint lists.
const LISTED: usize = 12;

/// A factor, or factors for what is below.
#[derive(Debug, Clone, PartialEq)]
pub enum Scale {
    /// For everything here.
    Number(f64),
    /// For the numbered blocks here, in their order.
    List(Vec<Scale>),
    /// For what is named; the rest stays as it is.
    Parts(Vec<(String, Scale)>),
}

/// The modules of a component as a tree of names.
#[derive(Debug, Default)]
struct Tree(BTreeMap<String, Tree>);

/// Factors found so far, for one component.
struct Walk<'a> {
    component: &'a Component,
    root: &'a Tree,
    out: &'a mut Vec<(Selector, f64)>,
}

impl Scale {
    /// Reads a number, a list or an object; `name` is what messages call it.
    pub fn from_json(name: &str, json: &Value) -> Result<Self> {
        match json {
            Value::Array(items) => {
                let item = |(at, item): (usize, &Value)| Self::from_json(&format!("{name}[{at}]"), item);
                items.iter().enumerate().map(item).collect::<Result<_>>().map(Self::List)
            }
            Value::Object(parts) => {
                let part = |(key, value): (&String, &Value)| {
                    Ok((key.clone(), Self::from_json(&format!("{name}.{key}"), value)?))
                };
                parts.iter().map(part).collect::<Result<_>>().map(Self::Parts)
            }
            other => match other.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(Self::Number(number)),
                None => Err(bad(format!("the scale of `{name}` is {other}"), "write a number, a list or a mapping")),
            },
        }
    }

    /// The scales of a component as factors of selectors.
    pub(super) fn selectors(&self, family: &Family, component: &str) -> Result<Vec<(Selector, f64)>> {
        let number = family.component(component).ok_or_else(|| {
            let known: Vec<&str> = family.components.iter().map(|c| c.name.as_str()).collect();
            bad(format!("{} has no component `{component}`", family.title), format!("components: {}", known.join(", ")))
        })?;
        let component = &family.components[number];
        let root = Tree::of(component);
        let mut out = Vec::new();
        Walk { component, root: &root, out: &mut out }.node(&root, &mut Vec::new(), self)?;
        Ok(out)
    }
}

fn bad(message: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::new(Code::InvalidArgument, message).hint(hint)
}

impl Tree {
    fn of(component: &Component) -> Self {
        let mut root = Self::default();
        for path in component.paths() {
            path.split('.').fold(&mut root, |node, segment| node.0.entry(segment.to_owned()).or_default());
        }
        root
    }

    fn at(&self, path: &str) -> Option<&Self> {
        path.split('.').try_fold(self, |node, segment| node.0.get(segment))
    }

    /// How many children it has, if they are numbered from 0.
    fn numbered(&self) -> Option<usize> {
        let count = self.0.len();
        (count > 0 && (0..count).all(|n| self.0.contains_key(&n.to_string()))).then_some(count)
    }
}

impl Walk<'_> {
    fn node(&mut self, node: &Tree, path: &mut Vec<String>, scale: &Scale) -> Result<()> {
        match scale {
            Scale::Number(number) => self.add(&path.join("."), *number),
            Scale::List(items) => self.list(node, path, items),
            Scale::Parts(parts) => {
                for (name, scale) in parts {
                    let word = Tables::get().words.get(name).filter(|word| path.is_empty() && word.is_in(self.root));
                    match (word, node.at(name)) {
                        (Some(word), _) => self.word(name, word, scale)?,
                        (None, Some(child)) => {
                            path.push(name.clone());
                            self.node(child, path, scale)?;
                            path.pop();
                        }
                        (None, None) => return Err(self.unknown(path, name, node)),
                    }
                }
                Ok(())
            }
        }
    }

    fn list(&mut self, node: &Tree, path: &mut Vec<String>, items: &[Scale]) -> Result<()> {
        let count = node.numbered().ok_or_else(|| {
            let hint = format!("it has {}", listed(node.0.keys().map(String::as_str)));
            bad(
                format!("`{}` has no blocks numbered from 0 that a list of scales could be for", self.shown(path)),
                hint,
            )
        })?;
        self.same_length(&self.shown(path), items.len(), count)?;
        if let Some(numbers) = plain(items) {
            return self.numbers(&path.join("."), &numbers);
        }
        for (number, item) in items.iter().enumerate() {
            let name = number.to_string();
            let child = &node.0[&name];
            path.push(name);
            self.node(child, path, item)?;
            path.pop();
        }
        Ok(())
    }

    /// One of diffusers' words: a scale for all of its blocks, or scales by block.
    fn word(&mut self, name: &str, word: &Word, scale: &Scale) -> Result<()> {
        let blocks = word.blocks(self.root);
        let (Scale::Parts(parts), Some(pattern)) = (scale, &word.block) else {
            return blocks.iter().try_for_each(|block| self.block(name, word, *block, scale));
        };
        for (key, scale) in parts {
            let named = |block: &&usize| pattern.replace('#', &block.to_string()) == *key;
            let block = blocks.iter().find(named).ok_or_else(|| {
                let known: Vec<String> = blocks.iter().map(|n| pattern.replace('#', &n.to_string())).collect();
                let message = format!("`{}` of {} has no `{key}` with attention", name, self.component.name);
                bad(message, format!("it has {}", listed(known.iter().map(String::as_str))))
            })?;
            self.block(&format!("{name}.{key}"), word, *block, scale)?;
        }
        Ok(())
    }

    fn block(&mut self, name: &str, word: &Word, block: usize, scale: &Scale) -> Result<()> {
        let at = |text: &str| text.replace('#', &block.to_string());
        let count = self.root.at(&at(&word.counted)).map_or(0, |node| node.0.len());
        let numbers = match scale {
            Scale::Number(number) => Some(vec![*number; count]),
            Scale::List(items) => {
                self.same_length(name, items.len(), count)?;
                plain(items)
            }
            Scale::Parts(_) => None,
        };
        let numbers = numbers.ok_or_else(|| {
            bad(
                format!("the scale of `{name}` is neither a number nor a list of numbers"),
                format!("write {count} numbers"),
            )
        })?;
        self.numbers(&at(&word.reach), &numbers)
    }

    /// One number for each numbered child of a path.
    fn numbers(&mut self, path: &str, numbers: &[f64]) -> Result<()> {
        let dot = if path.is_empty() { "" } else { "." };
        by_value(numbers).iter().try_for_each(|(at, number)| self.add(&format!("{path}{dot}{}", ranges(at)), *number))
    }

    fn add(&mut self, path: &str, number: f64) -> Result<()> {
        let selector = Selector::of_table(&format!("{}:{path}", self.component.name))?;
        self.out.push((selector, number));
        Ok(())
    }

    fn same_length(&self, name: &str, given: usize, wanted: usize) -> Result<()> {
        if given == wanted {
            return Ok(());
        }
        let message = format!("`{name}` takes {wanted} scales, one for each of its blocks, and {given} are given");
        Err(bad(message, "give one number for all of them, or name the blocks in a mapping"))
    }

    fn shown(&self, path: &[String]) -> String {
        std::iter::once(&self.component.name).chain(path).map(String::as_str).collect::<Vec<_>>().join(".")
    }

    fn unknown(&self, path: &[String], name: &str, node: &Tree) -> Error {
        let words = Tables::get().words.iter().filter(|(_, word)| path.is_empty() && word.is_in(self.root));
        let known = words.map(|(name, _)| name.as_str()).chain(node.0.keys().map(String::as_str));
        bad(format!("`{}` has no `{name}`", self.shown(path)), format!("it has {}", listed(known)))
    }
}

impl Word {
    /// The numbers of its blocks in a component.
    fn blocks(&self, root: &Tree) -> Vec<usize> {
        match self.counted.split_once(".#") {
            None => root.at(&self.counted).map_or_else(Vec::new, |_| vec![0]),
            Some((list, _)) => {
                let numbers = root.at(list).into_iter().flat_map(|node| node.0.keys()).filter_map(|n| n.parse().ok());
                let mut numbers: Vec<usize> = numbers.collect();
                numbers.sort_unstable();
                numbers.retain(|n| root.at(&self.counted.replace('#', &n.to_string())).is_some());
                numbers
            }
        }
    }

    fn is_in(&self, root: &Tree) -> bool {
        !self.blocks(root).is_empty()
    }
}

/// The numbers of a list that holds nothing else.
fn plain(items: &[Scale]) -> Option<Vec<f64>> {
    let number = |item: &Scale| match item {
        Scale::Number(number) => Some(*number),
        _ => None,
    };
    items.iter().map(number).collect()
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let more = if names.len() > LISTED { ", ..." } else { "" };
    match names.is_empty() {
        true => "nothing below".to_owned(),
        false => format!("{}{more}", names[..names.len().min(LISTED)].join(", ")),
    }
}
