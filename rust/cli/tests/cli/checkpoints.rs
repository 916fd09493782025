//! Fusing adapters into a base, back again, and out of two checkpoints; a toy family keeps it quick.

use crate::common::{Place, adds_up, codes, file};

const TABLES: [&str; 4] = ["--table", "toy.toml", "--table", "toy-fused.toml"];

fn place() -> Place {
    let place = Place::new();
    for (name, text) in [
        ("toy.toml", include_str!("../../../fuzz/tables/toy.toml")),
        ("toy-fused.toml", include_str!("../../../fuzz/tables/toy-fused.toml")),
    ] {
        place.write(name, text.as_bytes());
    }
    place.write("base.safetensors", &base(1.0));
    place.write(
        "lora.safetensors",
        &file(
            &[],
            &[
                ("toy_model.layers.0.qkv.lora_up.weight", &[24, 1], 0.5),
                ("toy_model.layers.0.qkv.lora_down.weight", &[1, 8], 2.0),
                ("toy_model.layers.0.qkv.alpha", &[], 1.0),
            ],
        ),
    );
    place
}

/// Float32 weights, all of one number.
fn base(number: f32) -> Vec<u8> {
    file(
        &[("format", "pt")],
        &[("layers.0.qkv.weight", &[24, 8], number), ("layers.1.qkv.weight", &[24, 8], 3.0), ("other", &[2], 7.0)],
    )
}

impl Place {
    fn toy(&self, args: &[&str]) -> crate::common::Ran {
        self.run(&[args, &TABLES[..]].concat())
    }

