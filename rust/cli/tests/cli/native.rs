//! Files for quantized models.

use serde_json::{Value, json};

use crate::base::Checkpoint;
use crate::common::{Place, adapter, adds_up, codes, file, names};

const TOLERANCE: [&str; 2] = ["--tolerance", "1e-2"];

/// Two adapters, a base, and both adapters behind it as `n.safetensors`.
fn behind(checkpoint: Checkpoint) -> Place {
    let place = Place::new();
    place.write("a.safetensors", &adapter(2, 0.25));
    place.write("b.safetensors", &adapter(3, -1.5));
    checkpoint.write(&place, "base.safetensors");
    let sources = ["compose", "a.safetensors:0.5", "b.safetensors:2"];
    let native = ["--to", "nunchaku", "--base", "base.safetensors", "-o", "n.safetensors", "-q"];
    place.ok(&[&sources as &[&str], &native].concat());
    place
}

/// The file with other metadata, or with none.
fn retold(place: &Place, name: &str, out: &str, tell: impl Fn(&mut Value) -> bool) {
    let bytes = place.read(name);
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let text = header["__metadata__"]["lorafmt.native"].as_str().unwrap();
    let mut told: Value = serde_json::from_str(text).unwrap();
    if tell(&mut told) {
        header["__metadata__"]["lorafmt.native"] = told.to_string().into();
    } else {
        header.as_object_mut().unwrap().remove("__metadata__");
    }
    let mut text = header.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    place.write(out, &[&(text.len() as u64).to_le_bytes(), text.as_slice(), &bytes[8 + length..]].concat());
}

fn strip(place: &Place, name: &str, out: &str) {
    retold(place, name, out, |_| false);
}

fn same(place: &Place, a: &str, b: &str, more: &[&str]) {
    place.ok(&[&["diff", a, b], &TOLERANCE as &[&str], more].concat());
}

#[test]
fn there_and_back() {
    let place = behind(Checkpoint::default());
    place.ok(&["compose", "a.safetensors:0.5", "b.safetensors:2", "-o", "want.safetensors"]);
    same(&place, "want.safetensors", "n.safetensors", &[]);
    same(&place, "want.safetensors", "n.safetensors", &["--base", "base.safetensors"]);
    let back = place.ok(&["convert", "n.safetensors", "--to", "diffusers", "-o", "back.safetensors", "--json"]).json();
    adds_up(&back);
    same(&place, "want.safetensors", "back.safetensors", &[]);
    // Nothing in the new file speaks of branches that it does not have.
    assert!(!place.ok(&["inspect", "back.safetensors", "--meta"]).out.contains("lorafmt.native"));
    // Both at once, as one more adapter.
    place.ok(&["compose", "n.safetensors", "b.safetensors:-2", "-o", "rest.safetensors"]);
    place.ok(&["convert", "a.safetensors", "--strength", "0.5", "--to", "kohya", "-o", "half.safetensors"]);
    same(&place, "half.safetensors", "rest.safetensors", &[]);
    for layout in ["aligned", "packed"] {
        let native = ["--to", "native", "--base", "base.safetensors", "--layout", layout, "--force", "-q"];
        let args = ["compose", "a.safetensors:0.5", "b.safetensors:2", "-o", "p.safetensors"];
        place.ok(&[&args as &[&str], &native].concat());
        same(&place, "want.safetensors", "p.safetensors", &[]);
    }
}

#[test]
fn what_is_merged_or_resized_is_packed_in_a_second_step() {
    let place = behind(Checkpoint::default());
    let native = ["--to", "nunchaku", "--base", "base.safetensors", "-o", "m.safetensors", "--force", "--json"];
    for how in [["--method", "svd", "--rank", "1"], ["--method", "ties", "--density", "1"]] {
        let adapters = ["compose", "a.safetensors:0.5", "b.safetensors:2"];
        let args = [&adapters as &[&str], &how].concat();
        place.ok(&[&args as &[&str], &["-o", "want.safetensors", "--force", "-q"]].concat());
        let report = place.ok(&[&args as &[&str], &native].concat()).json();
        adds_up(&report);
        // The text encoder's three tensors of each file go no further than they do without a first step.
        assert_eq!((&report["tensors"]["carried"], &report["tensors"]["used"]), (&json!(6), &json!(36)), "{how:?}");
        same(&place, "want.safetensors", "m.safetensors", &[]);
    }
    let report = place.ok(&[&["compose", "a.safetensors", "--rank", "1"] as &[&str], &native].concat()).json();
    assert_eq!(report["resize"]["modules"][0]["rank_after"], 1);
}

