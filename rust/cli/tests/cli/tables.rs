//! Dialects that only the user knows.

use crate::common::{MODULE, Place, borrowed, factors, file};

/// A dialect of names that no built-in table has: bracketed prefixes, its own suffixes, alpha in tensors.
const DIALECT: &str = r#"
name = "mytool"
title = "A tool of my own"
aliases = ["mt"]
write = true
alpha = "tensor"

[spelling]
down = ".shrink"
up = ".grow"
alpha = ".loudness"

[[loader]]
name = "mytool"
rules = [{ answer = "yes", source = "mine" }]

[[place]]
families = ["flux1"]
component = "transformer"
namespace = "original"
prefix = "my/tool/"
"#;

#[test]
fn a_dialect_without_a_line_of_rust() {
    let place = Place::new();
    place.write("my.toml", DIALECT.as_bytes());
    place.ok(&["sample", "--family", "flux1", "--dialect", "diffusers", "--rank", "1", "-o", "x.safetensors"]);
    let out = place.ok(&["convert", "x.safetensors", "--to", "mt", "--table", "my.toml", "--json"]).json();
    assert_eq!((&out["target"]["dialect"], &out["target"]["path"]), (&"mytool".into(), &"x.mytool.safetensors".into()));
    let there = "x.mytool.safetensors";
    assert_eq!(place.ok(&["detect", there, "--table", "my.toml"]).out, format!("{there}\tmytool\tflux1\t100%\n"));
    let seen = place.ok(&["inspect", there, "--table", "my.toml", "--json"]).json();
    assert!(seen["loaders"].as_array().unwrap().iter().any(|l| l["name"] == "mytool" && l["loads"] == "yes"));
    place.ok(&["convert", there, "--to", "diffusers", "-o", "back.safetensors", "--table", "my.toml"]);
    place.ok(&["diff", "x.safetensors", "back.safetensors", "--tolerance", "0"]);
    let formats = place.ok(&["formats", "--table", "my.toml"]).out;
    let line = |name: &str| formats.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{formats}"));
    assert!(line("family").ends_with(" mytool") && line("flux1").ends_with(" both"), "{formats}");
    assert!(line("chroma").ends_with(" -"), "{formats}");
    // Without the table nobody knows these keys.
    assert_eq!(place.run(&["detect", there, "--json"]).error_code(), "unknown-family");
}

#[test]
fn a_rule_about_keys_is_asked_of_the_keys_that_a_file_would_have() {
    let place = Place::new();
    let rules = r#"rules = [
        { keys = ["my/tool/img_in.", "my/tool/final_layer."], answer = "part", note = "drops the rest", source = "mine" },
        { without = ["my/tool/single_blocks."], answer = "no", note = "wants single blocks", source = "mine" },
        { answer = "yes", source = "mine" }
    ]"#;
    place.write("my.toml", DIALECT.replace(r#"rules = [{ answer = "yes", source = "mine" }]"#, rules).as_bytes());
    let loader = |file: &str| {
        let seen = place.ok(&["inspect", file, "--table", "my.toml", "--json"]).json();
        seen["loaders"].as_array().unwrap().iter().find(|l| l["name"] == "mytool").unwrap().clone()
    };
    for (name, option, answer) in [("blocks", "-v", "yes"), ("all", "--top-level", "in part: drops the rest")] {
        let [own, there] = [format!("{name}.safetensors"), format!("{name}.mytool.safetensors")];
        place.ok(&["sample", "--family", "flux1", "--dialect", "diffusers", "--rank", "1", "-o", &own, option]);
        place.ok(&["convert", &own, "--to", "mt", "--table", "my.toml"]);
        assert_eq!(loader(&there)["loads"], answer);
        // Of a file in another dialect nothing is known; that it would be loaded in this one is said only if it would.
        let (loads, target) = (&loader(&own)["loads"], &loader(&own)["convert_to"]);
        assert_eq!((loads == "not known", target == "mytool"), (true, answer == "yes"), "{loads} {target}");
    }
    place.ok(&["convert", "blocks.safetensors", "--to", "kohya", "-o", "kohya.safetensors"]);
    assert_eq!(loader("kohya.safetensors")["convert_to"], "mytool");
    place.write("few.safetensors", &file(&[], &borrowed(&factors(MODULE, &[]))));
    assert_eq!(loader("few.safetensors")["convert_to"], serde_json::Value::Null);
}

#[test]
fn tables_that_are_wrong() {
    let place = Place::with_x();
    let code = |text: &str| {
        place.write("my.toml", text.as_bytes());
        let ran = place.run(&["detect", "x.safetensors", "--table", "my.toml", "--json"]);
        assert_eq!(ran.code, 2);
        assert_eq!(ran.json()["error"]["path"], "my.toml");
        ran.error_code()
    };
    assert_eq!(code("name = "), "invalid-table");
    assert_eq!(code(&DIALECT.replace("alpha = \"tensor\"", "alpha = \"somewhere\"")), "invalid-table");
    assert_eq!(code(&DIALECT.replace("flux1", "flux9")), "invalid-table");
    assert_eq!(code(&DIALECT.replace("down =", "dawn =")), "invalid-table");
    for keys in [r#"keys = [""]"#, "keys = []", r#"without = [""]"#] {
        let rule = format!(r#"{{ {keys}, answer = "yes""#);
        assert_eq!(code(&DIALECT.replace(r#"{ answer = "yes""#, &rule)), "invalid-table");
    }
    let gone = place.run(&["detect", "x.safetensors", "--table", "gone.toml", "--json"]);
    assert_eq!((gone.code, gone.error_code().as_str()), (2, "not-found"));
}
