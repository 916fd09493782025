use super::*;
use Format::{Json, Toml, Yaml};

fn yaml(text: &str) -> Recipe {
    parse(text, Some(Yaml)).unwrap_or_else(|e| panic!("{e}:\n{text}"))
}

fn error(text: &str, format: impl Into<Option<Format>>) -> String {
    let error = parse(text, format.into()).expect_err(text);
    assert_eq!(error.code(), Code::InvalidRecipe, "{text}");
    error.message().to_owned()
}

/// Paths and general strengths.
fn short(recipe: &Recipe) -> Vec<(&str, f64)> {
    recipe.loras.iter().map(|lora| (lora.path.to_str().expect("UTF-8"), lora.strength.plain.all)).collect()
}

const FULL: [(Format, &str); 3] = [
    (
        Yaml,
        r#"
loras:
  - path: style.safetensors
    strength: 0.8
    text_encoder_strength: 0.5
    components: {text_encoder_2: 0}
    blocks: {"z": 2, "a.0-9": 0.5, "m.{x,y}": -1, b: 3}
  - other.safetensors:0.25
to: nunchaku
base: base.safetensors
output: out.safetensors
dtype: bf16
layout: aligned
"#,
    ),
    (
        Toml,
        r#"
to = "nunchaku"
base = "base.safetensors"
output = "out.safetensors"
dtype = "bf16"
layout = "aligned"
loras = [
  { path = "style.safetensors", strength = 0.8, text_encoder_strength = 0.5, components = { text_encoder_2 = 0 },
    blocks = { z = 2, "a.0-9" = 0.5, "m.{x,y}" = -1, b = 3.0 } },
  "other.safetensors:0.25",
]
"#,
    ),
    (
        Json,
        r#"{
  "loras": [
    {"path": "style.safetensors", "strength": 0.8, "text_encoder_strength": 0.5, "components": {"text_encoder_2": 0},
     "blocks": {"z": 2, "a.0-9": 5e-1, "m.{x,y}": -1, "\u0062": 3}},
    "other.safetensors:0.25"
  ],
  "to": "nunchaku", "base": "base.safetensors", "output": "out.safetensors", "dtype": "bf16", "layout": "aligned"
}"#,
    ),
];

#[test]
fn every_format_says_the_same() {
    let wanted = yaml(FULL[0].1);
    let style = &wanted.loras[0].strength.plain;
    assert_eq!(short(&wanted), [("style.safetensors", 0.8), ("other.safetensors", 0.25)]);
    assert_eq!((style.text_encoders, style.components["text_encoder_2"]), (Some(0.5), 0.0));
    let blocks: Vec<(String, f64)> = style.blocks.iter().map(|(s, factor)| (s.to_string(), *factor)).collect();
    let kept = [("z", 2.0), ("a.0-9", 0.5), ("m.{x,y}", -1.0), ("b", 3.0)].map(|(s, f)| (s.to_owned(), f));
    assert_eq!(blocks, kept);
    let texts = [&wanted.to, &wanted.dtype, &wanted.layout].map(|text| text.as_deref());
    assert_eq!(texts, [Some("nunchaku"), Some("bf16"), Some("aligned")]);
    assert_eq!(wanted.base.as_deref(), Some(Path::new("base.safetensors")));
    assert_eq!(wanted.output.as_deref(), Some(Path::new("out.safetensors")));
    for (format, text) in FULL {
        assert_eq!(parse(text, Some(format)).expect("valid"), wanted, "{format:?}");
        assert_eq!(parse(text, None).expect("found out"), wanted, "{format:?}");
    }
    // With headers of tables, where the order is that of the file as well.
    let headers = "[[loras]]\npath = \"x\"\n[loras.blocks]\nz = 1\n\"a\" = 2\n[[loras]]\npath = \"y\"";
    let recipe = parse(headers, None).expect("valid");
    assert_eq!(short(&recipe), [("x", 1.0), ("y", 1.0)]);
    assert_eq!(recipe.loras[0].strength.plain.blocks[1].0.to_string(), "a");
}

