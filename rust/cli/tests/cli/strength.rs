//! Strengths by place: block weights and selectors, in commands and recipes.

use std::fmt::Write;

use crate::common::{Place, adapter, borrowed, codes, file};

/// One number for each slot, all 1 but those given by their positions.
fn vector(length: usize, others: &[(usize, f64)]) -> String {
    let of = |at: usize| others.iter().find(|(slot, _)| *slot == at).map_or(1.0, |(_, number)| *number);
    (0..length).map(|at| of(at).to_string()).collect::<Vec<_>>().join(",")
}

fn one() -> Place {
    let place = Place::new();
    place.write("a.safetensors", &adapter(2, 0.25));
    place
}

impl Place {
    /// Runs with further arguments, and compares what was written with what was wanted.
    fn same(&self, run: &[&str], wanted: &[&str]) {
        for (out, args) in [("got.safetensors", run), ("want.safetensors", wanted)] {
            self.ok(&[args, &["-o", out, "--force", "--strict"]].concat());
        }
        self.ok(&["diff", "got.safetensors", "want.safetensors", "--tolerance", "0"]);
    }
}

#[test]
fn vectors_are_strengths_by_place() {
    let place = one();
    // CLIP, T5, IN, the first double block, the first single block; nobody has the others.
    let long = vector(61, &[(0, 0.5), (1, 9.0), (2, 9.0), (3, 2.0), (4, 9.0), (22, -1.0), (60, 9.0)]);
    let places = ["--component", "text_encoder=0.5", "--block", "transformer_blocks=2"];
    let wanted = [&["scale", "a.safetensors"], &places[..], &["--block", "single_transformer_blocks=-1"]].concat();
    place.same(&["scale", "a.safetensors", "--blocks", &long], &wanted);
    place.same(&["scale", "a.safetensors", "--blocks", &format!("[{long}]")], &wanted);
    // 58 is the base and 57 more.
    let with_base = vector(58, &[(0, 0.5), (1, 2.0), (20, -1.0)]);
    place.same(&["scale", "a.safetensors", "--blocks", &with_base], &wanted);
    let without = vector(57, &[(0, 2.0), (19, -1.0)]);
    place.same(&["scale", "a.safetensors", "--blocks", &without, "--component", "text_encoder=0.5"], &wanted);
    let negative = vector(57, &[(0, -1.0)]);
    place.same(
        &["compose", "a.safetensors:0.5", "--blocks", &negative],
        &["compose", "a.safetensors:0.5", "--block", "transformer_blocks=-1"],
    );
}

#[test]
fn presets_and_selectors_after_them() {
    let place = one();
    let half = ["scale", "a.safetensors", "--blocks", "all0.5"];
    place.same(&half, &["scale", "a.safetensors", "--strength", "0.5"]);
    place.same(
        &[&half[..], &["--block", "**.ff=2"]].concat(),
        &["scale", "a.safetensors", "--strength", "0.5", "--block", "**.ff=4"],
    );
    place.same(&["compose", "a.safetensors:0.25", "--blocks", "FLUXALL"], &["compose", "a.safetensors:0.25"]);
    // What is left out is said, as always.
    let report =
        place.run(&["scale", "a.safetensors", "--blocks", &vector(57, &[(0, 0.0)]), "-n", "-o", "x", "--json"]);
    assert_eq!(codes(&report.json()), ["zero-strength"]);
}

#[test]
fn recipes_have_block_weights() {
    let place = one();
    let long = vector(58, &[(0, 0.5), (1, 2.0)]);
    let wanted = ["compose", "a.safetensors:0.5", "--blocks", &long];
    let recipes = [
        ("r.yaml", format!("- {{path: a.safetensors, strength: 0.5, block_weights: [{long}]}}")),
        ("t.yaml", format!("- {{path: a.safetensors, strength: 0.5, block_weights: '{long}'}}")),
        ("r.toml", format!("[[loras]]\npath = 'a.safetensors'\nstrength = 0.5\nblock_weights = [{long}]")),
        ("r.json", format!("[{{\"path\": \"a.safetensors\", \"strength\": 0.5, \"block_weights\": [{long}]}}]")),
    ];
    for (name, text) in recipes {
        place.write(name, text.as_bytes());
        place.same(&["compose", "--recipe", name], &wanted);
    }
    place.write("p.yaml", b"- {path: a.safetensors, block_weights: ALL0.5, blocks: {'**.ff': 1}}");
    place.same(
        &["compose", "--recipe", "p.yaml"],
        &["compose", "a.safetensors", "--blocks", "ALL0.5", "--block", "**.ff=1"],
    );
    let wrong = [
        ("- {path: a.safetensors, block_weights: [1, x]}", "block weight 2 of `a.safetensors` is the text `x`"),
        ("- {path: a.safetensors, block_weights: 3}", "the name of a preset or a list"),
        ("- {path: a.safetensors, block_weights: '1,,2'}", "block weight 2 is ``"),
        ("- {path: a.safetensors, block_weights: [1, .nan]}", "is NaN"),
    ];
    for (text, said) in wrong {
        place.write("w.yaml", text.as_bytes());
        let ran = place.run(&["compose", "--recipe", "w.yaml", "-o", "w.safetensors", "--json"]);
        assert_eq!((ran.code, ran.error_code().as_str()), (2, "invalid-recipe"), "{text}");
        assert!(ran.json()["error"]["message"].as_str().unwrap().contains(said), "{}", ran.out);
    }
}

