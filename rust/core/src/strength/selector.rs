//! Selectors: patterns that name places in a model.
//!
//! A selector is cut at its dots like a path, and its segments are compared one by one, so that `blocks.1` is never
//! `blocks.10`. Matching keeps the set of all positions that can be reached so far: no pattern makes it slow.

use std::fmt;
use std::ops::RangeInclusive;

use crate::error::{Code, Error, Result};

const GRAMMAR: &str = "write a path like `transformer_blocks.3.attn`, with block numbers `0-4,7`, `*` for any part of a \
                       segment, `**` for any segments, `{to_q,to_k}` for one of several, and `text_encoder:` in front \
                       for another component than the main one";

/// Names modules by their canonical paths; everything below a path that matches belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    text: String,
    component: Option<Glob>,
    segments: Vec<Segment>,
    /// Made from a table: no adapter needs to have what it names.
    of_table: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    /// `**`
    Any,
    One(Glob),
}

/// What one segment of a path must be, from its start to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Glob(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    /// `*`
    Run,
    Numbers(Vec<RangeInclusive<u64>>),
    OneOf(Vec<Glob>),
}

impl Selector {
    /// Reads a selector.
    pub fn parse(text: &str) -> Result<Self> {
        let read = || {
            let (component, path) = match text.trim().split_once(':') {
                Some((name, path)) => (Some(Glob::parse(name)?), path),
                None => (None, text.trim()),
            };
            let segments = match (path, &component) {
                ("", Some(_)) => Vec::new(),
                _ => cut(path)?.into_iter().map(Segment::parse).collect::<Result<_, _>>()?,
            };
            Ok(Self { text: text.to_owned(), component, segments, of_table: false })
        };
        read().map_err(|reason: String| {
            let message = format!("the selector `{text}` is not understood: {reason}");
            Error::new(Code::InvalidArgument, message).hint(GRAMMAR)
        })
    }

    /// A selector for a place that a table knows. It is no mistake if an adapter has no module there.
    pub(crate) fn of_table(text: &str) -> Result<Self> {
        Ok(Self { of_table: true, ..Self::parse(text)? })
    }

    /// Whether it was made from a table, rather than written by somebody.
    pub(crate) fn is_of_table(&self) -> bool {
        self.of_table
    }

    /// Whether a module is meant; `main` says whether the component is the family's first.
    pub fn matches(&self, component: &str, main: bool, path: &str) -> bool {
        let path: Vec<&str> = path.split('.').collect();
        match (&self.component, self.segments.split_first()) {
            (Some(name), _) => name.matches(component) && covers(&self.segments, &path),
            // A pattern in front is part of the path: `*.attn` is about no component that happens to fit.
            (None, Some((Segment::One(first), rest))) if first.is_literal() && first.matches(component) => {
                covers(rest, &path) || (main && covers(&self.segments, &path))
            }
            (None, _) => main && covers(&self.segments, &path),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether the segments match the beginning of the path.
fn covers(segments: &[Segment], path: &[&str]) -> bool {
    let mut reached = vec![false; path.len() + 1];
    reached[0] = true;
    for segment in segments {
        reached = match segment {
            Segment::Any => onwards(&reached),
            Segment::One(glob) => {
                let step = |(at, name): (usize, &&str)| reached[at] && glob.matches(name);
                std::iter::once(false).chain(path.iter().enumerate().map(step)).collect()
            }
        };
    }
    reached.contains(&true)
}

/// Every position at or behind one that is reached.
fn onwards(reached: &[bool]) -> Vec<bool> {
    let running = reached.iter().scan(false, |any, here| {
        *any |= here;
        Some(*any)
    });
    running.collect()
}

/// Cuts at the dots. Braces must be closed within a segment and not lie in each other.
fn cut(path: &str) -> Result<Vec<&str>, String> {
    let mut open = false;
    for c in path.chars() {
        match c {
            '{' if open => return Err("there are braces inside braces".to_owned()),
            '}' if !open => return Err("a `}` has no `{`".to_owned()),
            '.' if open => return Err("braces do not reach over a dot".to_owned()),
            ':' => return Err("a `:` stands only behind a component".to_owned()),
            '{' | '}' => open = c == '{',
            _ => {}
        }
    }
    if open {
        return Err("a `{` has no `}`".to_owned());
    }
    Ok(path.split('.').collect())
}

impl Segment {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "**" { Ok(Self::Any) } else { Glob::parse(text).map(Self::One) }
    }
}

impl Glob {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a segment is empty".to_owned());
        }
        if text.contains(|c: char| c.is_ascii_digit()) && text.chars().all(|c| "0123456789-, ".contains(c)) {
            return Ok(Self(vec![numbers(text)?]));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let end = rest.find(['*', '{']).unwrap_or(rest.len());
            let (part, tail) = match first {
                '*' => (Part::Run, &rest[1..]),
                '{' => {
                    let (inside, tail) = rest[1..].split_once('}').ok_or("a `{` has no `}`")?;
                    let each = inside.split(',').map(|one| Self::parse(one.trim()));
                    (Part::OneOf(each.collect::<Result<_, _>>()?), tail)
                }
                _ => (literal(&rest[..end])?, &rest[end..]),
            };
            parts.push(part);
            rest = tail;
        }
        Ok(Self(parts))
    }

