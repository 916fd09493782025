use serde_json::json;

use crate::common::{MODULE, Place, adapter, adds_up, borrowed, codes, factors, file, ran};

fn one() -> Place {
    let place = Place::new();
    place.write("a.safetensors", &adapter(2, 0.25));
    place
}

#[test]
fn scaling_keeps_the_dialect() {
    let place = one();
    let ran = place.ok(&["scale", "a.safetensors", "--strength", "0.5", "-o", "s.safetensors"]);
    assert!(ran.out.starts_with("wrote s.safetensors  (kohya -> kohya, flux1, "), "{}", ran.out);
    assert!(ran.out.contains(", rescaled, "), "{}", ran.out);
    assert!(place.ok(&["detect", "s.safetensors"]).out.contains("\tkohya\t"));
    place.ok(&["convert", "a.safetensors", "--to", "diffusers", "--strength", "0.5", "-o", "c.safetensors"]);
    place.ok(&["diff", "s.safetensors", "c.safetensors"]);
    // Factors multiply.
    place.ok(&["scale", "s.safetensors", "--strength", "-2", "-o", "t.safetensors"]);
    place.ok(&["compose", "a.safetensors", "t.safetensors", "-o", "nothing.safetensors"]);
    place.ok(&["convert", "a.safetensors", "--to", "kohya", "--strength", "0", "-o", "zero.safetensors"]);
    place.ok(&["diff", "nothing.safetensors", "zero.safetensors"]);
    let other = place.ok(&["scale", "a.safetensors", "--strength", "0.5", "--to", "bfl", "-o", "b.safetensors"]);
    assert!(other.out.contains("kohya -> bfl"), "{}", other.out);
    place.ok(&["diff", "s.safetensors", "b.safetensors"]);
}

#[test]
fn places_are_scaled_by_themselves() {
    let place = one();
    let scale = |out: &str, args: &[&str]| place.ok(&[&["scale", "a.safetensors", "-o", out, "--json"], args].concat());
    let report = scale("s.safetensors", &["--text-encoder-strength", "0.5", "--block", "**.ff=0"]).json();
    assert_eq!(codes(&report), ["zero-strength"]);
    adds_up(&report);
    place.ok(&[
        "compose",
        "a.safetensors",
        "--text-encoder-strength",
        "0.5",
        "--block",
        "**.ff=0",
        "-o",
        "c.safetensors",
    ]);
    place.ok(&["diff", "s.safetensors", "c.safetensors"]);
    let component = scale("t.safetensors", &["--component", "text_encoder=0.5"]).json();
    assert_eq!((&component["sources"][0]["name"], component["sources"][0].get("strength")), (&json!("a"), None));
    assert_eq!(component["sources"][0]["sha256"], component["source"]["sha256"]);
}

#[test]
fn notes_about_the_scale_do_not_outlive_it() {
    let place = Place::new();
    let tensors = factors(MODULE, &[("alpha", &[], 4.0)]);
    let metadata = [("ss_network_alpha", "4"), ("ss_network_dim", "1"), ("ss_tag", "x")];
    place.write("a.safetensors", &file(&metadata, &borrowed(&tensors)));
    place.ok(&["scale", "a.safetensors", "--strength", "0.5", "-o", "s.safetensors", "--strict"]);
    let seen = place.ok(&["inspect", "s.safetensors", "--json"]).json();
    assert_eq!((&seen["metadata"], &seen["warnings"]), (&json!({"format": "pt", "ss_tag": "x"}), &json!([])));
    place.ok(&["convert", "a.safetensors", "--to", "kohya", "--strength", "0.5", "-o", "c.safetensors"]);
    place.ok(&["diff", "s.safetensors", "c.safetensors", "--tolerance", "0"]);
    // What was composed is not so any more, either.
    place.ok(&["compose", "a.safetensors", "s.safetensors", "-o", "both.safetensors"]);
    assert!(place.ok(&["inspect", "both.safetensors", "--meta"]).out.contains("lorafmt.composed="));
    place.ok(&["scale", "both.safetensors", "--strength", "2", "-o", "more.safetensors"]);
    assert!(!place.ok(&["inspect", "more.safetensors", "--meta"]).out.contains("lorafmt.composed"));
}

