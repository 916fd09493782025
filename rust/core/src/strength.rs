//! How strongly an adapter counts, and where.

mod layout;
mod request;
mod scales;
mod selector;
mod weights;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

pub use request::Request;
pub use scales::Scale;
pub use selector::Selector;
pub use weights::Weights;

use crate::error::{Code, Error, Result};

/// The strength of one adapter in a composition.
#[derive(Debug, Clone, PartialEq)]
pub struct Strength {
    /// The factor on every delta.
    pub all: f64,
    /// Takes the place of `all` for every component but the main one (the text encoders).
    pub text_encoders: Option<f64>,
    /// Takes the place of `all` and of `text_encoders` for the component of that name.
    pub components: BTreeMap<String, f64>,
    /// Factors by place, multiplied with the above; of several selectors that match a module the last one counts.
    pub blocks: Vec<(Selector, f64)>,
}

impl Default for Strength {
    fn default() -> Self {
        Self::uniform(1.0)
    }
}

impl From<f64> for Strength {
    fn from(all: f64) -> Self {
        Self::uniform(all)
    }
}

impl Strength {
    /// The same strength everywhere.
    pub fn uniform(all: f64) -> Self {
        Self { all, text_encoders: None, components: BTreeMap::new(), blocks: Vec::new() }
    }

    /// The factor on one module; `main` says whether the component is the family's first.
    pub fn of(&self, component: &str, main: bool, path: &str) -> f64 {
        let general = self.text_encoders.filter(|_| !main).unwrap_or(self.all);
        let base = self.components.get(component).copied().unwrap_or(general);
        let last = self.blocks.iter().rev().find(|(selector, _)| selector.matches(component, main, path));
        base * last.map_or(1.0, |(_, factor)| *factor)
    }

    /// The strength, if it is the same in every place that an adapter can have.
    pub fn everywhere(&self) -> Option<f64> {
        let others = self.text_encoders.iter().chain(self.components.values());
        let even = others.into_iter().all(|other| *other == self.all);
        // Zero stays zero whatever it is multiplied with.
        let plain = self.all == 0.0 || self.blocks.iter().all(|(_, factor)| *factor == 1.0);
        (even && plain).then_some(self.all)
    }

    /// An error for the first number that is NaN or infinite; it names the number and where it stands.
    pub fn check(&self) -> Result<()> {
        let all = [("`strength`".to_owned(), self.all)].into_iter();
        let encoders = self.text_encoders.map(|number| ("the strength of the text encoders".to_owned(), number));
        let components = self.components.iter().map(|(name, number)| (format!("the strength of `{name}`"), *number));
        let blocks = self.blocks.iter().map(|(selector, number)| (format!("the factor of `{selector}`"), *number));
        match all.chain(encoders).chain(components).chain(blocks).find(|(_, number)| !number.is_finite()) {
            None => Ok(()),
            Some((place, number)) => {
                let message = format!("{place} is {number}, which is no finite number");
                Err(Error::new(Code::InvalidArgument, message).hint("write a number like 0.8 or -1"))
            }
        }
    }

    /// `factor` times as strong everywhere. The factors by place are relative, so they stay as they are.
    #[must_use]
    pub fn times(&self, factor: f64) -> Self {
        Self {
            all: self.all * factor,
            text_encoders: self.text_encoders.map(|number| number * factor),
            components: self.components.iter().map(|(name, number)| (name.clone(), number * factor)).collect(),
            blocks: self.blocks.clone(),
        }
    }

    /// The strength that [`Strength::to_json`] wrote: a number, or an object with the keys of a recipe.
    pub fn from_json(json: &Value) -> Result<Self> {
        let bad = |what: &str| {
            let hint =
                "a strength is a number, or numbers by place: strength, text_encoder_strength, components, blocks";
            Error::new(Code::InvalidArgument, what).hint(hint)
        };
        let number = |name: &str, v: &Value| v.as_f64().ok_or_else(|| bad(&format!("`{name}` of a strength is {v}")));
        let Value::Object(object) = json else { return number("strength", json).map(Self::uniform) };
        let mut out = Self::default();
        for (key, value) in object {
            let parts = || value.as_object().ok_or_else(|| bad(&format!("`{key}` of a strength is {value}")));
            match key.as_str() {
                "strength" => out.all = number(key, value)?,
                "text_encoder_strength" => out.text_encoders = Some(number(key, value)?),
                "components" => {
                    for (name, value) in parts()? {
                        out.components.insert(name.clone(), number(name, value)?);
                    }
                }
                "blocks" => {
                    for (name, value) in parts()? {
                        out.blocks.push((Selector::parse(name)?, number(name, value)?));
                    }
                }
                _ => return Err(bad(&format!("a strength has no `{key}`"))),
            }
        }
        Ok(out)
    }

