//! Pieces of text.

use std::borrow::Cow;
use std::fmt::Display;
use std::path::Path;

use anstyle::{AnsiColor, Style};
use lorafmt_core::strength::Strength;

pub(super) const BOLD: Style = Style::new().bold();
pub(super) const DIM: Style = Style::new().dimmed();
pub(super) const RED: Style = AnsiColor::Red.on_default().bold();
pub(super) const YELLOW: Style = AnsiColor::Yellow.on_default().bold();
pub(super) const GREEN: Style = AnsiColor::Green.on_default();
pub(super) const CYAN: Style = AnsiColor::Cyan.on_default();

pub(super) fn paint(style: Style, text: impl Display) -> String {
    format!("{style}{text}{style:#}")
}

fn dangerous(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text from a file, safe on a terminal: no escape sequences, no line ends, nothing that turns the writing direction.
pub(super) fn clean(text: &str) -> Cow<'_, str> {
    if !text.chars().any(dangerous) {
        return Cow::Borrowed(text);
    }
    let escape = |c: char| if dangerous(c) { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(escape).collect())
}

/// The same for text of several lines.
pub(super) fn clean_lines(text: &str) -> String {
    text.split('\n').map(clean).collect::<Vec<_>>().join("\n")
}

pub(super) fn path(path: &Path) -> String {
    clean(&path.to_string_lossy()).into_owned()
}

/// Not more than `width` characters.
pub(super) fn shortened(text: &str, width: usize) -> String {
    match text.char_indices().nth(width) {
        None => text.to_owned(),
        Some(_) => text.chars().take(width - 1).chain(['…']).collect(),
    }
}

pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 9.95);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A share as a percentage that says 100 only if it is all.
pub(super) fn percent(share: f64) -> String {
    let tenths = (share * 1000.0).floor() / 10.0;
    if tenths.fract() == 0.0 { format!("{tenths:.0}%") } else { format!("{tenths:.1}%") }
}

pub(super) fn seconds(s: f64) -> String {
    if s < 10.0 { format!("{s:.2} s") } else { format!("{s:.0} s") }
}

/// A relative error.
pub(super) fn error(value: f64) -> String {
    if value == 0.0 { "0".to_owned() } else { format!("{value:.1e}") }
}

/// Four digits of a number that may have any size.
pub(super) fn digits(value: f64) -> String {
    let size = value.abs();
    match value {
        0.0 => "0".to_owned(),
        _ if !(1e-3..1e5).contains(&size) => format!("{value:.2e}"),
        _ => format!("{value:.*}", (3 - size.log10().floor() as i32).clamp(0, 5) as usize),
    }
}

/// A number that may not be there.
pub(super) fn or_dash(value: Option<f64>, text: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), text)
}

/// A strength: what was typed, without what computing has added behind its sixth digit.
pub(super) fn number(value: f64) -> String {
    format!("{value:.5e}").parse().unwrap_or(value).to_string()
}

/// What a strength is elsewhere than in general.
pub(super) fn by_place(strength: &Strength) -> String {
    let encoders = strength.text_encoders.map(|s| format!("text encoders {}", number(s)));
    let components = strength.components.iter().map(|(name, s)| format!("{} {}", clean(name), number(*s)));
    let blocks =
        strength.blocks.iter().map(|(selector, s)| format!("{} x{}", clean(&selector.to_string()), number(*s)));
    let places: Vec<String> = encoders.into_iter().chain(components).chain(blocks).collect();
    if places.is_empty() { String::new() } else { format!(" ({})", places.join(", ")) }
}

pub(super) fn plural(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_what_a_terminal_would_obey() {
        assert_eq!(clean("a\u{1b}[31mb\n"), "a\\u{1b}[31mb\\n");
        assert_eq!(clean("gr\u{fc}n"), "gr\u{fc}n");
        assert_eq!(clean("\u{202e}txt"), "\\u{202e}txt");
    }

    #[test]
    fn numbers_for_people() {
        let sizes = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (171 << 20, "171 MiB")];
        for (n, text) in sizes {
            assert_eq!(bytes(n), text);
        }
        assert_eq!((percent(1.0), percent(0.9999), percent(0.5)), ("100%".into(), "99.9%".into(), "50%".into()));
        let numbers = [0.0, 1.0, 0.012_345, 12_345.6, 123_456.0, 1e-9, 9.9999].map(digits);
        assert_eq!(numbers, ["0", "1.000", "0.01235", "12346", "1.23e5", "1.00e-9", "10.000"]);
        assert_eq!((shortened("abcdef", 4), shortened("abcd", 4)), ("abc…".into(), "abcd".into()));
    }
}
