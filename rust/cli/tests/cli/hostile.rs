use crate::common::{MODULE, Place, borrowed, factors, file, module, tiny};

const DOWN: &[usize] = &[1, 3072];
const UP: &[usize] = &[18432, 1];

/// The error code of `inspect`, `detect` and `convert`, and that nothing is left behind.
fn refused(place: &Place, name: &str) -> String {
    let codes: Vec<String> =
        [&["inspect", name] as &[&str], &["detect", name], &["convert", name, "--to", "diffusers"]]
            .iter()
            .map(|args| {
                let ran = place.run(&[args, &["--json"] as &[&str]].concat());
                assert_eq!(ran.code, 2, "{args:?}");
                let human = place.run(args);
                assert_eq!((human.code, human.out.as_str()), (2, ""), "{args:?}");
                let first = human.err.lines().next().unwrap();
                assert!(first.starts_with("error: ") && first.contains(name), "{first}");
                assert!(human.err.lines().last().unwrap().starts_with("hint: "), "{}", human.err);
                ran.error_code()
            })
            .collect();
    assert!(codes.iter().all(|c| *c == codes[0]), "{codes:?}");
    codes[0].clone()
}

#[test]
fn files_that_cannot_be_read() {
    let good = tiny();
    let mut reversed = good.clone();
    reversed[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let cases: [(&str, &[u8], &str); 8] = [
        ("empty.safetensors", b"", "truncated"),
        ("short.safetensors", b"abc", "not-safetensors"),
        ("garbage.safetensors", b"<!DOCTYPE html><html>404</html>", "not-safetensors"),
        ("pickle.safetensors", b"\x80\x02}q\x00.aaaaaaaaaaaa", "pickle-file"),
        ("torch.pt", b"PK\x03\x04aaaaaaaaaaaaaaaaa", "pickle-file"),
        ("cut.safetensors", &good[..good.len() - 100], "truncated"),
        ("header.safetensors", &good[..64], "header-too-large"),
        ("length.safetensors", &reversed, "header-too-large"),
    ];
    let place = Place::new();
    for (name, bytes, code) in cases {
        place.write(name, bytes);
        assert_eq!(refused(&place, name), code, "{name}");
        // Checking is asking, and the answer is no.
        let check = place.run(&["check", name, "--json"]);
        assert_eq!((check.code, &check.json()["problems"][0]["code"]), (1, &code.into()), "{name}");
    }
    assert_eq!(refused(&place, "missing.safetensors"), "not-found");
    assert_eq!(place.run(&["check", "missing.safetensors"]).code, 2);
    std::fs::create_dir(place.path("folder")).unwrap();
    assert_eq!(refused(&place, "folder"), "is-a-directory");
    assert!(place.names().iter().all(|n| !n.contains("diffusers") && !n.starts_with(".lorafmt")));
}

/// The code of the problem that keeps a readable file from being converted; `inspect` shows it, `check` says no.
fn broken(bytes: &[u8]) -> String {
    let place = Place::new();
    place.write("x.safetensors", bytes);
    let converted = place.run(&["convert", "x.safetensors", "--to", "diffusers", "--json"]);
    let code = converted.error_code();
    assert_eq!(converted.code, 2, "{code}");
    let check = place.run(&["check", "x.safetensors", "--json"]);
    assert_eq!((check.code, &check.json()["ok"]), (1, &false.into()), "{code}");
    assert_eq!(check.json()["problems"][0]["code"], code.as_str());
    assert_eq!(place.run(&["inspect", "x.safetensors"]).code, 0, "{code}");
    assert_eq!(place.names(), ["x.safetensors"]);
    code
}

#[test]
fn modules_that_make_no_sense() {
    let mut half = factors(MODULE, &[]);
    half.truncate(1);
    assert_eq!(broken(&file(&[], &borrowed(&half))), "unpaired-module");
    let mut ranks = factors(MODULE, &[]);
    ranks[1].1 = vec![18432, 2];
    assert_eq!(broken(&file(&[], &borrowed(&ranks))), "rank-mismatch");
    assert_eq!(broken(&module(MODULE, &[("alpha", &[], f32::NAN)])), "invalid-alpha");
    let mut unknown = factors(MODULE, &[]);
    unknown.push(("lora_unet_double_blocks_0_img_mod_lim.alpha".to_owned(), vec![], 1.0));
    assert_eq!(broken(&file(&[], &borrowed(&unknown))), "unknown-key");
}

#[test]
fn an_unknown_key_gets_its_nearest_neighbour() {
    let place = Place::new();
    let mut tensors = factors(MODULE, &[]);
    tensors.push(("lora_unet_double_blocks_0_img_mod_lim.alpha".to_owned(), vec![], 1.0));
    place.write("x.safetensors", &file(&[], &borrowed(&tensors)));
    let ran = place.run(&["convert", "x.safetensors", "--to", "diffusers"]);
    assert!(ran.err.contains("the nearest known key is `lora_unet_double_blocks_0_img_mod_lin"), "{}", ran.err);
    assert!(ran.err.contains("--unknown keep"), "{}", ran.err);
}

#[test]
fn values_that_are_no_numbers_fail_a_check_only() {
    let place = Place::new();
    let mut tensors = factors(MODULE, &[]);
    tensors[0].2 = f32::INFINITY;
    place.write("x.safetensors", &file(&[], &borrowed(&tensors)));
    let check = place.run(&["check", "x.safetensors"]);
    assert_eq!(check.code, 1);
    assert!(check.out.starts_with("bad x.safetensors") && check.out.contains("[not-finite]"), "{}", check.out);
    place.ok(&["inspect", "x.safetensors"]);
}

#[test]
fn two_named_adapters_are_refused() {
    let place = Place::new();
    let base = "base_model.model.transformer_blocks.0.norm1.linear";
    let keys = ["lora_A.one.weight", "lora_B.one.weight", "lora_A.two.weight", "lora_B.two.weight"]
        .map(|s| format!("{base}.{s}"));
    let tensors: Vec<(&str, &[usize], f32)> =
        keys.iter().map(|k| (k.as_str(), if k.contains("lora_A") { DOWN } else { UP }, 1.0)).collect();
    place.write("x.safetensors", &file(&[], &tensors));
    let ran = place.run(&["convert", "x.safetensors", "--to", "kohya", "--json"]);
    assert_eq!((ran.code, ran.error_code().as_str()), (2, "several-adapters"));
}

#[test]
fn a_file_of_two_families_is_a_warning() {
    // The attention of a FLUX.1 block is named and shaped like Chroma's.
    let place = Place::new();
    let base = "lora_unet_double_blocks_0_img_attn_proj";
    let (down, up) = (format!("{base}.lora_down.weight"), format!("{base}.lora_up.weight"));
    place.write("x.safetensors", &file(&[], &[(&down, &[1, 3072], 1.0), (&up, &[3072, 1], 1.0)]));
    for command in ["inspect", "detect", "check"] {
        let seen = place.ok(&[command, "x.safetensors", "--json"]).json();
        assert_eq!(seen["warnings"][0]["code"], "ambiguous-family", "{command}");
        assert_eq!(place.run(&[command, "x.safetensors", "--strict"]).code, 1, "{command}");
    }
    let convert = ["convert", "x.safetensors", "--to", "diffusers", "--strict"];
    let strict = place.run(&convert);
    assert_eq!(strict.code, 1);
    assert!(strict.err.starts_with("warning: [ambiguous-family] "), "{}", strict.err);
    assert!(place.exists("x.diffusers.safetensors"), "a warning does not undo the work");
    assert_eq!(place.run(&["diff", "x.safetensors", "x.diffusers.safetensors", "--strict"]).code, 1);
    let certain =
        place.ok(&["convert", "x.safetensors", "--to", "diffusers", "--strict", "--force", "--family", "flux1"]);
    assert_eq!(certain.err, "");
}

#[test]
fn nothing_in_a_file_reaches_the_terminal_raw() {
    let place = Place::new();
    let mut tensors = factors(MODULE, &[]);
    tensors.push(("evil\u{1b}]0;title\u{7}\r\nok".to_owned(), vec![1], 1.0));
    let bytes = file(&[("ss_output_name", "a\u{1b}[2Jb"), ("x\ny", "z")], &borrowed(&tensors));
    place.write("x.safetensors", &bytes);
    for args in [
        &["inspect", "x.safetensors", "--meta", "--color", "always"] as &[&str],
        &["check", "x.safetensors"],
        &["convert", "x.safetensors", "--to", "kohya"],
        &["convert", "x.safetensors", "--to", "kohya", "-n", "--unknown", "keep"],
    ] {
        let ran = place.run(args);
        let all = format!("{}{}", ran.out, ran.err);
        assert!(!all.contains("\u{1b}[2J") && !all.contains("\u{1b}]0") && !all.contains(['\u{7}', '\r']), "{all:?}");
    }
}