#[test]
fn the_dialect_must_be_one_that_can_be_written() {
    let place = one();
    place.ok(&["convert", "a.safetensors", "--to", "diffusers", "-o", "d.safetensors"]);
    let mut mixed = factors(MODULE, &[]);
    let other = |suffix: &str| format!("transformer.single_transformer_blocks.0.attn.to_q.{suffix}");
    mixed.push((other("lora_A.weight"), vec![1, 3072], 0.5));
    mixed.push((other("lora_B.weight"), vec![3072, 1], 0.5));
    place.write("mixed.safetensors", &file(&[], &borrowed(&mixed)));
    // Original names without a prefix are only read for this model.
    let bare = |suffix: &str| format!("blocks.0.self_attn.q.{suffix}");
    let read = [(bare("lora_A.weight"), vec![1, 5120], 0.5), (bare("lora_B.weight"), vec![5120, 1], 0.5)];
    place.write("read.safetensors", &file(&[], &borrowed(&read)));
    for name in ["mixed.safetensors", "read.safetensors"] {
        let args = ["scale", name, "--strength", "2", "-o", "s.safetensors"];
        let ran = place.run(&[&args as &[&str], &["--json"]].concat());
        assert_eq!((ran.code, ran.error_code().as_str()), (2, "unsupported-target"), "{name}");
        assert!(ran.out.contains("--to DIALECT"), "{}", ran.out);
        place.ok(&[&args as &[&str], &["--to", "diffusers", "--force"]].concat());
    }
}

#[test]
fn folders_pipes_and_dry_runs() {
    let place = one();
    place.ok(&["convert", "a.safetensors", "--to", "peft", "-o", "style"]);
    place.ok(&["scale", "style", "--strength", "0.5", "-o", "half"]);
    place.ok(&["scale", "a.safetensors", "--strength", "0.5", "-o", "s.safetensors"]);
    place.ok(&["diff", "half", "s.safetensors"]);
    let piped = place
        .command(&["scale", "-", "--strength", "0.5", "-o", "-", "-q"])
        .write_stdin(place.read("a.safetensors"))
        .output()
        .unwrap();
    assert!(piped.status.success() && piped.stdout == place.read("s.safetensors"));
    let before = place.names();
    let plan = place.ok(&["scale", "a.safetensors", "--strength", "2", "-o", "n.safetensors", "-n"]);
    assert!(plan.out.starts_with("would write n.safetensors  (kohya -> kohya, "), "{}", plan.out);
    assert_eq!(place.names(), before);
}

#[test]
fn what_cannot_be_scaled() {
    let place = one();
    place.write("s.safetensors", b"here already");
    let code = |args: &[&str]| {
        let ran = place.run(&[&["scale", "a.safetensors", "--json"], args].concat());
        assert_eq!(ran.code, 2, "{args:?}");
        ran.error_code()
    };
    assert_eq!(code(&["-o", "t.safetensors"]), "invalid-argument");
    assert_eq!(code(&["--strength", "2"]), "invalid-argument");
    assert_eq!(code(&["-o", "t.safetensors", "--strength", "nan"]), "invalid-argument");
    assert_eq!(code(&["-o", "t.safetensors", "--lora", "a=nan"]), "invalid-argument");
    assert_eq!(code(&["-o", "t.safetensors", "--lora", "a=2"]), "invalid-argument");
    assert_eq!(code(&["-o", "t.safetensors", "--strength", "0"]), "no-modules");
    assert_eq!(code(&["-o", "t.safetensors", "--component", "vae=2"]), "invalid-argument");
    assert_eq!(code(&["-o", "s.safetensors", "--strength", "2"]), "output-exists");
    assert_eq!(code(&["-o", "./a.safetensors", "--strength", "2", "--force"]), "same-file");
    assert_eq!(code(&["-o", "-", "--strength", "2"]), "invalid-argument");
    assert_eq!(code(&["-o", "t.safetensors", "--strength", "2", "--base", "a.safetensors"]), "invalid-base");
    let lora = place.run(&["scale", "a.safetensors", "--lora", "a=2", "-o", "t.safetensors"]);
    assert!(lora.err.contains("hint: `--block SELECTOR=S`"), "{}", lora.err);
    let missing = ran(&mut place.command(&["scale", "gone.safetensors", "--strength", "2", "-o", "t.safetensors"]));
    assert!(missing.code == 2 && missing.err.starts_with("error: gone.safetensors: "), "{}", missing.err);
    assert_eq!(place.names(), ["a.safetensors", "s.safetensors"]);
}
