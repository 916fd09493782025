//! What block weights mean, from `data/block-weights.toml`: models, the slots of their vectors, presets, and
//! diffusers' words for blocks.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Deserialize;

use super::Selector;
use crate::error::{Code, Error, Result};
use crate::table::Family;

const TEXT: &str = include_str!("../../data/block-weights.toml");

/// The slot of everything that no other slot of a layout is for.
const BASE: &str = "BASE";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    title: String,
    fits: Vec<String>,
    lacks: Vec<String>,
    slots: BTreeMap<String, Vec<String>>,
    layouts: Vec<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTables {
    model: Vec<RawModel>,
    preset: BTreeMap<String, Preset>,
    word: BTreeMap<String, Word>,
}

/// A named vector.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Preset {
    /// One number for every place of every family.
    pub(super) all: Option<f64>,
    /// Vectors, each for the layout of its length.
    #[serde(default)]
    pub(super) vectors: Vec<Vec<f64>>,
}

/// One of diffusers' words for blocks. Where `block` is given there are several, and `#` stands for their numbers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Word {
    /// The name of one block.
    pub(super) block: Option<String>,
    /// What tells that there is a block; its children are what numbers are for.
    pub(super) counted: String,
    /// Before the number of a child: what a number is for.
    pub(super) reach: String,
}

/// A model with the layouts of its vectors.
#[derive(Debug)]
pub(super) struct Model {
    fits: Vec<Selector>,
    lacks: Vec<Selector>,
    /// In the order of the file; of equal length there is one.
    pub(super) layouts: Vec<Layout>,
}

/// The meaning of a vector: runs of slots in their order.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) runs: Vec<Run>,
}

/// One slot, or several whose places differ in a number: `D00-D18`.
#[derive(Debug, Clone)]
pub(super) struct Run {
    /// As the table writes it.
    pub(super) name: String,
    /// How many slots.
    pub(super) count: usize,
    /// Selectors, with `#` for the number of the slot within the run.
    pub(super) places: Vec<String>,
}

/// All tables of block weights.
#[derive(Debug)]
pub(super) struct Tables {
    models: Vec<Model>,
    presets: BTreeMap<String, Preset>,
    pub(super) words: BTreeMap<String, Word>,
}

impl Layout {
    /// Numbers that a vector of this layout has.
    pub(super) fn len(&self) -> usize {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// Its length and its slots, for people.
    pub(super) fn described(&self) -> String {
        let names: Vec<&str> = self.runs.iter().map(|run| run.name.as_str()).collect();
        format!("{} ({})", self.len(), names.join(", "))
    }
}

impl Run {
    /// Whether it is for everything that no other slot is for.
    pub(super) fn is_base(&self) -> bool {
        self.name == BASE
    }

    /// The slots of a name of the table: `IN04-IN05` is two, `M00` is one.
    fn read(name: &str, places: &[String]) -> Result<Self, String> {
        let number = |end: &str| end.trim_start_matches(|c: char| c.is_ascii_alphabetic()).parse::<usize>();
        let count = match name.split_once('-') {
            None => 1,
            Some((first, last)) => match (number(first), number(last)) {
                (Ok(first), Ok(last)) if first < last => last - first + 1,
                _ => return Err(format!("`{name}` is no run of slots")),
            },
        };
        if let Some(place) = places.iter().find(|place| place.contains('#') != (count > 1)) {
            return Err(format!("`{place}` of the {count} slots `{name}`: `#` stands in the places of several slots"));
        }
        for place in places {
            Selector::parse(&place.replace('#', "0")).map_err(|e| e.message().to_owned())?;
        }
        Ok(Self { name: name.to_owned(), count, places: places.to_vec() })
    }
}

impl Model {
    fn read(raw: RawModel) -> Result<Self, String> {
        let selectors = |texts: &[String]| {
            let each = texts.iter().map(|text| Selector::parse(text).map_err(|e| e.message().to_owned()));
            each.collect::<Result<Vec<_>, String>>()
        };
        let layout = |names: &Vec<String>| {
            let run = |name: &String| {
                let places = raw.slots.get(name).ok_or_else(|| format!("`{}` has no slot `{name}`", raw.title))?;
                Run::read(name, places)
            };
            names.iter().map(run).collect::<Result<_, _>>().map(|runs| Layout { runs })
        };
        let layouts = raw.layouts.iter().map(layout).collect::<Result<_, _>>()?;
        Ok(Self { fits: selectors(&raw.fits)?, lacks: selectors(&raw.lacks)?, layouts })
    }

    fn is(&self, family: &Family) -> bool {
        let has = |selector: &Selector| {
            family.components.iter().enumerate().any(|(number, component)| {
                component.paths().any(|path| selector.matches(&component.name, number == 0, &path))
            })
        };
        self.fits.iter().all(has) && !self.lacks.iter().any(has)
    }
}

impl Tables {
    /// The built-in tables, compiled once.
    pub(super) fn get() -> &'static Tables {
        static TABLES: OnceLock<Tables> = OnceLock::new();
        TABLES.get_or_init(|| Self::read(TEXT).expect("the built-in tables are valid: a test reads them"))
    }

