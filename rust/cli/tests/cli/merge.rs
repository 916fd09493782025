use crate::common::{Place, adapter, codes, file};

/// Two adapters of one small module of FLUX.1, with other ranks.
fn two() -> Place {
    let place = Place::new();
    for (name, rank, value) in [("a.safetensors", 2, 0.25), ("b.safetensors", 3, -1.5)] {
        let tensors = [
            ("transformer.x_embedder.lora_A.weight", [rank, 64], value),
            ("transformer.x_embedder.lora_B.weight", [3072, rank], 0.125),
        ];
        let specs: Vec<(&str, &[usize], f32)> = tensors.iter().map(|(k, s, v)| (*k, s.as_slice(), *v)).collect();
        place.write(name, &file(&[], &specs));
    }
    place
}

const MERGE: [&str; 4] = ["compose", "a.safetensors:0.8", "b.safetensors", "--force"];

fn merged(place: &Place, out: &str, args: &[&str]) -> serde_json::Value {
    place.ok(&[&MERGE, args, &["-o", out, "--json"]].concat()).json()
}

#[test]
fn every_method_in_every_space() {
    let place = two();
    for method in ["ties", "dare-linear", "dare-ties", "magnitude-prune", "della", "breadcrumbs"] {
        let core = merged(&place, "core.safetensors", &["--method", method, "--density", "0.6"]);
        assert_eq!((core["merge"]["method"].as_str(), core["merge"]["space"].as_str()), (Some(method), Some("core")));
        let delta = merged(&place, "delta.safetensors", &["--method", method, "--density", "0.6", "--space", "delta"]);
        assert!(codes(&delta).contains(&"recompression-loss"), "{method}");
        assert!(delta["merge"]["relative_error"].is_number());
        // The highest of the adapters.
        assert!((1..=3).contains(&delta["merge"]["modules"][0]["rank"].as_u64().unwrap()), "{method}");
    }
}

#[test]
fn same_seed_same_bytes_whatever_the_threads() {
    let place = Place::new();
    place.write("a.safetensors", &adapter(2, 0.25));
    place.write("b.safetensors", &adapter(3, -1.5));
    let run = |out: &str, more: &[&str]| {
        let args = ["--method", "dare-ties", "--density", "0.5", "-o", out];
        place.ok(&[&MERGE, args.as_slice(), more].concat());
        place.read(out)
    };
    let one = run("one.safetensors", &["--jobs", "1", "--seed", "7"]);
    assert!(one == run("two.safetensors", &["--jobs", "2", "--seed", "7"]));
}

#[test]
fn recipes_say_the_same() {
    let place = two();
    merged(&place, "want.safetensors", &["--method", "ties", "--density", "0.5", "--space", "delta", "--rank", "2"]);
    let recipe = "loras:\n- a.safetensors:0.8\n- {path: b.safetensors, density: 0.5}\n\
                  method: ties\ndensity: 0.5\nspace: delta\nrank: 2\n";
    place.write("r.yaml", recipe.as_bytes());
    place.ok(&["compose", "--recipe", "r.yaml", "-o", "got.safetensors"]);
    assert!(place.read("got.safetensors") == place.read("want.safetensors"));
    // The command line counts before the recipe.
    let other = place.ok(&["compose", "--recipe", "r.yaml", "--space", "core", "-o", "x.safetensors", "--json"]).json();
    assert_eq!(other["merge"]["space"], "core");
    place.write("bad.yaml", b"loras: [a.safetensors]\nmethod: slerp\n");
    let bad = place.run(&["compose", "--recipe", "bad.yaml", "-o", "y.safetensors", "--json"]);
    assert_eq!(bad.error_code(), "invalid-recipe");
}

#[test]
fn what_makes_no_sense_is_an_error() {
    let place = two();
    let cases: [&[&str]; 8] = [
        &["--method", "ties"],
        &["--method", "ties", "--density", "1.5"],
        &["--method", "ties", "--density", "-0.5"],
        &["--density", "0.5"],
        &["--method", "svd"],
        &["--method", "cat", "--rank", "2"],
        &["--method", "della", "--density", "0.9", "--epsilon", "0.2"],
        &["--method", "ties", "--density", "0.5", "--space", "delta", "--energy", "0.9"],
    ];
    for args in cases {
        let ran = place.run(&[&MERGE, args, &["-o", "x.safetensors", "--json"]].concat());
        assert_eq!((ran.code, ran.error_code().as_str()), (2, "invalid-argument"), "{args:?}");
        assert!(!place.exists("x.safetensors"));
    }
    let factors = ["--method", "ties", "--density", "0.5", "--space", "factors", "-o", "x.safetensors", "--json"];
    let ran = place.run(&[&MERGE, factors.as_slice()].concat());
    assert_eq!(ran.error_code(), "incompatible-modules");
    let message = ran.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(
        ["x_embedder", "a.safetensors", "b.safetensors", "rank 2"].iter().all(|w| message.contains(w)),
        "{message}"
    );
}
