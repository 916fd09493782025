use serde_json::Value;

use crate::common::{MODULE, Place, adds_up, borrowed, factors, file};

#[test]
fn report_of_a_conversion() {
    let place = Place::with_x();
    let report = place.ok(&["convert", "x.safetensors", "--to", "diffusers", "--json"]).json();
    assert_eq!(report["schema"], 1);
    let source = &report["source"];
    assert_eq!((&source["path"], &source["dialect"]), (&"x.safetensors".into(), &"kohya".into()));
    assert_eq!((&source["family"], &source["kind"]), (&"flux1".into(), &"lora".into()));
    assert_eq!(source["sha256"].as_str().map(str::len), Some(64));
    let target = &report["target"];
    assert_eq!((&target["path"], &target["dialect"]), (&"x.diffusers.safetensors".into(), &"diffusers".into()));
    assert_eq!(target["bytes"], place.read("x.diffusers.safetensors").len());
    assert_eq!((&report["tensors"]["in"], &report["modules"]), (&3.into(), &1.into()));
    assert_eq!((&report["fidelity"], &report["max_relative_error"]), (&"rescaled".into(), &0.0.into()));
    assert!(report["warnings"].is_array() && report["seconds"].is_f64());
    adds_up(&report);
}

#[test]
fn hash_is_that_of_the_file() {
    use sha2::{Digest, Sha256};
    let place = Place::with_x();
    let report = place.ok(&["convert", "x.safetensors", "--to", "bfl", "--json"]).json();
    let want: String = Sha256::digest(place.read("x.safetensors")).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(report["source"]["sha256"], want);
}

#[test]
fn tensors_are_all_accounted_for() {
    let place = Place::new();
    let mut tensors = factors(MODULE, &[]);
    tensors.extend(factors("lora_te3_encoder_block_0_layer_0_SelfAttention_q", &[]).into_iter().map(
        |(key, _, value)| {
            let shape = if key.contains("down") { vec![1, 4096] } else { vec![4096, 1] };
            (key, shape, value)
        },
    ));
    tensors.push(("some.other.key".to_owned(), vec![3], 1.0));
    place.write("x.safetensors", &file(&[], &borrowed(&tensors)));
    let convert = |unknown: &str, out: &str| {
        place.ok(&["convert", "x.safetensors", "--to", "diffusers", "--unknown", unknown, "-o", out, "--json"]).json()
    };
    let kept = convert("keep", "kept.safetensors");
    adds_up(&kept);
    assert_eq!((&kept["tensors"]["used"], &kept["tensors"]["carried"]), (&2.into(), &3.into()));
    let dropped = convert("drop", "dropped.safetensors");
    adds_up(&dropped);
    assert_eq!(dropped["tensors"]["dropped"], 1);
    assert_eq!(dropped["fidelity"], "approximate");
    let codes: Vec<&str> =
        dropped["warnings"].as_array().unwrap().iter().map(|w| w["code"].as_str().unwrap()).collect();
    assert!(codes.contains(&"unknown-key") && codes.contains(&"carried-component"), "{codes:?}");
}

#[test]
fn one_file_is_an_object_and_many_are_an_array() {
    let place = Place::with_x();
    place.write("y.safetensors", &place.read("x.safetensors"));
    for command in ["inspect", "detect", "check"] {
        let one = place.ok(&[command, "x.safetensors", "--json"]).json();
        assert_eq!((&one["schema"], &one["path"]), (&1.into(), &"x.safetensors".into()), "{command}");
        let many = place.ok(&[command, "y.safetensors", "x.safetensors", "--json"]).json();
        let paths: Vec<&str> = many.as_array().unwrap().iter().map(|d| d["path"].as_str().unwrap()).collect();
        assert_eq!(paths, ["y.safetensors", "x.safetensors"], "{command}");
        assert!(place.ok(&[command, "-r", ".", "--json"]).json().is_array(), "{command}");
    }
}

#[test]
fn a_failed_file_is_an_element_of_the_array() {
    let place = Place::with_x();
    let ran = place.run(&["inspect", "gone.safetensors", "x.safetensors", "--json"]);
    assert_eq!(ran.code, 3);
    let many = ran.json();
    assert_eq!((&many[0]["path"], &many[0]["error"]["code"]), (&"gone.safetensors".into(), &"not-found".into()));
    assert_eq!(many[1]["family"], "flux1");
    let none = place.run(&["inspect", "gone.safetensors", "away.safetensors", "--json"]);
    assert_eq!((none.code, none.json().as_array().unwrap().len()), (2, 2));
}

#[test]
fn usage_errors_are_json_too() {
    let place = Place::with_x();
    for args in [
        &["convert", "x.safetensors", "--json"] as &[&str],
        &["--json", "convert", "x.safetensors", "--to", "kohya", "--dtype", "int4"],
        &["nothing", "--json"],
        &["--json"],
        &["convert", "x.safetensors", "--to", "nowhere", "--json"],
        &["inspect", "x.safetensors", "--family", "nothing", "--json"],
        &["convert", "x.safetensors", "--to", "kohya", "--strength", "nan", "--json"],
        &["convert", "x.safetensors", "--to", "kohya", "-o", "-", "--json"],
        &["diff", "x.safetensors", "x.safetensors", "--tolerance", "-1", "--json"],
    ] {
        let ran = place.run(args);
        assert_eq!(ran.code, 2, "{args:?}");
        assert_eq!(ran.error_code(), "invalid-argument", "{args:?}");
    }
    let misspelled = place.run(&["convert", "x.safetensors", "--too", "kohya", "--json"]).json();
    assert!(misspelled["error"]["hint"].as_str().unwrap().contains("'--to'"), "{misspelled}");
}