#[test]
fn what_is_left_out_has_a_default() {
    for text in
        ["loras:\n- path: a\n", "- a", "[a]", "- {path: a, strength: ~}", "\u{feff}- a\r\n", "loras: [a]\nto:\n"]
    {
        let recipe = yaml(text);
        let loras = vec![RecipeLora { path: "a".into(), strength: 1.0.into() }];
        let bare = Recipe { loras, to: None, base: None, output: None, dtype: None, layout: None };
        assert_eq!(recipe, bare, "{text}");
    }
    assert_eq!(parse(r#"["a", {"path": "b"}]"#, None).map(|r| r.loras.len()).ok(), Some(2));
}

#[test]
fn yaml_may_repeat_itself() {
    let text = "loras:\n- &c {path: c, strength: 2, components: {x: 3}}\n- {<<: *c, path: d}\n- {<<: *c, strength: 1}";
    let recipe = yaml(text);
    assert_eq!(short(&recipe), [("c", 2.0), ("d", 2.0), ("c", 1.0)]);
    assert_eq!(recipe.loras[1].strength.plain.components["x"], 3.0);
    for (text, number) in [("+.5", 0.5), ("1.", 1.0), ("1e-3", 0.001), ("-2", -2.0), ("0x10", 16.0)] {
        assert_eq!(yaml(&format!("- {{path: a, strength: {text}}}")).loras[0].strength.plain.all, number, "{text}");
    }
}

/// Text, format, line and column, and part of the message.
type Wrong = (&'static str, Option<Format>, (usize, usize), &'static str);

const WRONG: &[Wrong] = &[
    // Syntax.
    ("loras:\n  - path: [a\n", Some(Yaml), (2, 11), "not valid YAML"),
    ("- ä: [ä, [b}\n", Some(Yaml), (1, 10), "not valid YAML"),
    ("loras: [a]\n]", Some(Yaml), (2, 1), "not valid YAML"),
    ("loras: [a]\n---\nb: 1", Some(Yaml), (3, 1), "not valid YAML"),
    ("- {path: a, blocks: {*.x: 1}}", Some(Yaml), (1, 22), "stands in quotes"),
    ("{\"loras\": [\n \"ä\",]}", Some(Json), (2, 6), "not valid JSON: trailing comma"),
    ("{\"loras\": [\"a\"]", Some(Json), (1, 15), "not valid JSON: EOF"),
    ("{\"loras\": [ä]}", Some(Json), (1, 12), "not valid JSON: expected value"),
    ("{\"loras\": [{\"path\": \"a\",\n \"strength\": 1e999}]}", Some(Json), (2, 18), "number out of range"),
    ("{\"loras\": [{\"path\": \"a\",\n \"strength\": NaN}]}", Some(Json), (2, 14), "not valid JSON"),
    ("loras = [\n \"ä\" 3]", Some(Toml), (2, 6), "not valid TOML"),
    ("to = \"a\"\nto = \"b\"", Some(Toml), (2, 1), "not valid TOML: duplicate key"),
    // What no format is known for is told by the one that understood most.
    ("loras:\n  - path: [a\n", None, (2, 11), "not valid YAML"),
    ("[[loras]]\npath = \"a\"\nstrength = x", None, (3, 12), "not valid TOML"),
    ("{\"loras\": [\"a\"\n \"b\"}", None, (2, 2), "not valid"),
    // Nothing to read.
    ("", None, (1, 1), "empty"),
    (" \n\n", Some(Toml), (1, 1), "empty"),
    ("# only words\n", Some(Yaml), (1, 1), "empty"),
    ("null", Some(Json), (1, 1), "empty"),
    ("\n  just words", Some(Yaml), (2, 3), "a recipe is a mapping or a list"),
    // What the keys hold.
    ("{}", None, (1, 1), "names no LoRA"),
    ("to: x\nloras:", Some(Yaml), (1, 1), "names no LoRA"),
    ("loras = []", Some(Toml), (1, 1), "names no LoRA"),
    ("loras = 3", Some(Toml), (1, 9), "`loras` is 3; it must be a list"),
    ("- a\n- true", Some(Yaml), (2, 3), "a LoRA is true; it must be a path or a mapping"),
    ("- {strength: 1}", Some(Yaml), (1, 3), "no `path`"),
    ("- {path: 12}", Some(Yaml), (1, 10), "`path` is 12; it must be text, in quotes"),
    ("- ''", Some(Yaml), (1, 3), "is empty"),
    ("loras: [a]\nbase: ''", Some(Yaml), (2, 7), "`base` is empty"),
    ("- path: a\n  components: 0.5", Some(Yaml), (2, 15), "`components` is 0.5; it must be a mapping"),
    ("- path: a\n  blocks: [b]", Some(Yaml), (2, 11), "`blocks` is a list; it must be a mapping"),
    ("loras: [a]\nto: [b]", Some(Yaml), (2, 5), "`to` is a list; it must be text"),
    ("loras: [a]\ndtype: f16", Some(Yaml), (2, 8), "it can be `keep`, `bf16`, `fp16` or `fp32`"),
    ("loras: [a]\nlayout: yes", Some(Yaml), (2, 9), "`layout` is `yes`; it can be `aligned` or `packed`"),
    // Numbers.
    ("- path: a\n  strength: '0.5'", Some(Yaml), (2, 13), "`strength` of `a` is the text `0.5`; it must be a number"),
    ("- path: a\n  strength: .NaN", Some(Yaml), (2, 13), "`strength` of `a` is NaN"),
    ("- path: a\n  text_encoder_strength: -.inf", Some(Yaml), (2, 26), "`text_encoder_strength` of `a` is -inf"),
    ("- path: a\n  strength: 1e999", Some(Yaml), (2, 13), "`strength` of `a` is inf"),
    ("[[loras]]\npath = \"a\"\nblocks.b = nan", Some(Toml), (3, 12), "the factor of `b` of `a` is NaN"),
    ("[[loras]]\npath = \"a\"\ncomponents.b = +inf", Some(Toml), (3, 16), "the strength of `b` of `a` is inf"),
    ("[\"a:nan\"]", Some(Json), (1, 2), "the strength of `a` is NaN"),
    ("- a\n- b.c:-inf", Some(Yaml), (2, 3), "the strength of `b.c` is -inf"),
    // Keys.
    ("- path: a\n  strenght: 1", Some(Yaml), (2, 3), "no key `strenght`; did you mean `strength`?"),
    ("[[loras]]\npath = \"a\"\nstrenght = 1", Some(Toml), (3, 1), "no key `strenght`; did you mean `strength`?"),
    ("[{\"path\": \"ä\", \"strenght\": 1}]", Some(Json), (1, 16), "no key `strenght`; did you mean `strength`?"),
    ("lora: [a]", Some(Yaml), (1, 1), "no key `lora`; did you mean `loras`?"),
    ("- {path: a, zzzzzzzz: 3}", Some(Yaml), (1, 13), "it can have `path`, `strength`, `text_encoder_strength`"),
    ("loras: [a]\nloras: [b]", Some(Yaml), (2, 1), "`loras` stands here twice"),
    ("{\"loras\": [\"a\"], \"loras\": [\"b\"]}", Some(Json), (1, 18), "`loras` stands here twice"),
    ("- {path: a, blocks: {b: 1, b: 2}}", Some(Yaml), (1, 28), "`b` stands here twice"),
    ("- {path: a, components: {b: 1, b: 2}}", Some(Yaml), (1, 32), "`b` stands here twice"),
    ("- {path: a, blocks: {b.9-3: 2}}", Some(Yaml), (1, 22), "`b.9-3` is not understood: the range `9-3`"),
    // AI-Toolkit's.
    ("model:\n  lora_pahts: []", Some(Yaml), (2, 3), "no key `lora_pahts`; did you mean `lora_paths`?"),
    ("model:\n  is_flax: true", Some(Yaml), (2, 3), "did you mean `is_flux`?"),
    ("model:\n  lora_weight: 2", Some(Yaml), (2, 16), "`lora_weight` without a `lora_path`"),
    ("model:\n  lora_path: a\n  lora_weight: .inf", Some(Yaml), (3, 16), "`lora_weight` of `a` is inf"),
    ("model:\n  lora_paths:\n  - {path: a, wieght: 2}", Some(Yaml), (3, 15), "did you mean `weight`?"),
    ("model:\n  lora_paths:\n  - {path: a, weight: .nan}", Some(Yaml), (3, 23), "`weight` of `a` is NaN"),
    ("model:\n  lora_paths: a", Some(Yaml), (2, 15), "`lora_paths` is the text `a`; it must be a list"),
    ("model: {name_or_path: x}", Some(Yaml), (1, 1), "names no LoRA"),
    ("job: x\nconfig: {process: {}}", Some(Yaml), (2, 19), "`process` is a mapping; it must be a list"),
];

#[test]
fn errors_say_where_and_why() {
    for (text, format, (line, column), said) in WRONG {
        let message = error(text, *format);
        let place = format!("line {line}, column {column}: ");
        assert!(message.starts_with(&place) && message.contains(said), "{text:?}: {message}");
    }
}

#[test]
fn any_text_is_a_recipe_or_an_error_with_a_place() {
    let mut errors = 0;
    let mut check = |text: &str, format: Format| {
        for format in [Some(format), None] {
            if let Err(error) = parse(text, format) {
                let (line, rest) = error.message()[5..].split_once(", column ").expect("a place");
                let column = rest.split(':').next().and_then(|n| n.parse::<usize>().ok()).expect("a column");
                let lines: Vec<&str> = text.split('\n').collect();
                let line = lines.get(line.parse::<usize>().expect("a number") - 1);
                let length = line.map(|line| line.chars().count() + 1);
                assert!(length.is_some_and(|length| column <= length), "{text}: {error}");
                errors += 1;
            }
        }
    };
    for (format, text) in FULL {
        for at in 0..text.len() {
            check(&text[..at], format);
            for other in ["", "é", "{", "\n"] {
                check(&format!("{}{other}{}", &text[..at], &text[at + 1..]), format);
            }
        }
    }
    assert!(errors > 1000, "{errors}");
}

#[test]
fn errors_name_the_key_and_help() {
    let error = parse("- {path: a, strenght: 2}", None).expect_err("unknown key");
    assert_eq!(error.key_name(), Some("strenght"));
    assert!(error.hint_text().contains("`loras`"));
    let error = parse("- {path: a, blocks: {b.9-3: 2}}", None).expect_err("bad selector");
    assert!(error.hint_text().contains("block numbers"), "{}", error.hint_text());
}

#[test]
fn nothing_makes_it_slow() {
    let start = std::time::Instant::now();
    for deep in ["[", "{a: ", "- ", "? ", "{\"a\":"] {
        error(&deep.repeat(100_000), None);
    }
    error(&("a = ".to_owned() + &"[".repeat(100_000)), Toml);
    error(&("a.".repeat(100_000) + "a = 1"), Toml);
    // Each line repeats the one before ten times.
    let line = |n: usize| format!("k{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(", "));
    let bomb: String = (1..9).map(line).collect();
    assert!(error(&format!("job: x\nk0: &a0 x\n{bomb}loras: [a]"), Yaml).contains("repeat too much"));
    let long = format!("k: &a \"\\x41{}\"\nloras: [a]\njob: [{}]", "x".repeat(900_000), vec!["*a"; 90].join(", "));
    assert!(error(&long, Yaml).contains("too large"));
    // Many keys, none of them twice, and one long one.
    let keys: String = (0..20_000).map(|n| format!("k{n}: 1, ")).collect();
    assert_eq!(yaml(&format!("- {{path: a, blocks: {{{keys}}}}}")).loras[0].strength.plain.blocks.len(), 20_000);
    error(&format!("{{\"{}\": 1}}", "x".repeat(900_000)), Json);
    assert!(error(&"x".repeat(LONGEST + 1), None).contains("longer than"));
    // Generous: machines that test are busy.
    assert!(start.elapsed().as_secs() < 60);
}

#[test]
fn aitoolkit_alone_and_in_a_job_file() {
    let one = yaml("model:\n  name_or_path: x\n  is_flux: true\n  quantize: true\n  lora_path: a.safetensors");
    assert_eq!(short(&one), [("a.safetensors", 1.0)]);
    let model = "{name_or_path: x, arch: flux, model_kwargs: {any: thing}, assistant_lora_path: no, low_vram: true, \
                 lora_paths: [{path: b, weight: 0.5}, {path: c}], lora_path: a, lora_weight: -0.25}";
    let wanted = [("a", -0.25), ("b", 0.5), ("c", 1.0)];
    assert_eq!(short(&yaml(&format!("model: {model}"))), wanted);
    // The rest of a job file is none of ours, be it as odd as it may.
    let job = format!(
        "job: extension\nmystery: [1, 1]\nconfig:\n  name: n\n  process:\n  - type: sd_trainer\n    seed: .nan\n    \
         seed: 3\n    model: {model}\n  - {{type: other}}\n  - {{model: {{lora_path: d, lora_weight: null}}}}\n\
         meta: {{name: '[name]'}}"
    );
    let recipe = yaml(&job);
    assert_eq!(short(&recipe), [&wanted[..], &[("d", 1.0)]].concat());
    assert_eq!(parse(&job, None).expect("found out"), recipe);
    let json = r#"{"job": "generate", "config": {"process": [{"model": {"lora_path": "a", "lora_weight": 2}}]}}"#;
    assert_eq!(short(&parse(json, None).expect("valid")), [("a", 2.0)]);
    let misspelt = job.replace("lora_weight: null", "lora_wieght: 1");
    assert!(error(&misspelt, Yaml).ends_with("did you mean `lora_weight`?"));
    // Both schemas in one file: ours first.
    assert_eq!(short(&yaml("model: {lora_path: a}\nloras: [b]\nto: x")), [("b", 1.0), ("a", 1.0)]);
}

#[test]
fn a_strength_behind_a_path() {
    let split = |text: &str| {
        let (path, number) = split_strength(OsStr::new(text));
        (path.into_os_string().into_string().expect("UTF-8"), number)
    };
    let cases: &[(&str, &str, f64)] = &[
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("a:b:0.5", "a:b", 0.5),
        ("file:1e-3", "file", 1e-3),
        ("x:-0.5", "x", -0.5),
        ("x:+.5", "x", 0.5),
        ("x:0", "x", 0.0),
        ("x:inf", "x", f64::INFINITY),
        ("x:1e999", "x", f64::INFINITY),
        (r"C:\x.safetensors", r"C:\x.safetensors", 1.0),
        (r"C:\x.safetensors:2", r"C:\x.safetensors", 2.0),
        ("a:b", "a:b", 1.0),
        ("a:0.5x", "a:0.5x", 1.0),
        ("a: 0.5", "a: 0.5", 1.0),
        ("a:", "a:", 1.0),
        (":0.5", ":0.5", 1.0),
        ("", "", 1.0),
    ];
    for (text, path, number) in cases {
        assert_eq!(split(text), ((*path).to_owned(), *number), "{text}");
    }
    let (path, number) = split("x:nan");
    assert!(path == "x" && number.is_nan());
    assert!(Request::from(number).check().is_err());
    assert_eq!(split_unless(OsStr::new("x:2"), |path| path == Path::new("x:2")), ("x:2".into(), 1.0));
    assert_eq!(split_unless(OsStr::new("x:2"), |path| path == Path::new("x")), ("x".into(), 2.0));
}

#[cfg(unix)]
#[test]
fn names_that_are_not_utf8_are_split_too() {
    use std::os::unix::ffi::OsStrExt;
    let (path, number) = split_strength(OsStr::from_bytes(b"\xff:0.5"));
    assert_eq!((path.as_os_str().as_bytes(), number), (&b"\xff"[..], 0.5));
    assert_eq!(split_strength(OsStr::from_bytes(b"a:\xff")).1, 1.0);
}

#[test]
fn files_are_read_from_their_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path
    };
    let absolute = if cfg!(windows) { r"C:\z" } else { "/z" };
    let text = format!("loras: ['a:2', 'b:2', '{absolute}']\nbase: sub/c\noutput: d");
    // A file that has such a name is meant by it.
    #[cfg(unix)]
    file("b:2", b"");
    let path = file("recipe.YML", text.as_bytes());
    let recipe = read(&path).expect("valid");
    let at = |name: &str| folder.path().join(name);
    assert_eq!(recipe.loras[0], RecipeLora { path: at("a"), strength: 2.0.into() });
    #[cfg(unix)]
    assert_eq!(recipe.loras[1], RecipeLora { path: at("b:2"), strength: 1.0.into() });
    assert_eq!(recipe.loras[2].path, Path::new(absolute));
    assert_eq!((recipe.base, recipe.output), (Some(at("sub/c")), Some(at("d"))));
    // The extension says what it is; without a known one the content does.
    assert!(read(&file("x.json", text.as_bytes())).expect_err("no JSON").message().contains("not valid JSON"));
    assert_eq!(read(&file("x.txt", text.as_bytes())).expect("found out").loras.len(), 3);

    let fails = |path: &Path, code: Code, said: &str| {
        let error = read(path).expect_err(said);
        assert_eq!((error.code(), error.path()), (code, Some(path)), "{error}");
        assert!(error.message().contains(said), "{error}");
    };
    fails(
        &file("y.yaml", b"loras: [a]\nt\xc3\xb6: \xff"),
        Code::InvalidRecipe,
        "line 2, column 5: the file is not UTF-8",
    );
    fails(&file("z.yaml", b"loras: 3"), Code::InvalidRecipe, "line 1, column 8: `loras` is 3");
    fails(&file("long.yaml", &vec![0xff; LONGEST + 10]), Code::InvalidRecipe, "line 1, column 1: longer than");
    fails(&file("empty.toml", b""), Code::InvalidRecipe, "line 1, column 1: the file is empty");
    fails(&folder.path().join("none.yaml"), Code::NotFound, "cannot open");
}

#[test]
fn options_of_models_are_listed_once() {
    let lines: Vec<&str> =
        include_str!("../../data/model-options.txt").lines().filter(|line| !line.starts_with('#')).collect();
    assert!(lines.is_sorted_by(|a, b| a < b));
    assert!(lines.iter().all(|line| line.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') && !line.is_empty()));
}
