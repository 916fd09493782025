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

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Text(String),
    Digits(Digits),
}

/// A path with block variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    segments: Vec<Segment>,
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
        let (mut text, mut digits) = (String::with_capacity(path.len()), Vec::new());
        let mut rest = path;
        while let Some(c) = rest.chars().next() {
            if c.is_ascii_digit() {
                let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                let (run, tail) = rest.split_at(end);
                if run.len() > 1 && run.starts_with('0') {
                    return None;
                }
                digits.push(run.parse().ok()?);
                text.push('#');
                rest = tail;
            } else {
                text.push(if c == '.' { '_' } else { c });
                rest = &rest[c.len_utf8()..];
            }
        }
        Some(Self { text, digits })
    }
}

impl Template {
    /// Parses `a.{block}.b`; `blocks` gives the count of each block kind, `variables` numbers those met so far.
    pub fn parse(text: &str, blocks: &BTreeMap<String, u32>, variables: &mut Vec<String>) -> Result<Self, String> {
        let mut segments = Vec::new();
        let literal = |text: &str, segments: &mut Vec<Segment>| {
            let mut rest = text;
            while !rest.is_empty() {
                let digit = rest.starts_with(|c: char| c.is_ascii_digit());
                let end = rest.find(|c: char| c.is_ascii_digit() != digit).unwrap_or(rest.len());
                let (run, tail) = rest.split_at(end);
                segments.push(match run.parse() {
                    Ok(n) if digit => Segment::Digits(Digits::Exactly(n)),
                    _ => Segment::Text(run.to_owned()),
                });
                rest = tail;
            }
        };
        let mut rest = text;
        while let Some(open) = rest.find('{') {
            literal(&rest[..open], &mut segments);
            let close = rest[open..].find('}').ok_or_else(|| format!("`{text}` lacks a closing brace"))? + open;
            let name = &rest[open + 1..close];
            let below = *blocks.get(name).ok_or_else(|| format!("`{text}` uses the unknown block `{name}`"))?;
            let index = variables.iter().position(|v| v == name).unwrap_or_else(|| {
                variables.push(name.to_owned());
                variables.len() - 1
            });
            segments.push(Segment::Digits(Digits::Variable { index, below }));
            rest = &rest[close + 1..];
        }
        literal(rest, &mut segments);
        Ok(Self { segments })
    }

    /// The same template followed by `suffix`, which is taken literally.
    #[must_use]
    pub fn with_suffix(&self, suffix: &str) -> Self {
        // A parameter of the model itself stands behind no dot.
        let suffix = if self.segments.is_empty() { suffix.trim_start_matches('.') } else { suffix };
        let tail = Self::parse(suffix, &BTreeMap::new(), &mut Vec::new()).unwrap_or(Self { segments: vec![] });
        let segments = self.segments.iter().cloned().chain(tail.segments).collect();
        Self { segments }
    }

    /// The skeleton text that every instance has.
    pub fn skeleton(&self) -> String {
        let parts = self.segments.iter().map(|s| match s {
            Segment::Text(text) => text.replace('.', "_"),
            Segment::Digits(_) => "#".to_owned(),
        });
        parts.collect()
    }

    /// The variables, if these digits are an instance.
    pub fn matches(&self, digits: &[u32], variables: usize) -> Option<Variables> {
        let mut values = vec![u32::MAX; variables];
        let mut given = digits.iter();
        for segment in &self.segments {
            if let Segment::Digits(want) = segment {
                let &have = given.next()?;
                match *want {
                    Digits::Exactly(n) if n == have => {}
                    Digits::Variable { index, below } if have < below && matches!(values[index], u32::MAX) => {
                        values[index] = have
                    }
                    Digits::Variable { index, .. } if values[index] == have => {}
                    _ => return None,
                }
            }
        }
        given.next().is_none().then_some(values)
    }

    /// Whether a path is the one for given variables.
    pub fn is(&self, path: &str, variables: &[u32]) -> bool {
        let mut rest = path;
        for segment in &self.segments {
            let number = match segment {
                Segment::Text(text) => match rest.strip_prefix(text.as_str()) {
                    Some(tail) => {
                        rest = tail;
                        continue;
                    }
                    None => return false,
                },
                Segment::Digits(Digits::Exactly(n)) => *n,
                Segment::Digits(Digits::Variable { index, .. }) => variables[*index],
            };
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            if rest[..end].parse() != Ok(number) {
                return false;
            }
            rest = &rest[end..];
        }
        rest.is_empty()
    }

    /// The path for given variables.
    pub fn render(&self, variables: &[u32]) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        for segment in &self.segments {
            match segment {
                Segment::Text(text) => out.push_str(text),
                Segment::Digits(Digits::Exactly(n)) => write!(out, "{n}").expect("strings take everything"),
                Segment::Digits(Digits::Variable { index, .. }) => {
                    write!(out, "{}", variables[*index]).expect("strings take everything");
                }
            }
        }
        out
    }

    /// The block of an instance: the path up to its first block number, and that number; `None` outside blocks.
    pub fn block(&self, variables: &[u32]) -> Option<(String, u32)> {
        let at = self.segments.iter().position(|s| matches!(s, Segment::Digits(Digits::Variable { .. })))?;
        let Segment::Digits(Digits::Variable { index, .. }) = self.segments[at] else { return None };
        let head = Self { segments: self.segments[..at].to_vec() };
        Some((head.render(variables), *variables.get(index)?))
    }

    /// The template as tables write it; `names` are those of the variables.
    pub fn text(&self, names: &[String]) -> String {
        let parts = self.segments.iter().map(|s| match s {
            Segment::Text(text) => text.clone(),
            Segment::Digits(Digits::Exactly(n)) => n.to_string(),
            Segment::Digits(Digits::Variable { index, .. }) => format!("{{{}}}", names[*index]),
        });
        parts.collect()
    }

    /// The bounds of the variables it uses, by variable number.
    pub fn bounds(&self) -> BTreeMap<usize, u32> {
        let bounds = self.segments.iter().filter_map(|s| match s {
            Segment::Digits(Digits::Variable { index, below }) => Some((*index, *below)),
            _ => None,
        });
        bounds.collect()
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
