//! Names of outputs.

use crate::error::{Code, Error, Result};

/// How an output is called, below the output folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Naming {
    template: String,
    ending: String,
}

const DEFAULT: &str = "{dir}/{stem}.{ending}.safetensors";
const PLACES: [&str; 3] = ["dir", "stem", "ending"];

impl Naming {
    /// A template with `{dir}` for the source's folder below what was named, `{stem}` for its name without the ending, and
    /// `{ending}` for what the step calls its outputs: the dialect, or the rank.
    pub fn new(template: Option<&str>, ending: &str) -> Result<Self> {
        let template = template.unwrap_or(DEFAULT);
        let wrong = |message: String| {
            Err(Error::new(Code::InvalidArgument, message).hint("such as `--name \"{dir}/{stem}.safetensors\"`"))
        };
        let mut rest = template;
        while let Some(at) = rest.find(['{', '}']) {
            let place = rest[at..].strip_prefix('{').and_then(|tail| tail.split_once('}'));
            let Some((_, tail)) = place.filter(|(name, _)| PLACES.contains(name)) else {
                return wrong(format!(
                    "the name `{template}` has something other than {{dir}}, {{stem}}, {{ending}} in braces"
                ));
            };
            rest = tail;
        }
        if !template.contains("{stem}") {
            return wrong(format!("the name `{template}` has no {{stem}}, so all outputs would be one file"));
        }
        Ok(Self { template: template.to_owned(), ending: ending.to_owned() })
    }

    /// The output's name relative to the output folder, with `/` between folders.
    pub fn of(&self, dir: &str, stem: &str) -> Result<String> {
        let mut name = String::new();
        let mut rest = self.template.as_str();
        while let Some((text, tail)) = rest.split_once('{') {
            name.push_str(text);
            let (place, tail) = tail.split_once('}').unwrap_or((tail, ""));
            name.push_str(match place {
                "dir" => dir,
                "stem" => stem,
                _ => &self.ending,
            });
            rest = tail;
        }
        name.push_str(rest);
        let parts: Vec<&str> = name.split(['/', '\\']).filter(|p| !p.is_empty() && *p != ".").collect();
        if parts.is_empty() || parts.contains(&"..") {
            let message = format!("the output would be called `{name}`, which is outside of the output folder");
            return Err(Error::new(Code::InvalidArgument, message).hint("name the source by another path"));
        }
        Ok(parts.join("/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let naming = Naming::new(None, "diffusers").expect("valid");
        assert_eq!(naming.of("a/b", "x").expect("inside"), "a/b/x.diffusers.safetensors");
        assert_eq!(naming.of("", "x").expect("inside"), "x.diffusers.safetensors");
        assert!(naming.of("../a", "x").is_err());
        let flat = Naming::new(Some("{ending}-{stem}"), "r8").expect("valid");
        assert_eq!(flat.of("a", "x").expect("inside"), "r8-x");
        // A stem is no template.
        assert_eq!(flat.of("a", "{dir}").expect("inside"), "r8-{dir}");
        for wrong in ["{name}", "x", "{stem", "stem}", "{dir}/x"] {
            assert!(Naming::new(Some(wrong), "r8").is_err(), "{wrong}");
        }
    }
}