    /// The first number of the last tensors' bytes: every body here ends with float32.
    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.read(name);
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

#[test]
fn fused_and_back() {
    let place = place();
    let ran = place.toy(&[
        "fuse",
        "base.safetensors",
        "lora.safetensors:0.5",
        "-o",
        "out.safetensors",
        "--undo",
        "undo.safetensors",
        "--json",
    ]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let report = ran.json();
    assert_eq!((&report["schema"], &report["modules"]), (&1.into(), &3.into()));
    adds_up(&report);
    assert_eq!(report["fused"][0]["key"], "layers.0.qkv.weight");
    assert_eq!(report["fused"][0]["gain"], 1.0);
    assert_eq!(report["fused"][0]["err"], 0.0);
    // 1 + 0.5 * 0.5 * 2 in every changed number, in the place that the tensor had.
    let (before, after) = (place.floats("base.safetensors"), place.floats("out.safetensors"));
    let changed = after.iter().filter(|v| **v == 1.5).count();
    assert_eq!((changed, before.len()), (192, after.len()));
    assert!(before.iter().zip(&after).all(|(b, a)| b == a || (*b, *a) == (1.0, 1.5)));
    let again = place.toy(&["fuse", "base.safetensors", "lora.safetensors:0.5", "-o", "out.safetensors"]);
    assert_eq!(again.code, 2, "an output is not replaced: {again:?}");
    let back = place.toy(&["unfuse", "out.safetensors", "--undo", "undo.safetensors", "-o", "back.safetensors"]);
    assert_eq!(back.code, 0, "{back:?}");
    assert_eq!(place.read("back.safetensors"), place.read("base.safetensors"));
    let wrong =
        place.toy(&["unfuse", "base.safetensors", "--undo", "undo.safetensors", "-o", "x.safetensors", "--json"]);
    assert_eq!((wrong.code, wrong.error_code().as_str()), (2, "wrong-undo"));
    assert!(!place.exists("x.safetensors"));
}

#[test]
fn a_dry_run_writes_nothing() {
    let place = place();
    let names = place.names();
    let ran = place.toy(&[
        "fuse",
        "base.safetensors",
        "lora.safetensors",
        "-o",
        "out.safetensors",
        "-n",
        "--json",
        "--undo",
        "u.safetensors",
    ]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let report = ran.json();
    assert_eq!(report["dry_run"], true);
    assert!(report["gain"].is_null() && report["target"]["path"].is_null());
    assert_eq!(place.names(), names);
}

#[test]
fn outputs_that_are_inputs() {
    let place = place();
    for (out, undo) in
        [("base.safetensors", "u"), ("lora.safetensors", "u"), ("out", "base.safetensors"), ("out", "out")]
    {
        let before = (place.read("base.safetensors"), place.read("lora.safetensors"));
        let ran = place.toy(&[
            "fuse",
            "base.safetensors",
            "lora.safetensors",
            "-o",
            out,
            "--undo",
            undo,
            "--force",
            "--json",
        ]);
        assert_eq!((ran.code, ran.error_code().as_str()), (2, "same-file"), "{out} {undo}");
        assert_eq!(before, (place.read("base.safetensors"), place.read("lora.safetensors")));
    }
}

#[test]
fn shards_keep_their_layout() {
    let place = place();
    place.write("m/transformer/config.json", b"{}");
    place.write("m/transformer/d-00001-of-00002.safetensors", &file(&[], &[("layers.0.qkv.weight", &[24, 8], 1.0)]));
    place.write("m/transformer/d-00002-of-00002.safetensors", &file(&[], &[("layers.1.qkv.weight", &[24, 8], 3.0)]));
    place.write("m/transformer/d.fp16.safetensors", &file(&[], &[("layers.1.qkv.weight", &[24, 8], 3.0)]));
    let index = r#"{"metadata": {"total_size": 1536}, "weight_map": {"layers.0.qkv.weight": "d-00001-of-00002.safetensors",
        "layers.1.qkv.weight": "d-00002-of-00002.safetensors"}}"#;
    place.write("m/transformer/d.safetensors.index.json", index.as_bytes());
    place.write("m/vae/weights.safetensors", b"of something else");
    place.write("m/model_index.json", b"{}");
    let ran = place.toy(&["fuse", "m", "lora.safetensors", "-o", "out", "--undo", "undo.safetensors", "--json"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let report = ran.json();
    assert_eq!((&report["target"]["rewritten"], &report["target"]["copied"]), (&1.into(), &1.into()));
    assert_eq!(codes(&report), ["not-copied"]);
    for same in [
        "transformer/config.json",
        "transformer/d-00002-of-00002.safetensors",
        "transformer/d.safetensors.index.json",
        "vae/weights.safetensors",
        "model_index.json",
    ] {
        assert_eq!(place.read(&format!("out/{same}")), place.read(&format!("m/{same}")), "{same}");
    }
    assert!(!place.exists("out/transformer/d.fp16.safetensors"));
    assert!(place.floats("out/transformer/d-00001-of-00002.safetensors").iter().all(|v| *v == 2.0));
    let back = place.toy(&["unfuse", "out", "--undo", "undo.safetensors", "-o", "back"]);
    assert_eq!(back.code, 0, "{back:?}");
    let first = "transformer/d-00001-of-00002.safetensors";
    assert_eq!(place.read(&format!("back/{first}")), place.read(&format!("m/{first}")));
    let inside = place.toy(&["fuse", "m", "lora.safetensors", "-o", "m/out", "--json"]);
    assert_eq!(inside.error_code(), "same-file");
    let there = place.toy(&["fuse", "m", "lora.safetensors", "-o", "back", "--json"]);
    assert_eq!(there.error_code(), "output-exists");
}

#[test]
fn extracted_from_two_checkpoints() {
    let place = place();
    place.write("tuned.safetensors", &base(1.25));
    let run = |more: &[&str]| place.toy(&[&["extract", "tuned.safetensors", "base.safetensors"], more].concat());
    let ran = run(&["--rank", "2", "--to", "toy-fused", "-o", "lora2.safetensors", "--json"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    let report = ran.json();
    assert_eq!(report["extract"]["modules"][0]["module"], "transformer.layers.0.qkv");
    assert!(report["extract"]["modules"][0]["relative_error"].as_f64().unwrap() < 1e-6);
    assert_eq!(report["extract"]["unchanged"], 1);
    // Fused again it is the tuned one.
    let fused = place.toy(&["fuse", "base.safetensors", "lora2.safetensors", "-o", "again.safetensors"]);
    assert_eq!(fused.code, 0, "{fused:?}");
    let (tuned, again) = (place.floats("tuned.safetensors"), place.floats("again.safetensors"));
    assert!(tuned.iter().zip(&again).all(|(t, a)| (t - a).abs() < 1e-6));
    assert_eq!(run(&["-o", "x.safetensors", "--to", "toy-fused", "--json"]).error_code(), "rank-needed");
    let same = place.toy(&[
        "extract",
        "base.safetensors",
        "base.safetensors",
        "--rank",
        "2",
        "--to",
        "toy-fused",
        "-o",
        "x.safetensors",
        "--json",
    ]);
    assert_eq!(same.error_code(), "no-modules");
    assert!(!place.exists("x.safetensors"));
}