#[test]
fn block_weights_that_make_no_sense() {
    let place = one();
    let vectors = "57 (D00-D18, S00-S37); 58 (BASE, D00-D18, S00-S37); 61 (CLIP, T5, IN, D00-D18, S00-S37, OUT)";
    let cases = [
        ("1,2,3", "3 block weights are no vector for FLUX.1", vectors),
        ("1", "1 block weights", vectors),
        ("MIDD", "the preset `MIDD` is not for FLUX.1", "ALL, ALL0.5, FLUXALL, NONE"),
        ("MID", "no preset of block weights is called `MID`", "vectors of 57, 58, 61 numbers"),
        ("1,R,1", "block weight 2 is `R`", "the name of a preset"),
        ("1,nan", "block weight 2 is NaN", "the name of a preset"),
        ("", "the block weights are empty", "the name of a preset"),
    ];
    for (weights, message, hint) in cases {
        for command in ["scale", "compose"] {
            let ran = place.run(&[command, "a.safetensors", "--blocks", weights, "-o", "x.safetensors", "--json"]);
            assert_eq!((ran.code, ran.error_code().as_str()), (2, "invalid-argument"), "{weights}");
            let error = &ran.json()["error"];
            assert!(error["message"].as_str().unwrap().contains(message), "{error}");
            assert!(error["hint"].as_str().unwrap().contains(hint), "{error}");
        }
    }
    assert_eq!(place.names(), ["a.safetensors"]);
    place.write("r.yaml", b"- a.safetensors");
    let ran = place.run(&["compose", "--recipe", "r.yaml", "--blocks", "ALL", "-o", "x.safetensors", "--json"]);
    assert_eq!(ran.error_code(), "invalid-argument");
}

/// Attention of a U-Net as Stable Diffusion 1 has it, under diffusers' names.
fn unet() -> Vec<String> {
    let blocks = (0..3).flat_map(|i| (0..2).map(move |j| format!("down_blocks.{i}.attentions.{j}")));
    let up = (1..4).flat_map(|i| (0..3).map(move |j| format!("up_blocks.{i}.attentions.{j}")));
    blocks.chain(["mid_block.attentions.0".to_owned()]).chain(up).map(|at| format!("{at}.proj_in")).collect()
}

#[test]
fn a_family_of_ones_own_takes_the_vectors_of_its_layout() {
    let place = Place::new();
    let mut family = "name = 'mini'\ntitle = 'Mini'\n[[component]]\nname = 'unet'\nnamespaces = ['hf']\n".to_owned();
    family += "rows = [";
    for path in unet() {
        write!(family, "{{ hf = '{path}', in = 8, out = 8 }}, ").unwrap();
    }
    family += "]\n";
    let dialect = "name = 'mine'\ntitle = 'Mine'\nwrite = true\nalpha = 'folded'\n[spelling]\ndown = '.down'\nup = '.up'\n\
                   [[place]]\nfamilies = ['mini']\ncomponent = 'unet'\nnamespace = 'hf'\nprefix = 'net/'\n";
    place.write("family.toml", family.as_bytes());
    place.write("dialect.toml", dialect.as_bytes());
    let mut tensors = Vec::new();
    for path in unet() {
        tensors.push((format!("net/{path}.down"), vec![1, 8], 1.0));
        tensors.push((format!("net/{path}.up"), vec![8, 1], 1.0));
    }
    place.write("a.safetensors", &file(&[], &borrowed(&tensors)));
    let scale = |args: &[&str]| {
        let tables = ["--table", "family.toml", "--table", "dialect.toml"];
        place.run(&[&["scale", "a.safetensors", "--force", "--strict"], args, &tables[..]].concat())
    };
    // MIDD: the base, IN05 to IN08, the middle, OUT03 to OUT06.
    let ran = scale(&["--blocks", "MIDD", "-o", "s.safetensors", "-n", "--json"]);
    assert_eq!(codes(&ran.json()), ["zero-strength"]);
    let named = |blocks: &str| {
        let blocks: Vec<String> = blocks.split(' ').map(|b| format!("{b}=0")).collect();
        let mut args = vec![];
        blocks.iter().for_each(|b| args.extend(["--block", b]));
        assert!(scale(&[&args[..], &["-o", "want.safetensors", "-q"]].concat()).code <= 1);
        place.read("want.safetensors")
    };
    let weighted = |weights: &str| {
        assert!(scale(&["--blocks", weights, "-o", "got.safetensors", "-q"]).code <= 1);
        place.read("got.safetensors")
    };
    let off = "down_blocks.0 down_blocks.1.attentions.0 up_blocks.2.attentions.1-2 up_blocks.3";
    assert!(weighted("MIDD") == named(off));
    assert!(weighted("1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0") == named(off));
    let full = "1,1,0,0,1,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0,0,0,0,0";
    assert!(weighted(full) == named(off));
    let ran = scale(&["--blocks", "1,1,1,1,1,1,1,1,1,1,1,1", "-o", "x.safetensors", "--json"]);
    assert_eq!(ran.error_code(), "invalid-argument");
    assert!(ran.out.contains("17 (BASE, IN01-IN02, "), "{}", ran.out);
}