    fn read(text: &str) -> Result<Self, String> {
        let raw: RawTables = toml::from_str(text).map_err(|e| e.to_string())?;
        let models = raw.model.into_iter().map(Model::read).collect::<Result<_, _>>()?;
        Ok(Self { models, presets: raw.preset, words: raw.word })
    }

    /// The layouts of a family; empty where none is known.
    pub(super) fn layouts(&self, family: &Family) -> &[Layout] {
        self.models.iter().find(|model| model.is(family)).map_or(&[], |model| &model.layouts)
    }

    /// The layout for a vector of that length.
    pub(super) fn layout(&self, family: &Family, length: usize) -> Result<&Layout> {
        let layouts = self.layouts(family);
        layouts.iter().find(|layout| layout.len() == length).ok_or_else(|| {
            let message = format!("{length} block weights are no vector for {}", family.title);
            let known: Vec<String> = layouts.iter().map(Layout::described).collect();
            let hint = match known.len() {
                0 => format!("no vectors are defined for {}; give factors by selectors", family.title),
                _ => format!("its vectors: {}", known.join("; ")),
            };
            Error::new(Code::InvalidArgument, message).hint(hint)
        })
    }

    /// A preset by its name, in capital letters or not.
    pub(super) fn preset(&self, name: &str, family: &Family) -> Result<&Preset> {
        let found = self.presets.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, preset)| preset).ok_or_else(|| {
            let message = format!("no preset of block weights is called `{name}`");
            Error::new(Code::InvalidArgument, message).hint(self.known(family))
        })
    }

    /// The presets and the vectors of a family, for hints.
    pub(super) fn known(&self, family: &Family) -> String {
        let lengths: Vec<usize> = self.layouts(family).iter().map(Layout::len).collect();
        let usable =
            |preset: &Preset| preset.all.is_some() || preset.vectors.iter().any(|v| lengths.contains(&v.len()));
        let names: Vec<&str> =
            self.presets.iter().filter(|(_, preset)| usable(preset)).map(|(name, _)| name.as_str()).collect();
        let vectors = match lengths.as_slice() {
            [] => String::new(),
            some => {
                format!("; vectors of {} numbers", some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
            }
        };
        format!("for {}: {}{vectors}", family.title, names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::table::Registry;

    #[test]
    fn the_tables_are_sound() {
        let tables = Tables::read(TEXT).expect("valid");
        for model in &tables.models {
            let lengths: Vec<usize> = model.layouts.iter().map(Layout::len).collect();
            assert_eq!(lengths.iter().collect::<BTreeSet<_>>().len(), lengths.len());
        }
        // A length means one thing for a family, and a preset has one vector of a length.
        let known: BTreeSet<usize> = tables.models.iter().flat_map(|m| &m.layouts).map(Layout::len).collect();
        assert_eq!(known.into_iter().collect::<Vec<_>>(), [12, 17, 20, 26, 57, 58, 61]);
        for (name, preset) in &tables.presets {
            assert_eq!(preset.all.is_some(), preset.vectors.is_empty(), "{name}");
            let lengths: BTreeSet<usize> = preset.vectors.iter().map(Vec::len).collect();
            assert_eq!(lengths.len(), preset.vectors.len(), "{name}");
            let used = |length: &usize| tables.models.iter().flat_map(|m| &m.layouts).any(|l| l.len() == *length);
            assert!(lengths.iter().all(used), "{name}");
            assert!(name.to_uppercase() == *name, "{name}");
        }
    }

    #[test]
    fn at_most_one_model_is_a_family() {
        let tables = Tables::get();
        for family in &Registry::builtin().families {
            assert!(tables.models.iter().filter(|model| model.is(family)).count() <= 1, "{}", family.name);
        }
    }

    #[test]
    fn wrong_tables_are_errors() {
        let read = |from: &str, to: &str| {
            let text = TEXT.replacen(from, to, 1);
            assert_ne!(text, TEXT, "{from}");
            Tables::read(&text).expect_err(to)
        };
        assert!(read("\"D00-D18\", \"S00", "\"D00-D99\", \"S00").contains("no slot `D00-D99`"));
        assert!(read("[\"transformer_blocks.#\"]", "[\"transformer_blocks.1\"]").contains("`#` stands"));
        assert!(read("CLIP = [\"text_encoder:\"]", "CLIP = [\"a..b\"]").contains("a segment is empty"));
        assert!(read("title = \"FLUX.1\"", "titel = \"x\"").contains("titel"));
        assert!(Run::read("D9-D3", &[]).is_err() && Run::read("D-S", &[]).is_err());
    }
}