#[test]
fn inspect_tells_what_is_inside() {
    let place = behind(Checkpoint::default());
    insta::assert_snapshot!(place.ok(&["inspect", "n.safetensors"]).out);
    let inspect = |name: &str| place.ok(&["inspect", name, "--json"]).json()["native"].clone();
    let native = inspect("n.safetensors");
    assert_eq!((&native["base"], &native["precision"]), (&json!("base.safetensors"), &json!("int4")));
    assert_eq!((&native["layout"], &native["needs_base"]), (&json!("aligned"), &json!(false)));
    assert_eq!((&native["base_ranks"], &native["ranks"]["32"]), (&json!({"32": 12}), &json!(5)));
    let adapters = native["adapters"].as_array().unwrap();
    let told: Vec<_> =
        adapters.iter().map(|a| (a["name"].as_str().unwrap(), a["strength"].as_f64().unwrap())).collect();
    assert_eq!(told, [("a", 0.5), ("b", 2.0)]);
    let verbose = place.ok(&["inspect", "n.safetensors", "-v"]).out;
    assert!(adapters.iter().all(|a| verbose.contains(a["hash"].as_str().unwrap())), "{verbose}");
    strip(&place, "n.safetensors", "nameless.safetensors");
    let nameless = inspect("nameless.safetensors");
    assert_eq!(
        (&nameless["base"], &nameless["needs_base"], &nameless["adapters"]),
        (&Value::Null, &json!(true), &json!([]))
    );
    let text = place.ok(&["inspect", "nameless.safetensors"]).out;
    assert!(text.contains("base      not named") && text.contains("--to diffusers --base BASE"), "{text}");
    for name in ["n.safetensors", "nameless.safetensors"] {
        place.ok(&["check", name, "--strict"]);
        assert_eq!(place.ok(&["detect", name]).out, format!("{name}\tnunchaku\tflux1\t100%\n"));
    }
}

