use serde_json::{Value, json};

use crate::common::{Place, adapter, adds_up, codes, factors, file, module, ran, tiny};

/// `a.safetensors` and `b.safetensors`: the same modules with other numbers and ranks.
fn two() -> Place {
    let place = Place::new();
    place.write("a.safetensors", &adapter(2, 0.25));
    place.write("b.safetensors", &adapter(3, -1.5));
    place
}

#[test]
fn halves_make_the_whole() {
    let place = two();
    let args = ["compose", "a.safetensors:0.5", "a.safetensors:0.5", "-o", "c.safetensors"];
    let ran = place.ok(&args);
    assert!(ran.out.starts_with("wrote c.safetensors  (2 adapters -> diffusers, flux1, "), "{}", ran.out);
    assert!(ran.err.contains("warning: [repeated-adapter] `a` is given more than once"), "{}", ran.err);
    place.ok(&["diff", "a.safetensors", "c.safetensors"]);
    // A copy under another name is the same adapter.
    place.write("copy.safetensors", &place.read("a.safetensors"));
    let copied = place.ok(&["compose", "a.safetensors:0.25", "copy.safetensors:0.75", "-o", "d.safetensors"]);
    assert!(copied.err.contains("[repeated-adapter]"), "{}", copied.err);
    place.ok(&["diff", "a.safetensors", "d.safetensors"]);
}

#[test]
fn a_sum_is_the_sum_of_its_parts() {
    let place = two();
    place.ok(&["compose", "a.safetensors:0.5", "b.safetensors:-2", "--to", "kohya", "-o", "ab.safetensors"]);
    place.ok(&["convert", "a.safetensors", "--to", "diffusers", "--strength", "0.5", "-o", "a2.safetensors"]);
    place.ok(&["convert", "b.safetensors", "--to", "bfl", "--strength", "-2", "-o", "b2.safetensors"]);
    place.ok(&["compose", "b2.safetensors", "a2.safetensors", "-o", "sum.safetensors"]);
    place.ok(&["diff", "ab.safetensors", "sum.safetensors"]);
    // What was added can be taken away again.
    place.ok(&["compose", "ab.safetensors", "b.safetensors:2", "-o", "rest.safetensors"]);
    place.ok(&["diff", "rest.safetensors", "a2.safetensors"]);
    assert_eq!(place.run(&["diff", "ab.safetensors", "a2.safetensors"]).code, 1);
}

