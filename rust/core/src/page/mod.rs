//! A library as one self-contained HTML page.
//!
//! Everything is inline: style, script, and the data as JSON. Nothing is ever asked of a network, which the page's own
//! policy also forbids. Text from files reaches the document as text nodes alone, and the policy runs no script but the
//! one whose hash it names, so a file cannot bring one along under its name.

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::library::Library;

const PAGE: &str = include_str!("../../data/page/page.html");
const STYLE: &str = include_str!("../../data/page/page.css");

/// The parts of the script, in their order. They are one function's body: no name of them is global.
const SCRIPT: [&str; 6] = [
    include_str!("../../data/page/words.js"),
    include_str!("../../data/page/charts.js"),
    include_str!("../../data/page/overview.js"),
    include_str!("../../data/page/detail.js"),
    include_str!("../../data/page/table.js"),
    include_str!("../../data/page/main.js"),
];

/// The page.
pub fn html(library: &Library) -> String {
    let script = format!("(() => {{\n\"use strict\";\n{}}})();\n", SCRIPT.concat());
    let policy = format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; img-src data:; base-uri 'none'; form-action 'none'",
        source_hash(&script),
        source_hash(STYLE)
    );
    fill(PAGE, &[("policy", &policy), ("style", STYLE), ("data", &json(library)), ("script", &script)])
}

/// Puts values in the place of `{{name}}`. What is put in is not looked at again.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(template.len() + values.iter().map(|(_, v)| v.len()).sum::<usize>());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, after) = after.split_once("}}").unwrap_or((after, ""));
        out.push_str(before);
        out.push_str(values.iter().find(|(n, _)| *n == name).map_or("", |(_, value)| value));
        rest = after;
    }
    out + rest
}

/// JSON that can stand in a script element: no `<` could end it or open a comment.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default().replace('<', "\\u003c")
}

/// The text of an inline element as a content security policy names it.
fn source_hash(text: &str) -> String {
    format!("sha256-{}", base64(&Sha256::digest(text.as_bytes())))
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().enumerate().fold(0u32, |w, (i, b)| w | u32::from(*b) << (16 - 8 * i));
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_standard() {
        let known = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (text, encoded) in known {
            assert_eq!(base64(text.as_bytes()), encoded);
        }
    }

    #[test]
    fn values_are_not_templates() {
        let filled = fill("a{{x}}b{{y}}c", &[("x", "{{y}}"), ("y", "2")]);
        assert_eq!(filled, "a{{y}}b2c");
    }

    #[test]
    fn data_cannot_end_its_element() {
        let text = json(&["</script><script>alert(1)</script>", "<!--"]);
        assert!(!text.contains('<'), "{text}");
        let back: Vec<String> = serde_json::from_str(&text).expect("still JSON");
        assert_eq!(back[1], "<!--");
    }

    #[test]
    fn the_page_asks_nobody_and_writes_no_markup() {
        let script = SCRIPT.concat();
        for word in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttp"] {
            assert!(!script.contains(word), "{word}");
        }
        // Of addresses only the name of SVG's namespace, which nobody looks up.
        let svg = "http://www.w3.org/2000/svg";
        for part in SCRIPT.iter().chain([&PAGE, &STYLE]) {
            assert!(!part.replace(svg, "").contains("://"));
        }
        assert!(!script.contains("</") && !STYLE.contains("</"));
    }
}