#[test]
fn dry_run_tells_the_plan() {
    let place = Place::with_x();
    let plan = place.ok(&["convert", "x.safetensors", "--to", "diffusers", "-n", "--json"]).json();
    assert_eq!((&plan["target"]["path"], &plan["dry_run"]), (&Value::Null, &true.into()));
    assert_eq!(plan["target"]["planned"], "x.diffusers.safetensors");
    let tensors = plan["plan"]["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 2);
    assert_eq!(tensors[0]["key"], "transformer.transformer_blocks.0.norm1.linear.lora_A.weight");
    assert_eq!((&tensors[0]["dtype"], &tensors[0]["shape"]), (&"F32".into(), &serde_json::json!([1, 3072])));
    adds_up(&plan);
    let done = place.ok(&["convert", "x.safetensors", "--to", "diffusers", "--json"]).json();
    assert_eq!(plan["target"]["bytes"], done["target"]["bytes"]);
    assert_eq!(plan["source"], done["source"]);
}

#[test]
fn formats_hold_the_tables() {
    let formats = Place::new().ok(&["formats", "--json"]).json();
    let dialect = |name: &str| {
        let found = formats["dialects"].as_array().unwrap().iter().find(|d| d["name"] == name);
        found.unwrap_or_else(|| panic!("{name}")).clone()
    };
    let kohya = dialect("kohya");
    assert_eq!((&kohya["families"]["flux1"], &kohya["alpha"]), (&"both".into(), &"tensor".into()));
    assert!(kohya["aliases"].as_array().unwrap().contains(&"civitai".into()));
    assert_eq!(kohya["spelling"]["down"], ".lora_down.weight");
    assert_eq!(dialect("bfl")["families"]["wan"], "read");
    let rows = &formats["families"][0]["components"][0]["rows"];
    assert_eq!(rows[0]["op"], "fuse");
    assert_eq!(rows[0]["names"]["original"], "double_blocks.{double}.img_attn.qkv");
    // A family in several sizes is several entries, told apart by `variant`.
    let families = formats["families"].as_array().unwrap();
    let sizes: Vec<&str> =
        families.iter().filter(|f| f["name"] == "wan").map(|f| f["variant"].as_str().unwrap()).collect();
    assert_eq!(sizes, ["14b", "5b", "1.3b"]);
    assert!(families[0]["variant"].is_null());
    let programs = formats["programs"].as_array().unwrap();
    let rules = programs.iter().find(|p| p["name"] == "sd-scripts").unwrap()["rules"].as_array().unwrap();
    let told = |field: &str| rules.iter().all(|r| r[field].as_str().is_some_and(|text| !text.is_empty()));
    assert!(told("answer") && told("source"), "{rules:?}");
}

#[test]
fn the_size_of_a_family_is_a_field_of_its_own() {
    let place = Place::new();
    let key = |suffix: &str| format!("diffusion_model.blocks.0.self_attn.q.{suffix}");
    let tensors = [(key("lora_down.weight"), vec![1, 1536], 0.25), (key("lora_up.weight"), vec![1536, 1], 0.5)];
    place.write("w.safetensors", &file(&[], &borrowed(&tensors)));
    for command in ["detect", "inspect"] {
        let seen = place.ok(&[command, "w.safetensors", "--json"]).json();
        assert_eq!((&seen["family"], &seen["variant"]), (&"wan".into(), &"1.3b".into()), "{command}");
    }
    assert_eq!(place.ok(&["detect", "w.safetensors"]).out, "w.safetensors\tcomfyui\twan\t100%\n");
    assert!(place.ok(&["inspect", "w.safetensors"]).out.contains("family wan 1.3b"));
}

#[test]
fn differences_and_checks() {
    let place = Place::with_x();
    place.ok(&["convert", "x.safetensors", "--to", "diffusers"]);
    let same = place.ok(&["diff", "x.safetensors", "x.diffusers.safetensors", "--json"]).json();
    assert_eq!((&same["schema"], &same["equal"], &same["modules"]), (&1.into(), &true.into(), &1.into()));
    place.ok(&["convert", "x.safetensors", "--to", "kohya", "--strength", "-0.5"]);
    let ran = place.run(&["diff", "x.safetensors", "x.kohya.safetensors", "--json"]);
    assert_eq!((ran.code, &ran.json()["differences"][0]["state"]), (1, &"differs".into()));
    let check = place.ok(&["check", "x.safetensors", "--json"]).json();
    assert_eq!((&check["ok"], &check["tensors"], &check["modules"]), (&true.into(), &3.into(), &1.into()));
}
