//! Module path templates and the digit-run form under which they are looked up.
//!
//! `double_blocks.{double}.img_mlp.0` becomes the skeleton `double_blocks_#_img_mlp_#` and the constraints
//! `[a block number below 19, exactly 0]`. A key is brought to the same form once and found by one hash lookup;
//! whether its tool wrote dots or underscores no longer matters, and no underscore is ever guessed back.

use std::collections::BTreeMap;

/// What a run of digits in a path must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Digits {
    Exactly(u32),
    /// Below a bound; bound to the variable of that number.
    Variable {
        index: usize,
        below: u32,
    },
}

/// Stands for a run of digits in texts.
const RUN: char = '#';

/// A path with block variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// The path with a `#` for every run of digits and every variable.
    text: Box<str>,
    /// What those are.
    digits: Vec<Digits>,
}

/// The values of the block variables of a row.
pub type Variables = Vec<u32>;

/// A path in digit-run form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skeleton {
    /// Digit runs replaced by `#`, dots by underscores.
    pub text: String,
    /// The digit runs.
    pub digits: Vec<u32>,
}

impl Skeleton {
    /// Brings a path to digit-run form. `None` if a number is not written the one canonical way.
    pub fn of(path: &str) -> Option<Self> {
        Some(Self { text: skeleton(path), digits: digits(path)? })
    }
}

/// A path with its digit runs replaced by `#`, dots by underscores. What is replaced already stays.
pub fn skeleton(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit() || c == '.') {
        text.push_str(&rest[..at]);
        rest = match rest[at..].strip_prefix('.') {
            Some(tail) => {
                text.push('_');
                tail
            }
            None => {
                text.push(RUN);
                rest[at..].trim_start_matches(|c: char| c.is_ascii_digit())
            }
        };
    }
    text.push_str(rest);
    text
}

/// The digit runs of a path. `None` if a number is not written the one canonical way.
pub fn digits(path: &str) -> Option<Vec<u32>> {
    let runs = path.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty());
    runs.map(|run| if run.len() > 1 && run.starts_with('0') { None } else { run.parse().ok() }).collect()
}

impl Template {
    /// Parses `a.{block}.b`; `blocks` gives the count of each block kind, `variables` numbers those met so far.
    pub fn parse(text: &str, blocks: &BTreeMap<String, u32>, variables: &mut Vec<String>) -> Result<Self, String> {
        let mut made = Self { text: Box::default(), digits: Vec::new() };
        let mut path = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find(|c: char| c.is_ascii_digit() || c == '{' || c == RUN) {
            path.push_str(&rest[..at]);
            path.push(RUN);
            let tail = &rest[at..];
            if tail.starts_with(RUN) {
                return Err(format!("`{text}` has a `{RUN}`, which stands for numbers"));
            }
            let Some(tail) = tail.strip_prefix('{') else {
                let end = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
                let number = tail[..end].parse().map_err(|_| format!("`{text}` has a number that is too large"))?;
                made.digits.push(Digits::Exactly(number));
                rest = &tail[end..];
                continue;
            };
            let (name, tail) = tail.split_once('}').ok_or_else(|| format!("`{text}` lacks a closing brace"))?;
            let below = *blocks.get(name).ok_or_else(|| format!("`{text}` uses the unknown block `{name}`"))?;
            let index = variables.iter().position(|v| v == name).unwrap_or_else(|| {
                variables.push(name.to_owned());
                variables.len() - 1
            });
            made.digits.push(Digits::Variable { index, below });
            rest = tail;
        }
        path.push_str(rest);
        made.text = path.into();
        Ok(made)
    }

    /// The same template followed by `suffix`, which is taken literally.
    #[must_use]
    pub fn with_suffix(&self, suffix: &str) -> Self {
        // A parameter of the model itself stands behind no dot.
        let suffix = if self.text.is_empty() { suffix.trim_start_matches('.') } else { suffix };
        let none = || Self { text: Box::default(), digits: Vec::new() };
        let tail = Self::parse(suffix, &BTreeMap::new(), &mut Vec::new()).unwrap_or_else(|_| none());
        let digits = self.digits.iter().chain(&tail.digits).copied().collect();
        Self { text: [&*self.text, &*tail.text].concat().into(), digits }
    }

    /// The skeleton text that every instance has.
    pub fn skeleton(&self) -> String {
        self.text.replace('.', "_")
    }

    /// The texts between digit runs, each with the run behind it; the last has none.
    fn pieces(&self) -> impl Iterator<Item = (&str, Option<Digits>)> {
        let runs = self.digits.iter().copied().map(Some).chain([None]);
        self.text.split(RUN).zip(runs)
    }

    /// The variables, if these digits are an instance.
    pub fn matches(&self, digits: &[u32], variables: usize) -> Option<Variables> {
        if digits.len() != self.digits.len() {
            return None;
        }
        let mut values = vec![u32::MAX; variables];
        for (want, &have) in self.digits.iter().zip(digits) {
            match *want {
                Digits::Exactly(n) if n == have => {}
                Digits::Variable { index, below } if have < below && matches!(values[index], u32::MAX) => {
                    values[index] = have
                }
                Digits::Variable { index, .. } if values[index] == have => {}
                _ => return None,
            }
        }
        Some(values)
    }