    fn is_literal(&self) -> bool {
        self.0.iter().all(|part| match part {
            Part::Run => false,
            Part::OneOf(each) => each.iter().all(Self::is_literal),
            Part::Text(_) | Part::Numbers(_) => true,
        })
    }

    fn matches(&self, text: &str) -> bool {
        let mut start = vec![false; text.len() + 1];
        start[0] = true;
        self.reach(text, &start)[text.len()]
    }

    /// The positions at which the pattern can end when it begins at one of `start`.
    fn reach(&self, text: &str, start: &[bool]) -> Vec<bool> {
        self.0.iter().fold(start.to_vec(), |from, part| part.reach(text, &from))
    }
}

impl Part {
    fn reach(&self, text: &str, from: &[bool]) -> Vec<bool> {
        let bytes = text.as_bytes();
        let mut to = vec![false; from.len()];
        let starts = (0..from.len()).filter(|at| from[*at]);
        match self {
            Part::Run => return onwards(from),
            Part::Text(wanted) => {
                starts
                    .filter(|at| bytes[*at..].starts_with(wanted.as_bytes()))
                    .for_each(|at| to[at + wanted.len()] = true);
            }
            Part::Numbers(ranges) => {
                for at in starts.filter(|at| *at == 0 || !bytes[at - 1].is_ascii_digit()) {
                    let digits = bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
                    let number = text.get(at..at + digits).and_then(|run| run.parse::<u64>().ok());
                    if number.is_some_and(|n| ranges.iter().any(|range| range.contains(&n))) {
                        to[at + digits] = true;
                    }
                }
            }
            Part::OneOf(each) => {
                for glob in each {
                    glob.reach(text, from).iter().zip(&mut to).for_each(|(reached, here)| *here |= reached);
                }
            }
        }
        to
    }
}

fn literal(text: &str) -> Result<Part, String> {
    match text.chars().find(|c| c.is_whitespace() || ",.{}".contains(*c)) {
        None => Ok(Part::Text(text.to_owned())),
        Some(',') => Err("a `,` stands between numbers or inside braces".to_owned()),
        Some(c) => Err(format!("no name has a `{c}`")),
    }
}