    /// One number if it is the same everywhere, else the keys of a recipe.
    pub fn to_json(&self) -> Value {
        if let Some(number) = self.everywhere() {
            return number.into();
        }
        let mut json = Map::from_iter([("strength".to_owned(), self.all.into())]);
        json.extend(self.text_encoders.map(|number| ("text_encoder_strength".to_owned(), number.into())));
        let components: Map<_, _> = self.components.iter().map(|(k, number)| (k.clone(), (*number).into())).collect();
        let mut blocks = Map::new();
        for (selector, factor) in &self.blocks {
            let name = selector.to_string();
            // One that comes again counts where it stands last.
            blocks.shift_remove(&name);
            blocks.insert(name, (*factor).into());
        }
        let parts = [("components", components), ("blocks", blocks)].into_iter().filter(|(_, part)| !part.is_empty());
        json.extend(parts.map(|(key, part)| (key.to_owned(), part.into())));
        json.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(text: &str) -> Selector {
        Selector::parse(text).expect("valid")
    }

    fn mixed() -> Strength {
        Strength {
            all: 0.8,
            text_encoders: Some(0.5),
            components: BTreeMap::from([("text_encoder_2".to_owned(), 0.25)]),
            blocks: vec![(selector("blocks"), 2.0), (selector("blocks.0-3"), 0.5), (selector("blocks.2.x"), 4.0)],
        }
    }

    #[test]
    fn the_closest_name_wins() {
        let s = mixed();
        assert_eq!(s.of("transformer", true, "embed"), 0.8);
        assert_eq!(s.of("text_encoder", false, "layers.0"), 0.5);
        assert_eq!(s.of("text_encoder_2", false, "layers.0"), 0.25);
        let main = Strength { components: BTreeMap::from([("transformer".to_owned(), 3.0)]), ..s };
        assert_eq!(main.of("transformer", true, "embed"), 3.0);
    }

    #[test]
    fn the_last_selector_counts() {
        let s = mixed();
        assert_eq!(s.of("transformer", true, "blocks.9.x"), 0.8 * 2.0);
        assert_eq!(s.of("transformer", true, "blocks.3.x"), 0.8 * 0.5);
        assert_eq!(s.of("transformer", true, "blocks.2.x"), 0.8 * 4.0);
        assert_eq!(s.of("transformer", true, "blocks.2.y"), 0.8 * 0.5);
        // A selector without a component is about the main one.
        assert_eq!(s.of("text_encoder", false, "blocks.2.x"), 0.5);
    }

    #[test]
    fn everywhere_is_known_or_not_said() {
        assert_eq!(Strength::default().everywhere(), Some(1.0));
        assert_eq!(Strength::from(0.3).everywhere(), Some(0.3));
        assert_eq!(mixed().everywhere(), None);
        let same = Strength { text_encoders: Some(0.3), ..0.3.into() };
        assert_eq!(same.everywhere(), Some(0.3));
        let by_place = |all: f64, factor: f64| Strength { blocks: vec![(selector("a"), factor)], ..all.into() };
        assert_eq!(by_place(2.0, 1.0).everywhere(), Some(2.0));
        assert_eq!(by_place(2.0, 0.5).everywhere(), None);
        assert_eq!(by_place(0.0, 0.5).everywhere(), Some(0.0));
    }

    #[test]
    fn what_is_no_number_is_named() {
        assert!(mixed().check().is_ok());
        let cases = [
            (Strength::uniform(f64::NAN), "`strength` is NaN"),
            (Strength { text_encoders: Some(f64::INFINITY), ..mixed() }, "the text encoders is inf"),
            (Strength { components: BTreeMap::from([("vae".to_owned(), f64::NAN)]), ..mixed() }, "`vae` is NaN"),
            (Strength { blocks: vec![(selector("a.0-9"), f64::NEG_INFINITY)], ..mixed() }, "`a.0-9` is -inf"),
        ];
        for (strength, said) in cases {
            let error = strength.check().expect_err(said);
            assert_eq!(error.code(), Code::InvalidArgument);
            assert!(error.message().contains(said), "{error}");
        }
    }

    #[test]
    fn json_has_the_keys_of_a_recipe() {
        assert_eq!(Strength::uniform(0.5).to_json().to_string(), "0.5");
        let mut s = mixed();
        s.blocks.push((selector("blocks"), 1.0));
        let wanted = r#"{"strength":0.8,"text_encoder_strength":0.5,"components":{"text_encoder_2":0.25},"blocks":{"blocks.0-3":0.5,"blocks.2.x":4.0,"blocks":1.0}}"#;
        assert_eq!(s.to_json().to_string(), wanted);
        let text = format!(r#"[{{"path": "a", {}"#, &wanted[1..]) + "]";
        let read = crate::recipe::parse(&text, None).expect("a recipe").loras.remove(0).strength.plain;
        assert_eq!(read.to_json(), s.to_json());
        assert_eq!(read.of("transformer", true, "blocks.2.x"), s.of("transformer", true, "blocks.2.x"));
    }

    #[test]
    fn times_is_times_in_every_place() {
        let s = mixed();
        for (component, main, path) in [("transformer", true, "blocks.2.x"), ("text_encoder", false, "layers.1")] {
            assert_eq!(s.times(3.0).of(component, main, path), 3.0 * s.of(component, main, path));
        }
        assert_eq!(s.times(0.0).of("transformer", true, "blocks.1"), 0.0);
        assert_eq!(s.times(1.0), s);
    }
}