    /// Whether a path is the one for given variables.
    pub fn is(&self, path: &str, variables: &[u32]) -> bool {
        let mut rest = path;
        for (text, run) in self.pieces() {
            let Some(tail) = rest.strip_prefix(text) else { return false };
            rest = tail;
            let Some(run) = run else { break };
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            if rest[..end].parse() != Ok(run.value(variables)) {
                return false;
            }
            rest = &rest[end..];
        }
        rest.is_empty()
    }

    /// The path for given variables.
    pub fn render(&self, variables: &[u32]) -> String {
        use std::fmt::Write;
        let mut out = String::with_capacity(self.text.len() + self.digits.len());
        for (text, run) in self.pieces() {
            out.push_str(text);
            if let Some(run) = run {
                write!(out, "{}", run.value(variables)).expect("strings take everything");
            }
        }
        out
    }

    /// The block of an instance: the path up to its first block number, and that number; `None` outside blocks.
    pub fn block(&self, variables: &[u32]) -> Option<(String, u32)> {
        let at = self.digits.iter().position(|d| matches!(d, Digits::Variable { .. }))?;
        let (end, _) = self.text.match_indices(RUN).nth(at)?;
        let head = Self { text: self.text[..end].into(), digits: self.digits[..at].to_vec() };
        Some((head.render(variables), self.digits[at].value(variables)))
    }

    /// The template as tables write it; `names` are those of the variables.
    pub fn text(&self, names: &[String]) -> String {
        let parts = self.pieces().map(|(text, run)| match run {
            None => text.to_owned(),
            Some(Digits::Exactly(n)) => format!("{text}{n}"),
            Some(Digits::Variable { index, .. }) => format!("{text}{{{}}}", names[index]),
        });
        parts.collect()
    }

    /// The bounds of the variables it uses, by variable number.
    pub fn bounds(&self) -> BTreeMap<usize, u32> {
        let bounds = self.digits.iter().filter_map(|d| match d {
            Digits::Variable { index, below } => Some((*index, *below)),
            Digits::Exactly(_) => None,
        });
        bounds.collect()
    }
}

impl Digits {
    fn value(self, variables: &[u32]) -> u32 {
        match self {
            Digits::Exactly(n) => n,
            Digits::Variable { index, .. } => variables[index],
        }
    }
}

/// Expands `{a,b}` groups: `x.{a,b}.{c,d}` gives `x.a.c x.a.d x.b.c x.b.d`. Groups without a comma are left alone.
pub fn alternatives(text: &str) -> Vec<String> {
    let mut search = 0;
    while let Some(open) = text[search..].find('{').map(|i| i + search) {
        let Some(close) = text[open..].find('}').map(|i| i + open) else { break };
        let group = &text[open + 1..close];
        if group.contains(',') {
            let (head, tail) = (&text[..open], &text[close + 1..]);
            let rests = alternatives(tail);
            return group
                .split(',')
                .flat_map(|choice| rests.iter().map(move |rest| format!("{head}{}{rest}", choice.trim())))
                .collect();
        }
        search = close + 1;
    }
    vec![text.to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skeletons() {
        assert_eq!(skeleton("a.12_b3..c"), "a_#_b#__c");
        assert_eq!(skeleton(&skeleton("a.12_b3..c")), "a_#_b#__c");
        let s = Skeleton::of("double_blocks.3.img_mlp.0").expect("plain");
        assert_eq!((s.text.as_str(), s.digits.as_slice()), ("double_blocks_#_img_mlp_#", &[3, 0][..]));
        assert_eq!(Skeleton::of("double_blocks_3_img_mlp_0"), Some(s));
        assert_eq!(Skeleton::of("a.03"), None);
        assert_eq!(Skeleton::of("a.99999999999999"), None);
    }

    #[test]
    fn templates_match_render_and_bound() {
        let blocks = BTreeMap::from([("double".to_owned(), 19)]);
        let mut variables = Vec::new();
        let t = Template::parse("double_blocks.{double}.img_mlp.0", &blocks, &mut variables).expect("valid");
        assert_eq!(t.skeleton(), "double_blocks_#_img_mlp_#");
        assert_eq!(t.matches(&[18, 0], 1), Some(vec![18]));
        assert_eq!(t.matches(&[19, 0], 1), None);
        assert_eq!(t.matches(&[18, 2], 1), None);
        assert_eq!(t.render(&[7]), "double_blocks.7.img_mlp.0");
        assert_eq!(t.block(&[7]), Some(("double_blocks.".to_owned(), 7)));
        assert!(Template::parse("a.{b}", &blocks, &mut variables).is_err());
    }

    #[test]
    fn braces() {
        assert_eq!(alternatives("a.{x,y}.{n}.{1,2}").len(), 4);
        assert_eq!(alternatives("a.{n}"), ["a.{n}"]);
    }
}