#[test]
fn strengths_as_people_write_them() {
    let place = two();
    place.write("odd:0.5", &place.read("b.safetensors"));
    let strengths = |sources: &[&str]| {
        let report = place.ok(&[&["compose", "-o", "c.safetensors", "-n", "--json"], sources].concat()).json();
        report["sources"].as_array().unwrap().iter().map(|s| s["strength"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(strengths(&["a.safetensors", "b.safetensors:-1"]), [json!(1.0), json!(-1.0)]);
    assert_eq!(strengths(&["a.safetensors:+.5", "b.safetensors:1e-3"]), [json!(0.5), json!(0.001)]);
    // A name that exists as it is written wins.
    assert_eq!(strengths(&["odd:0.5", "odd:0.5:2"]), [json!(1.0), json!(2.0)]);
}

#[test]
fn strengths_by_place() {
    let place = two();
    let compose = |out: &str, args: &[&str]| place.ok(&[&["compose", "a.safetensors", "-o", out], args].concat());
    let scaled = |modules: &[&str], out: &str| {
        let diff = place.run(&["diff", "a.safetensors", out, "--json"]).json();
        let named: Vec<String> = diff["differences"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| format!("{} {:.2}", d["module"].as_str().unwrap(), d["relative_error"].as_f64().unwrap()))
            .collect();
        assert!(named.len() == modules.len() && modules.iter().all(|m| named.iter().any(|n| n == m)), "{named:?}");
    };
    compose("te.safetensors", &["--text-encoder-strength", "0.5"]);
    let te = "text_encoder.text_model.encoder.layers.0.mlp.fc1 0.50";
    scaled(&[te], "te.safetensors");
    compose("component.safetensors", &["--component", "text_encoder=0.5"]);
    scaled(&[te], "component.safetensors");
    compose("block.safetensors", &["--block", "**.ff=0.5", "--block", "transformer_blocks.0.attn.to_q=-1"]);
    let ff = "transformer.transformer_blocks.0.ff.net.0.proj 0.50";
    scaled(&[ff, "transformer.transformer_blocks.0.attn.to_q 2.00"], "block.safetensors");

    let odd = place.ok(&["compose", "a.safetensors", "-o", "x.safetensors", "--block", "nothing.at.all=2"]);
    assert!(odd.err.contains("[unmatched-selector] `nothing.at.all` matches no module"), "{}", odd.err);
    let off = place.ok(&["compose", "a.safetensors", "b.safetensors:0", "-o", "y.safetensors"]);
    assert!(off.err.contains("[zero-strength]"), "{}", off.err);
    place.ok(&["diff", "a.safetensors", "y.safetensors"]);
}

#[test]
fn every_source_is_told_once_for_each_strength() {
    let place = two();
    let verbose = place.ok(&["compose", "a.safetensors:0.8", "b.safetensors", "-o", "c.safetensors", "-v"]);
    let lines: Vec<&str> = verbose.out.lines().collect();
    assert_eq!(lines[1..], ["  0.8  a.safetensors", "    1  b.safetensors"]);
    let places = ["--text-encoder-strength", "0.5", "--block", "**.ff=2", "--force", "-v"];
    let placed = place.ok(&[&["compose", "a.safetensors", "-o", "c.safetensors"] as &[&str], &places].concat());
    assert!(placed.out.contains("  1  a.safetensors (text encoders 0.5, **.ff x2)\n"), "{}", placed.out);
}

#[test]
fn the_report_has_all_sources() {
    let place = two();
    let args = ["compose", "a.safetensors:0.5", "b.safetensors", "a.safetensors", "-o", "c.safetensors", "--json"];
    let report = place.ok(&args).json();
    let sources = report["sources"].as_array().unwrap();
    let told: Vec<(&Value, &Value, &Value)> =
        sources.iter().map(|s| (&s["path"], &s["name"], &s["strength"])).collect();
    let (a, b) = (json!("a.safetensors"), json!("b.safetensors"));
    let (half, one) = (json!(0.5), json!(1.0));
    assert_eq!(told, [(&a, &json!("a"), &half), (&b, &json!("b"), &one), (&a, &json!("a"), &one)]);
    let hash = |n: usize| sources[n]["sha256"].as_str().unwrap();
    assert!(hash(0).len() == 64 && hash(0) == hash(2) && hash(0) != hash(1));
    assert_eq!(report["source"]["sha256"], hash(0));
    assert_eq!(
        (&report["target"]["path"], &report["target"]["dialect"]),
        (&json!("c.safetensors"), &json!("diffusers"))
    );
    assert_eq!(codes(&report), ["repeated-adapter"]);
    adds_up(&report);
    // One that is left out is counted so.
    let off = place.ok(&["compose", "a.safetensors", "b.safetensors:0", "-o", "d.safetensors", "--json"]).json();
    assert!(off["tensors"]["dropped"].as_u64().unwrap() > 0, "{off}");
    adds_up(&off);
}

#[test]
fn a_dry_run_writes_nothing() {
    let place = two();
    let plan = place.ok(&["compose", "a.safetensors", "b.safetensors:2", "-o", "c.safetensors", "-n", "--json"]).json();
    assert_eq!((&plan["dry_run"], &plan["target"]["planned"]), (&json!(true), &json!("c.safetensors")));
    assert_eq!(plan["target"]["path"], Value::Null);
    let text = place.ok(&["compose", "a.safetensors", "b.safetensors:2", "-o", "c.safetensors", "-n", "-v"]).out;
    assert!(text.starts_with("would write c.safetensors  (2 adapters -> diffusers, "), "{text}");
    assert!(text.contains("  2  b.safetensors\n") && text.contains("F32 [5, 3072]"), "{text}");
    assert_eq!(place.names(), ["a.safetensors", "b.safetensors"]);
    let done = place.ok(&["compose", "a.safetensors", "b.safetensors:2", "-o", "c.safetensors", "--json"]).json();
    assert_eq!(plan["target"]["bytes"], done["target"]["bytes"]);
    assert_eq!(plan["sources"], done["sources"]);
}

#[test]
fn pipes_on_both_ends() {
    let place = two();
    place.ok(&["compose", "a.safetensors:0.5", "b.safetensors", "-o", "c.safetensors"]);
    let piped = place
        .command(&["compose", "-:0.5", "b.safetensors", "-o", "-"])
        .write_stdin(place.read("a.safetensors"))
        .output()
        .unwrap();
    assert!(piped.status.success());
    assert!(String::from_utf8_lossy(&piped.stderr).starts_with("wrote -  (2 adapters -> "));
    place.write("d.safetensors", &piped.stdout);
    place.ok(&["diff", "c.safetensors", "d.safetensors", "--tolerance", "0"]);
    let twice = ran(place.command(&["compose", "-", "-:2", "-o", "e.safetensors", "--json"]).write_stdin(tiny()));
    assert_eq!((twice.code, twice.error_code().as_str()), (2, "invalid-argument"));
    let both = place.run(&["compose", "a.safetensors", "-o", "-", "--json"]);
    assert_eq!((both.code, both.error_code().as_str()), (2, "invalid-argument"));
}

#[test]
fn what_cannot_be_composed() {
    let place = two();
    let run = |args: &[&str]| {
        let ran = place.run(&[&["compose", "-o", "c.safetensors", "--json"], args].concat());
        assert_eq!(ran.code, 2, "{args:?}");
        ran
    };
    let code = |args: &[&str]| run(args).error_code();
    for number in ["nan", "inf", "-inf"] {
        let source = format!("b.safetensors:{number}");
        let error = run(&["a.safetensors", &source]).json();
        assert_eq!(
            (&error["error"]["code"], &error["error"]["path"]),
            (&json!("invalid-argument"), &json!("b.safetensors"))
        );
    }
    assert_eq!(code(&["a.safetensors", "--text-encoder-strength", "nan"]), "invalid-argument");
    assert_eq!(code(&["a.safetensors", "--block", "**.ff=inf"]), "invalid-argument");
    assert_eq!(code(&["a.safetensors", "--block", "a..b=1"]), "invalid-argument");
    assert_eq!(code(&["a.safetensors", "--block", "1"]), "invalid-argument");
    assert_eq!(code(&["a.safetensors", "--component", "vae=1"]), "invalid-argument");
    assert_eq!(code(&["a.safetensors", "--component", "=1"]), "invalid-argument");
    assert_eq!(code(&["a.safetensors", "--to", "nowhere"]), "invalid-argument");
    assert_eq!(code(&[]), "invalid-argument");
    assert_eq!(code(&["a.safetensors", "gone.safetensors:2"]), "not-found");
    assert_eq!(code(&["a.safetensors:0", "b.safetensors:0"]), "no-modules");
    // A comma is no number: what was meant is said.
    let comma = run(&["a.safetensors:0,8"]);
    assert!(comma.out.contains("`0,8` is no number") && comma.out.contains("a.safetensors:0.8"), "{}", comma.out);
    assert!(run(&["a.safetensors:"]).out.contains("no number follows the colon"));
    assert!(run(&["a.safetensors:0.5:2"]).out.contains("two numbers follow the name"));
    std::fs::create_dir(place.path("folder")).unwrap();
    assert_eq!(code(&["a.safetensors", "folder"]), "is-a-directory");
    let folders = [&["--recipe", "folder", "-o", "c.safetensors"], &["a.safetensors", "--force", "-o", "folder"]];
    for args in folders {
        let ran = place.run(&[&["compose"] as &[&str], args].concat());
        assert!(ran.code == 2 && ran.err.contains("hint: name ") && !ran.err.contains("--"), "{}", ran.err);
    }
    place.write("chroma.safetensors", &module("lora_unet_distilled_guidance_layer_layers_0_in_layer", &[]));
    let family = place.run(&["compose", "a.safetensors", "chroma.safetensors", "-o", "c.safetensors"]);
    assert_eq!(family.code, 2);
    assert_eq!(place.names(), ["a.safetensors", "b.safetensors", "chroma.safetensors", "folder"]);
}

#[test]
fn outputs_are_never_inputs_and_never_replaced() {
    let place = two();
    let code = |args: &[&str]| place.run(&[&["compose", "a.safetensors", "b.safetensors", "--json"], args].concat());
    assert_eq!(code(&["-o", "b.safetensors", "--force"]).error_code(), "same-file");
    assert_eq!(code(&["-o", "./a.safetensors", "-n"]).error_code(), "same-file");
    place.write("recipe.json", br#"["a.safetensors"]"#);
    assert_eq!(code(&["--recipe", "recipe.json", "-o", "recipe.json", "--force"]).error_code(), "same-file");
    assert_eq!(code(&["-o", "no/such/folder/c.safetensors"]).error_code(), "not-found");
    place.ok(&["compose", "a.safetensors", "-o", "c.safetensors"]);
    let before = place.read("c.safetensors");
    assert_eq!(code(&["-o", "c.safetensors"]).error_code(), "output-exists");
    assert_eq!(place.read("c.safetensors"), before);
    assert_eq!(codes(&code(&["-o", "c.safetensors", "-n"]).json()), ["output-exists"]);
    place.ok(&["compose", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--force"]);
    assert_ne!(place.read("c.safetensors"), before);
}

#[test]
fn warnings_can_be_the_answer() {
    let place = two();
    let repeated = ["compose", "a.safetensors", "a.safetensors", "-o", "c.safetensors"];
    assert_eq!(place.run(&[&repeated as &[&str], &["--strict"]].concat()).code, 1);
    assert!(place.exists("c.safetensors"));
    let quiet = place.ok(&[&repeated as &[&str], &["-q", "--force"]].concat());
    assert_eq!((quiet.out.as_str(), quiet.err.as_str()), ("", ""));
    place.ok(&["compose", "a.safetensors", "b.safetensors", "-o", "d.safetensors", "--strict"]);
}

#[test]
fn options_reach_the_engine() {
    let place = two();
    let mut tensors = factors(crate::common::MODULE, &[]);
    tensors.push(("what.is.this".to_owned(), vec![1], 1.0));
    place.write("odd.safetensors", &file(&[], &crate::common::borrowed(&tensors)));
    let compose = |args: &[&str]| {
        place.run(
            &[&["compose", "a.safetensors", "odd.safetensors", "-o", "c.safetensors", "--force", "--json"], args]
                .concat(),
        )
    };
    assert_eq!(compose(&[]).error_code(), "unknown-key");
    assert_eq!(compose(&["--unknown", "keep"]).json()["tensors"]["carried"], 1);
    assert_eq!(compose(&["--unknown", "drop", "--to", "xlabs"]).error_code(), "unsupported-module");
    let lossy = compose(&["--unknown", "drop", "--to", "xlabs", "--lossy", "allow"]).json();
    assert_eq!((&lossy["fidelity"], &lossy["target"]["dialect"]), (&json!("approximate"), &json!("xlabs")));
    let half = compose(&["--unknown", "drop", "--dtype", "bf16", "-n"]).json();
    assert!(half["plan"]["tensors"].as_array().unwrap().iter().all(|t| t["dtype"] == "BF16"), "{half}");
    assert_eq!(compose(&["--unknown", "drop", "--family", "chroma"]).error_code(), "unknown-family");
    place.ok(&["compose", "a.safetensors", "b.safetensors", "--to", "peft", "-o", "folder"]);
    assert_eq!(crate::common::names(&place.path("folder")), ["adapter_config.json", "adapter_model.safetensors"]);
    place.ok(&["compose", "folder", "b.safetensors:-1", "-o", "a2.safetensors"]);
    place.ok(&["diff", "a.safetensors", "a2.safetensors"]);
}

#[test]
fn adapters_for_two_experts_are_told_apart_by_their_names() {
    let place = Place::new();
    for name in ["style_high_noise", "style_low_noise"] {
        let out = format!("{name}.safetensors");
        place.ok(&["sample", "--family", "wan-1.3b", "--dialect", "comfyui", "--rank", "1", "-o", &out]);
    }
    let (high, low) = ("style_high_noise.safetensors", "style_low_noise.safetensors");
    let mixed = place.ok(&["compose", high, low, "-o", "m.safetensors", "--json"]).json();
    assert!(codes(&mixed).contains(&"mixed-experts"), "{mixed}");
    let alone = place.ok(&["compose", high, "-o", "h.safetensors", "--json"]).json();
    assert!(!codes(&alone).contains(&"mixed-experts"), "{alone}");
}