/// `0-4,7,9-12`
fn numbers(text: &str) -> Result<Part, String> {
    let number = |n: &str| n.trim().parse::<u64>().map_err(|_| format!("`{}` is no block number", n.trim()));
    let range = |item: &str| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (from, to) = (number(first)?, number(last)?);
        if from > to { Err(format!("the range `{}` runs backwards", item.trim())) } else { Ok(from..=to) }
    };
    text.split(',').map(range).collect::<Result<_, _>>().map(Part::Numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIN: &str = "transformer";

    fn hits(selector: &str, path: &str) -> bool {
        Selector::parse(selector).expect("valid").matches(MAIN, true, path)
    }

    #[test]
    fn whole_segments_from_the_beginning() {
        assert!(hits("transformer_blocks.1", "transformer_blocks.1"));
        assert!(hits("transformer_blocks.1", "transformer_blocks.1.attn.to_q"));
        assert!(!hits("transformer_blocks.1", "transformer_blocks.10.attn.to_q"));
        assert!(!hits("transformer_blocks.1", "single_transformer_blocks.1.attn.to_q"));
        assert!(!hits("transformer_blocks.1.attn", "transformer_blocks.1"));
        assert!(!hits("attn", "transformer_blocks.1.attn"));
        assert!(hits("x_embedder", "x_embedder"));
    }

    #[test]
    fn numbers_and_ranges() {
        let blocks = |selector: &str| {
            let path = |n: &u32| hits(selector, &format!("blocks.{n}.attn"));
            (0..30).filter(path).collect::<Vec<_>>()
        };
        assert_eq!(blocks("blocks.3"), [3]);
        assert_eq!(blocks("blocks.0-4,7, 9-12"), [0, 1, 2, 3, 4, 7, 9, 10, 11, 12]);
        assert_eq!(blocks("blocks.{1,2-3}.attn"), [1, 2, 3]);
        assert_eq!(blocks("blocks.2*"), [2, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]);
        assert!(!hits("blocks.0-9", "blocks.x"));
        assert!(hits("layer{0-2}_q", "layer1_q") && !hits("layer{0-2}_q", "layer11_q"));
    }

    #[test]
    fn stars_and_braces() {
        assert!(hits("**.{to_q,to_k}", "a.0.attn.to_q") && !hits("**.{to_q,to_k}", "a.0.attn.to_v"));
        assert!(hits("**.{ to_q , to_k }", "to_k"));
        assert!(hits("**", "a") && hits("a.**", "a") && hits("a.**.c", "a.c") && hits("a.**.c", "a.b.b.c.d"));
        assert!(!hits("a.**.c", "a.b.b"));
        assert!(hits("*blocks.3", "single_blocks.3.x") && !hits("*.3", "a.b.3"));
        assert!(hits("{add,to}_{q,k}_*", "to_k_proj") && !hits("{add,to}_{q,k}_*", "to_v_proj"));
        // Alternatives that begin alike.
        assert!(hits("{a,ab}c", "abc") && hits("{a,ab}c", "ac"));
    }

    #[test]
    fn components() {
        let select = |text: &str, component: &str, path: &str| {
            Selector::parse(text).expect("valid").matches(component, component == MAIN, path)
        };
        for text in ["text_encoder", "text_encoder:", "text_encoder:**", "text_encoder.layers", "text_encoder:layers"] {
            assert!(select(text, "text_encoder", "layers.3.q_proj"), "{text}");
            assert!(!select(text, "text_encoder_2", "layers.3.q_proj"), "{text}");
            assert!(!select(text, MAIN, "layers.3.q_proj"), "{text}");
        }
        assert!(select("transformer.blocks.3", MAIN, "blocks.3.x"));
        assert!(select("transformer", MAIN, "blocks.3.x"));
        assert!(!select("transformer.blocks.3", "text_encoder", "blocks.3.x"));
        assert!(select("text_encoder*:**.q_proj", "text_encoder_2", "layers.3.q_proj"));
        assert!(select("{text_encoder,text_encoder_2}.layers", "text_encoder_2", "layers.3.q_proj"));
        // Without a component, and with a pattern in front, the main one is meant.
        for text in ["layers", "**", "*", "**.q_proj"] {
            assert!(select(text, MAIN, "layers.3.q_proj"), "{text}");
            assert!(!select(text, "text_encoder", "layers.3.q_proj"), "{text}");
        }
    }

    #[test]
    fn errors_show_the_grammar() {
        let cases = [
            ("", "empty"),
            ("  ", "empty"),
            ("a..b", "empty"),
            ("a.", "empty"),
            (".a", "empty"),
            (":a", "empty"),
            ("{a,}", "empty"),
            ("{}", "empty"),
            ("a.9-3", "`9-3` runs backwards"),
            ("a.1-", "`` is no block number"),
            ("a.1,,2", "`` is no block number"),
            ("a.1-2-3", "`2-3` is no block number"),
            ("a.99999999999999999999", "is no block number"),
            ("{1,-3}", "is no block number"),
            ("{a,b", "`{` has no `}`"),
            ("{a:b", "`{`"),
            ("a}.b", "`}` has no `{`"),
            ("a:b}", "`}` has no `{`"),
            ("{a,{b,c}}", "inside braces"),
            ("{a.b,c}", "over a dot"),
            ("a,b", "between numbers"),
            ("a b", "no name has a ` `"),
            ("a:b:c", "`:` stands only"),
            ("a.b:c", "no name has a `.`"),
        ];
        for (text, reason) in cases {
            let error = Selector::parse(text).expect_err(text);
            assert_eq!(error.code(), Code::InvalidArgument);
            assert!(error.message().contains(reason), "{text}: {error}");
            assert!(error.hint_text().contains("transformer_blocks.3"));
        }
    }

    #[test]
    fn display_gives_the_text_back() {
        for text in ["a.0-4,7", "text_encoder:**.{q,k}", " a "] {
            assert_eq!(Selector::parse(text).expect("valid").to_string(), text);
        }
        assert!(hits(" a ", "a.b"));
    }

    /// The same question answered by trying everything.
    fn naive(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => (0..=text.len()).any(|skip| naive(rest, &text[skip..])),
            Some((c, rest)) => text.first() == Some(c) && naive(rest, &text[1..]),
        }
    }

    #[test]
    fn stars_match_as_by_trying_everything() {
        let mut state = 7u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let mut word = |letters: &[u8], longest: usize| -> Vec<u8> {
            let length = 1 + random(longest);
            (0..length).map(|_| letters[random(letters.len())]).collect()
        };
        let mut found = 0;
        for _ in 0..4000 {
            let (pattern, text) = (word(b"ab**", 6), word(b"ab", 8));
            let (shown, path) = (String::from_utf8_lossy(&pattern), String::from_utf8_lossy(&text));
            assert_eq!(hits(&shown, &path), shown == "**" || naive(&pattern, &text), "{shown} {path}");
            // The same over segments: `**` stands for what `*` stands for among letters, and the end is open.
            let dotted = |text: &[u8]| text.iter().map(|c| (*c as char).to_string()).collect::<Vec<_>>().join(".");
            let selector = dotted(&pattern).replace('*', "**");
            let open: Vec<u8> = pattern.iter().copied().chain(*b"*").collect();
            assert_eq!(hits(&selector, &dotted(&text)), naive(&open, &text), "{selector} {path}");
            found += usize::from(naive(&open, &text));
        }
        assert!((500..3500).contains(&found), "{found}");
    }

    #[test]
    fn a_pattern_cannot_be_slow() {
        let selector = format!("{}b", "*a".repeat(200));
        assert!(!hits(&selector, &"a".repeat(2000)));
        let selector = vec!["**"; 200].join(".") + ".b";
        assert!(!hits(&selector, &vec!["a"; 2000].join(".")));
        assert!(!hits(&format!("{}b", "{a,aa,aaa}".repeat(50)), &"a".repeat(120)));
    }
}