#[test]
fn adapters_inside_are_scaled_one_by_one() {
    let place = behind(Checkpoint::default());
    let scale =
        |args: &[&str]| place.run(&[&["scale", "n.safetensors", "-o", "s.safetensors", "--force"], args].concat());
    let compose = |a: &str, b: &str| {
        place.ok(&["compose", a, b, "-o", "want.safetensors", "--force", "-q"]);
        same(&place, "want.safetensors", "s.safetensors", &[]);
    };
    let ran = scale(&["--strength", "-1", "--lora", "b=0.25", "-v"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.starts_with("wrote s.safetensors  (2 adapters -> nunchaku, flux1, "), "{}", ran.out);
    assert!(ran.out.contains("\n     -1  n.safetensors: a\n  -0.25  n.safetensors: b\n"), "{}", ran.out);
    compose("a.safetensors:-0.5", "b.safetensors:-0.5");
    let native = place.ok(&["inspect", "s.safetensors", "--json"]).json()["native"].clone();
    let strengths: Vec<&Value> = native["adapters"].as_array().unwrap().iter().map(|a| &a["strength"]).collect();
    assert_eq!(strengths, [&json!(-0.5), &json!(-0.5)]);
    assert_eq!(native["base"], "base.safetensors");
    assert_eq!(scale(&["--lora", "1=4"]).code, 0);
    compose("a.safetensors:2", "b.safetensors:2");
    assert_eq!(scale(&["--lora", "a=0"]).code, 0);
    compose("a.safetensors:0", "b.safetensors:2");
    assert_eq!(scale(&["--text-encoder-strength", "0.5", "--base", "base.safetensors"]).code, 0);
    for wrong in ["c=1", "3=1", "0=1"] {
        let ran = scale(&["--lora", wrong]);
        assert_eq!(ran.code, 2, "{wrong}");
        assert!(ran.err.contains("no adapter in it is called") && ran.err.contains("1 `a`, 2 `b`"), "{}", ran.err);
    }
    assert_eq!(scale(&["--lora", "a=1", "--lora", "1=2"]).code, 2);
    // To a file for everybody else.
    assert_eq!(scale(&["--lora", "a=0", "--to", "kohya"]).code, 0);
    compose("a.safetensors:0", "b.safetensors:2");
}

#[test]
fn strengths_by_place_are_told_and_multiply() {
    let place = behind(Checkpoint::default());
    let native = ["--to", "nunchaku", "--base", "base.safetensors", "-o", "p.safetensors", "-q"];
    let blocks =
        ["compose", "a.safetensors", "b.safetensors:2", "--block", "**.ff=0.5", "--text-encoder-strength", "0"];
    place.ok(&[&blocks as &[&str], &native].concat());
    place.ok(&["scale", "p.safetensors", "--block", "**.ff=2", "--lora", "b=0.5", "-o", "s.safetensors", "-q"]);
    let text = place.ok(&["inspect", "s.safetensors"]).out;
    let first = "1 a   strength 1 (text encoders 0, **.ff x0.5) times 1 (**.ff x2)   rank 2";
    let second = "2 b   strength 2 (text encoders 0, **.ff x0.5) times 0.5 (**.ff x2)   rank 3";
    assert!(text.contains(first) && text.contains(second), "{text}");
    place.ok(&[
        "compose",
        "a.safetensors",
        "b.safetensors",
        "--component",
        "text_encoder=0",
        "-o",
        "want.safetensors",
        "-q",
    ]);
    same(&place, "want.safetensors", "s.safetensors", &[]);
}

#[test]
fn equal_names_need_numbers() {
    let place = behind(Checkpoint::default());
    place.write("other/a.safetensors", &adapter(1, 1.0));
    let native = ["--to", "nunchaku", "--base", "base.safetensors", "-o", "twins.safetensors", "-q"];
    place.ok(&[&["compose", "a.safetensors", "other/a.safetensors"] as &[&str], &native].concat());
    let by_name = place.run(&["scale", "twins.safetensors", "--lora", "a=0.5", "-o", "s.safetensors"]);
    assert!(by_name.code == 2 && by_name.err.contains("2 adapters in it are called `a`"), "{}", by_name.err);
    place.ok(&["scale", "twins.safetensors", "--lora", "2=0.5", "-o", "s.safetensors"]);
    place.ok(&["convert", "twins.safetensors", "--split", "--to", "diffusers", "--out-dir", "out"]);
    assert_eq!(names(&place.path("out")), ["twins.a-2.diffusers.safetensors", "twins.a.diffusers.safetensors"]);
    same(&place, "other/a.safetensors", "out/twins.a-2.diffusers.safetensors", &[]);
}

#[test]
fn a_file_is_split_into_its_adapters() {
    let place = behind(Checkpoint::default());
    let ran = place.ok(&["convert", "n.safetensors", "--split", "--to", "kohya", "--json"]);
    let reports = ran.json().as_array().unwrap().clone();
    let told: Vec<_> = reports.iter().map(|r| (&r["source"]["name"], &r["target"]["path"])).collect();
    let paths = [json!("n.a.kohya.safetensors"), json!("n.b.kohya.safetensors")];
    assert_eq!(told, [(&json!("a"), &paths[0]), (&json!("b"), &paths[1])]);
    reports.iter().for_each(adds_up);
    place.ok(&["convert", "a.safetensors", "--to", "bfl", "--strength", "0.5", "-o", "half.safetensors"]);
    same(&place, "half.safetensors", "n.a.kohya.safetensors", &[]);
    // One adapter inside is one file, still in a list; further strengths multiply.
    place.ok(&[
        "convert",
        "n.a.kohya.safetensors",
        "--to",
        "nunchaku",
        "--base",
        "base.safetensors",
        "-o",
        "one.safetensors",
    ]);
    let one = place.ok(&["convert", "one.safetensors", "--split", "--to", "bfl", "--strength", "2", "--json"]).json();
    assert_eq!(one.as_array().unwrap().len(), 1);
    assert_eq!(one[0]["target"]["path"], "one.n.a.kohya.bfl.safetensors");
    same(&place, "a.safetensors", "one.n.a.kohya.bfl.safetensors", &[]);
    // Each behind the base again.
    place.ok(&["convert", "n.safetensors", "--split", "--to", "nunchaku", "--out-dir", "again"]);
    same(&place, "half.safetensors", "again/n.a.nunchaku.safetensors", &["--base", "base.safetensors"]);
}

#[test]
fn what_cannot_be_split() {
    let place = behind(Checkpoint::default());
    let split = |args: &[&str]| place.run(&[&["convert", "--split", "--to", "kohya"], args].concat());
    let plain = split(&["a.safetensors", "--json"]);
    assert_eq!((plain.code, &plain.json()[0]["error"]["code"]), (2, &json!("invalid-argument")));
    let some = split(&["a.safetensors", "n.safetensors", "--out-dir", "out"]);
    assert_eq!((some.code, some.out.lines().count()), (3, 2));
    assert!(some.err.contains("a.safetensors: it is no native file"), "{}", some.err);
    assert_eq!(split(&["n.safetensors", "-o", "x.safetensors", "--json"]).error_code(), "invalid-argument");
    assert_eq!(split(&["-", "--json"]).json()[0]["error"]["code"], "invalid-argument");
    strip(&place, "n.safetensors", "nameless.safetensors");
    assert_eq!(split(&["nameless.safetensors", "--json"]).json()[0]["error"]["code"], "base-needed");
    let whole = split(&["nameless.safetensors", "--base", "base.safetensors"]);
    assert_eq!((whole.code, place.exists("nameless.nameless.kohya.safetensors")), (0, true), "{whole:?}");
    assert_eq!(split(&["n.safetensors", "--out-dir", "out", "--json"]).json()[0]["error"]["code"], "output-exists");
}

#[test]
fn smoothing_needs_the_base() {
    let place = behind(Checkpoint { smoothed: true, ..Checkpoint::default() });
    place.ok(&["compose", "a.safetensors:0.5", "b.safetensors:2", "-o", "want.safetensors"]);
    let base = ["--base", "base.safetensors"];
    same(&place, "want.safetensors", "n.safetensors", &base);
    // Scaled without the base it still says that it needs it.
    place.ok(&["scale", "n.safetensors", "--strength", "2", "-o", "s.safetensors"]);
    place.ok(&["scale", "n.safetensors", "--strength", "2", "-o", "t.safetensors", "--base", "base.safetensors"]);
    place.ok(&["compose", "a.safetensors", "b.safetensors:4", "-o", "twice.safetensors"]);
    for name in ["n.safetensors", "s.safetensors", "t.safetensors"] {
        let native = place.ok(&["inspect", name, "--json"]).json()["native"].clone();
        assert_eq!((&native["needs_base"], &native["base"]), (&json!(true), &json!("base.safetensors")), "{name}");
        for args in [
            &["convert", name, "--to", "kohya", "-o", "x.safetensors"] as &[&str],
            &["scale", name, "--strength", "2", "--to", "kohya", "-o", "x.safetensors"],
            &["compose", name, "a.safetensors", "-o", "x.safetensors"],
            &["diff", name, "a.safetensors"],
        ] {
            let ran = place.run(&[args, &["--json"]].concat());
            assert_eq!((ran.code, ran.error_code().as_str()), (2, "base-needed"), "{args:?}");
        }
    }
    same(&place, "twice.safetensors", "s.safetensors", &base);
    same(&place, "twice.safetensors", "t.safetensors", &base);
    place.ok(&["convert", "s.safetensors", "--to", "kohya", "-o", "k.safetensors", "--base", "base.safetensors"]);
    same(&place, "twice.safetensors", "k.safetensors", &[]);
}

#[test]
fn bases_that_are_none_or_others() {
    let place = behind(Checkpoint::default());
    Checkpoint { branch: 0x3f00, ..Checkpoint::default() }.write(&place, "other.safetensors");
    strip(&place, "n.safetensors", "nameless.safetensors");
    let code = |args: &[&str]| {
        let ran = place.run(&[args, &["-o", "x.safetensors", "--json"]].concat());
        assert_eq!(ran.code, 2, "{args:?}");
        ran.error_code()
    };
    let native = |args: &[&str]| code(&[&["compose", "a.safetensors", "--to", "nunchaku"], args].concat());
    assert_eq!(native(&[]), "base-needed");
    assert_eq!(native(&["--base", "a.safetensors"]), "invalid-base");
    assert_eq!(native(&["--base", "gone.safetensors"]), "not-found");
    assert_eq!(native(&["--base", "base.safetensors", "--precision", "fp4"]), "wrong-base");
    assert_eq!(code(&["compose", "base.safetensors", "a.safetensors"]), "not-an-adapter");
    assert_eq!(code(&["convert", "n.safetensors", "--to", "kohya", "--base", "other.safetensors"]), "wrong-base");
    assert_eq!(code(&["scale", "n.safetensors", "--strength", "2", "--base", "other.safetensors"]), "wrong-base");
    assert_eq!(code(&["convert", "nameless.safetensors", "--to", "kohya"]), "base-needed");
    assert_eq!(code(&["scale", "nameless.safetensors", "--strength", "2"]), "base-needed");
    assert_eq!(
        code(&["convert", "nameless.safetensors", "--to", "kohya", "--base", "other.safetensors"]),
        "wrong-base"
    );
    let diff = |base: &str| place.run(&["diff", "a.safetensors", "nameless.safetensors", "--base", base, "--json"]);
    assert_eq!(diff("other.safetensors").error_code(), "wrong-base");
    assert_eq!(diff("base.safetensors").json()["equal"], false);
    // The base is an input like any other: it is never replaced.
    let args = ["compose", "a.safetensors", "--to", "nunchaku", "--base", "base.safetensors"];
    let ran = place.run(&[&args as &[&str], &["-o", "base.safetensors", "--force", "--json"]].concat());
    assert_eq!(ran.error_code(), "same-file");
    assert!(!place.exists("x.safetensors"));
}

#[test]
fn metadata_that_does_not_fit_the_file() {
    let place = behind(Checkpoint::default());
    let layer = "transformer_blocks.*.mlp_fc1";
    type Damage<'a> = &'a dyn Fn(&mut Value);
    let told: [(&str, Damage<'_>); 8] = [
        ("invalid-packing", &|m| m["adapters"][0]["ranks"][layer] = json!([32, 1_000_000_000_000_000_000_u64])),
        ("invalid-packing", &|m| m["adapters"][1]["ranks"][layer] = json!([48, 5000])),
        ("invalid-packing", &|m| m["adapters"][0]["ranks"][layer] = json!([40, 32])),
        ("invalid-packing", &|m| m["adapters"][0]["ranks"][layer] = json!([30, 34])),
        ("invalid-packing", &|m| m["adapters"][1]["ranks"][layer] = json!([33, 36])),
        ("invalid-packing", &|m| m["base"]["ranks"][layer] = json!(33)),
        ("invalid-config", &|m| m["adapters"] = vec![m["adapters"][0].clone(); 2000].into()),
        ("invalid-config", &|m| m["version"] = json!(2)),
    ];
    for (n, (code, tell)) in told.iter().enumerate() {
        retold(&place, "n.safetensors", "t.safetensors", |m| {
            tell(m);
            true
        });
        for args in [
            &["scale", "t.safetensors", "--strength", "2", "-o", "x.safetensors", "--json"] as &[&str],
            &[
                "scale",
                "t.safetensors",
                "--strength",
                "2",
                "-o",
                "x.safetensors",
                "--base",
                "base.safetensors",
                "--json",
            ],
            &["convert", "t.safetensors", "--to", "kohya", "-o", "x.safetensors", "--json"],
        ] {
            let ran = place.run(args);
            assert_eq!((ran.code, ran.error_code().as_str()), (2, *code), "{n} {args:?}");
        }
        let split = place.run(&["convert", "t.safetensors", "--split", "--to", "kohya", "--json"]);
        assert_eq!(split.json()[0]["error"]["code"], *code, "{n}");
        assert_eq!(place.run(&["check", "t.safetensors"]).code, 1, "{n}");
    }
    retold(&place, "n.safetensors", "t.safetensors", |m| {
        m["adapters"] = json!([]);
        true
    });
    let split = place.run(&["convert", "t.safetensors", "--split", "--to", "kohya", "--json"]);
    assert_eq!((split.code, &split.json()[0]["error"]["code"]), (2, &json!("no-modules")));
}

#[test]
fn blocks_that_the_base_lacks() {
    let place = behind(Checkpoint::default());
    place.ok(&["sample", "--family", "flux1", "--dialect", "kohya", "--rank", "1", "-o", "full.safetensors"]);
    let args = ["compose", "full.safetensors", "--to", "nunchaku", "--base", "base.safetensors", "-o", "f.safetensors"];
    let strict = place.run(&[&args as &[&str], &["--json"]].concat());
    assert_eq!((strict.code, strict.error_code().as_str()), (2, "unsupported-module"));
    let lossy = place.ok(&[&args as &[&str], &["--lossy", "allow", "--json"]].concat()).json();
    assert!(codes(&lossy).iter().all(|c| *c == "unsupported-module"), "{lossy}");
    assert_eq!(lossy["fidelity"], "approximate");
    adds_up(&lossy);
}

#[test]
fn a_recipe_for_a_quantized_model() {
    let place = behind(Checkpoint::default());
    let recipe = json!({
        "loras": ["../a.safetensors:0.5", "../b.safetensors:2"], "to": "nunchaku", "base": "../base.safetensors",
        "layout": "packed", "output": "../r.safetensors",
    });
    place.write("recipes/r.json", recipe.to_string().as_bytes());
    place.ok(&["compose", "--recipe", "recipes/r.json", "-q"]);
    same(&place, "n.safetensors", "r.safetensors", &[]);
    let layout = |name: &str| place.ok(&["inspect", name, "--json"]).json()["native"]["layout"].clone();
    assert_eq!(layout("r.safetensors"), "packed");
    place.ok(&["compose", "--recipe", "recipes/r.json", "--layout", "aligned", "--force", "-q"]);
    assert_eq!(layout("r.safetensors"), "aligned");
    assert!(place.read("r.safetensors") == place.read("n.safetensors"));
}

#[test]
fn a_plan_has_the_hashes_that_the_file_will_have() {
    let place = behind(Checkpoint::default());
    let args = ["compose", "a.safetensors:0.5", "b.safetensors:2", "--to", "nunchaku", "--base", "base.safetensors"];
    let plan = place.ok(&[&args as &[&str], &["-o", "x.safetensors", "-n", "--json"]].concat()).json();
    let written = place.ok(&["inspect", "n.safetensors", "--json"]).json();
    assert_eq!(plan["plan"]["metadata"]["lorafmt.native"], written["metadata"]["lorafmt.native"]);
    assert_eq!(plan["target"]["bytes"], place.read("n.safetensors").len());
    let codes = codes(&plan);
    assert_eq!(codes, ["carried-component"]);
}

#[test]
fn models_of_the_second_generation() {
    let place = Place::new();
    Checkpoint { later: true, ..Checkpoint::default() }.write(&place, "base.safetensors");
    let block = "transformer.layers.0";
    for (name, value) in [("a", 0.25), ("b", -1.5)] {
        let tensors = [
            (format!("{block}.attention.to_v.lora_A.weight"), [1, 3840], value),
            (format!("{block}.attention.to_v.lora_B.weight"), [3840, 1], 0.5),
            (format!("{block}.feed_forward.w1.lora_A.weight"), [2, 3840], value),
            (format!("{block}.feed_forward.w1.lora_B.weight"), [10240, 2], 0.5),
        ];
        let tensors: Vec<_> = tensors.iter().map(|(key, shape, v)| (key.as_str(), shape.as_slice(), *v)).collect();
        place.write(&format!("{name}.safetensors"), &file(&[], &tensors));
    }
    let sources = ["compose", "a.safetensors:0.5", "b.safetensors:2", "-q"];
    let native = ["--to", "nunchaku", "--base", "base.safetensors", "-o", "n.safetensors"];
    place.ok(&[&sources as &[&str], &native].concat());
    place.ok(&[&sources as &[&str], &["-o", "want.safetensors"]].concat());
    let inside = place.ok(&["inspect", "n.safetensors", "--json"]).json();
    assert_eq!((&inside["family"], &inside["native"]["base_ranks"]), (&json!("z-image"), &json!({"32": 4})));
    same(&place, "want.safetensors", "n.safetensors", &[]);
    same(&place, "want.safetensors", "n.safetensors", &["--base", "base.safetensors"]);
    let parts = place.ok(&["convert", "n.safetensors", "--split", "--to", "diffusers", "--json"]).json();
    parts.as_array().unwrap().iter().for_each(adds_up);
    place.ok(&["convert", "a.safetensors", "--to", "comfyui", "--strength", "0.5", "-o", "half.safetensors"]);
    same(&place, "half.safetensors", "n.a.diffusers.safetensors", &[]);
    place.ok(&["scale", "n.safetensors", "--lora", "b=0", "-o", "scaled.safetensors"]);
    same(&place, "half.safetensors", "scaled.safetensors", &["--base", "base.safetensors"]);
    // What is quantized without a branch, or not there at all, is said.
    let name = format!("{block}.adaLN_modulation.0");
    let tensors = [(format!("{name}.lora_A.weight"), [1, 256]), (format!("{name}.lora_B.weight"), [15360, 1])];
    let tensors: Vec<_> = tensors.iter().map(|(key, shape)| (key.as_str(), shape.as_slice(), 0.5)).collect();
    place.write("c.safetensors", &file(&[], &tensors));
    let args = ["convert", "c.safetensors", "--to", "nunchaku", "--base", "base.safetensors", "--json"];
    assert_eq!(place.run(&args).error_code(), "unsupported-module");
}
