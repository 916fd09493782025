use serde_json::json;

use crate::common::{Place, adapter};

/// A folder with two adapters in `loras`, and recipes beside it.
fn kitchen() -> Place {
    let place = Place::new();
    place.write("loras/a.safetensors", &adapter(2, 0.25));
    place.write("loras/b.safetensors", &adapter(3, -1.5));
    place.ok(&["compose", "loras/a.safetensors:0.8", "loras/b.safetensors:-0.5", "-o", "want.safetensors"]);
    place
}

const YAML: &str = "
loras:
  - loras/a.safetensors:0.8
  - path: loras/b.safetensors
    strength: -0.5
";

const TOML: &str = "
[[loras]]
path = 'loras/a.safetensors'
strength = 0.8

[[loras]]
path = 'loras/b.safetensors'
strength = -0.5
";

const JSON: &str = r#"{"loras": ["loras/a.safetensors:0.8", {"path": "loras/b.safetensors", "strength": -0.5}]}"#;

/// A job of AI-Toolkit, cut short.
const JOB: &str = "
job: generate
config:
  name: mix
  process:
    - type: to_folder
      model:
        name_or_path: black-forest-labs/FLUX.1-dev
        is_flux: true
        lora_paths:
          - path: loras/a.safetensors
            weight: 0.8
          - path: loras/b.safetensors
            weight: -0.5
";

#[test]
fn all_ways_to_write_one_recipe() {
    let place = kitchen();
    let texts = [("r.yaml", YAML), ("r.toml", TOML), ("r.json", JSON), ("job.yml", JOB), ("noending", TOML)];
    for (name, text) in texts {
        place.write(name, text.as_bytes());
        place.ok(&["compose", "--recipe", name, "-o", "got.safetensors", "--force"]);
        assert!(place.read("got.safetensors") == place.read("want.safetensors"), "{name}");
    }
}

#[test]
fn paths_start_at_the_recipe() {
    let place = kitchen();
    place.write(
        "loras/r.json",
        br#"{"loras": ["a.safetensors:0.8", "b.safetensors:-0.5"], "output": "../got.safetensors"}"#,
    );
    place.ok(&["compose", "--recipe", "loras/r.json"]);
    assert!(place.read("got.safetensors") == place.read("want.safetensors"));
}

#[test]
fn the_command_line_comes_second_and_counts_first() {
    let place = kitchen();
    let recipe = json!({
        "loras": ["loras/a.safetensors"], "to": "kohya", "output": "r.safetensors", "dtype": "bf16", "layout": "packed",
    });
    place.write("r.json", recipe.to_string().as_bytes());
    let run = |args: &[&str]| place.ok(&[&["compose", "--recipe", "r.json", "-n", "--json"], args].concat()).json();
    let plain = run(&[]);
    assert_eq!((&plain["target"]["planned"], &plain["target"]["dialect"]), (&json!("r.safetensors"), &json!("kohya")));
    let types = |report: &serde_json::Value| {
        let tensors = report["plan"]["tensors"].as_array().unwrap().clone();
        tensors
            .iter()
            .filter(|t| !t["key"].as_str().unwrap().contains("alpha"))
            .map(|t| t["dtype"].clone())
            .collect::<Vec<_>>()
    };
    assert!(types(&plain).iter().all(|t| t == "BF16"), "{plain}");
    let other = run(&["--to", "bfl", "-o", "o.safetensors", "--dtype", "keep", "loras/b.safetensors:2"]);
    assert_eq!((&other["target"]["planned"], &other["target"]["dialect"]), (&json!("o.safetensors"), &json!("bfl")));
    assert!(types(&other).iter().all(|t| t == "F32"), "{other}");
    let strengths: Vec<_> = other["sources"].as_array().unwrap().iter().map(|s| (&s["name"], &s["strength"])).collect();
    assert_eq!(strengths, [(&json!("a"), &json!(1.0)), (&json!("b"), &json!(2.0))]);
}

#[test]
fn strengths_by_place_are_of_the_recipe_or_of_the_command_line() {
    let place = kitchen();
    let recipe = json!([{
        "path": "loras/a.safetensors", "strength": 0.8, "text_encoder_strength": 0.5, "blocks": {"**.ff": 2},
        "components": {"text_encoder_2": 0},
    }]);
    place.write("r.json", recipe.to_string().as_bytes());
    place.ok(&["compose", "--recipe", "r.json", "-o", "r.safetensors"]);
    let places = ["--text-encoder-strength", "0.5", "--block", "**.ff=2", "--component", "text_encoder_2=0"];
    place.ok(&[&["compose", "loras/a.safetensors:0.8", "-o", "c.safetensors"] as &[&str], &places].concat());
    assert!(place.read("r.safetensors") == place.read("c.safetensors"));
    // With nothing on the command line they would silently do nothing.
    let alone =
        place.run(&[&["compose", "--recipe", "r.json", "-o", "d.safetensors", "--json"] as &[&str], &places].concat());
    assert_eq!((alone.code, alone.error_code().as_str()), (2, "invalid-argument"));
    assert!(alone.out.contains("into the recipe"), "{}", alone.out);
}

#[test]
fn recipes_that_are_wrong() {
    let place = kitchen();
    let run = |name: &str, text: &str| {
        place.write(name, text.as_bytes());
        let ran = place.run(&["compose", "--recipe", name, "-o", "x.safetensors", "--json"]);
        assert_eq!(ran.code, 2, "{text}");
        ran.json()["error"].clone()
    };
    let error = run("bad.yaml", "loras:\n  - path: loras/a.safetensors\n    stregth: 0.8\n");
    assert_eq!(
        (&error["code"], &error["path"], &error["key"]),
        (&json!("invalid-recipe"), &json!("bad.yaml"), &json!("stregth"))
    );
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("line 3, column 5") && message.contains("did you mean `strength`?"), "{message}");
    assert_eq!(run("bad.toml", "loras = [\n")["code"], "invalid-recipe");
    assert_eq!(run("bad.json", "{\"loras\": []}")["code"], "invalid-recipe");
    assert_eq!(run("bad.yaml", "loras: [loras/a.safetensors:.nan]")["code"], "not-found");
    assert_eq!(run("bad.yaml", "loras: ['loras/a.safetensors:nan']")["code"], "invalid-recipe");
    assert_eq!(run("bad.yaml", "loras: [gone.safetensors]")["code"], "not-found");
    let dialect = run("bad.yaml", "loras: [loras/a.safetensors]\nto: nowhere");
    assert_eq!((&dialect["code"], &dialect["path"]), (&json!("invalid-argument"), &json!("bad.yaml")));
    assert_eq!(
        place.run(&["compose", "--recipe", "gone.yaml", "-o", "x.safetensors", "--json"]).error_code(),
        "not-found"
    );
    place.write("r.json", JSON.as_bytes());
    let nowhere = place.run(&["compose", "--recipe", "r.json", "--json"]);
    assert_eq!((nowhere.code, nowhere.error_code().as_str()), (2, "invalid-argument"));
    assert!(nowhere.out.contains("`output`"), "{}", nowhere.out);
    assert!(!place.exists("x.safetensors"));
}
