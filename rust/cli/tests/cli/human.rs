use std::process::Stdio;

use crate::base::Checkpoint;
use crate::common::{MODULE, Place, borrowed, factors, file, ran};

#[test]
fn inspect_of_a_kohya_file() {
    let place = Place::new();
    let metadata = [("ss_output_name", "anime style"), ("ss_base_model_version", "flux1"), ("ss_tag", "x")];
    let tensors = factors(MODULE, &[("alpha", &[], 0.5)]);
    place.write("anime style.safetensors", &file(&metadata, &borrowed(&tensors)));
    insta::assert_snapshot!(place.ok(&["inspect", "anime style.safetensors"]).out);
    let all = place.ok(&["info", "anime style.safetensors", "--meta"]).out;
    assert!(all.contains("ss_tag=x") && !all.contains("--meta"), "{all}");
}

#[test]
fn inspect_of_a_whole_sample() {
    let place = Place::new();
    place.ok(&["sample", "--family", "flux1", "--dialect", "diffusers", "--rank", "1", "-o", "s.safetensors"]);
    insta::assert_snapshot!(place.ok(&["inspect", "s.safetensors"]).out);
}

#[test]
fn inspect_of_a_file_with_problems() {
    let place = Place::new();
    let mut tensors = factors(MODULE, &[]);
    tensors.remove(1);
    tensors.extend((0..7).map(|i| (format!("what.is.this.{i}"), vec![1], 1.0)));
    place.write("x.safetensors", &file(&[], &borrowed(&tensors)));
    insta::assert_snapshot!(place.ok(&["inspect", "x.safetensors"]).out);
}

#[cfg(unix)]
#[test]
fn the_fixes_that_inspect_shows_work() {
    let place = Place::new();
    let mut tensors = factors(MODULE, &[]);
    tensors.push(("something else".to_owned(), vec![1], 1.0));
    place.write("it's x.safetensors", &file(&[], &borrowed(&tensors)));
    let shown = fixes(&place, "it's x.safetensors");
    assert!(shown.iter().all(|fix| fix.starts_with("convert ")), "{shown:?}");
    // Where only plain LoRA is loaded, it is made on the way.
    let key = |slot: &str| format!("{MODULE}.{slot}");
    let lokr = [(key("lokr_w1"), vec![64, 64], 0.25), (key("lokr_w2"), vec![288, 48], 0.5)];
    place.write("lokr.safetensors", &file(&[], &borrowed(&lokr)));
    let shown = fixes(&place, "lokr.safetensors");
    assert!(shown.iter().any(|fix| fix == "expand lokr.safetensors --to diffusers"), "{shown:?}");
}

/// Runs every command that `inspect` shows for a file, and gives them.
#[cfg(unix)]
fn fixes(place: &Place, name: &str) -> Vec<String> {
    let text = place.ok(&["inspect", name]).out;
    let fixes: Vec<String> =
        text.lines().filter_map(|l| l.trim().strip_prefix("fix: lorafmt ")).map(str::to_owned).collect();
    assert!(!fixes.is_empty(), "{text}");
    Checkpoint::default().write(place, "base.safetensors");
    for fix in &fixes {
        let fix = fix.replace("BASE", "base.safetensors");
        let shell = format!("\"$LORAFMT\" {fix} --force");
        let mut command = assert_cmd::Command::new("sh");
        command.args(["-c", &shell]).env("LORAFMT", env!("CARGO_BIN_EXE_lorafmt")).current_dir(place.dir.path());
        let done = ran(&mut command);
        assert_eq!(done.code, 0, "{fix}: {done:?}");
    }
    fixes
}

#[test]
fn what_needs_the_model_says_so() {
    let place = Place::new();
    let mut dora = factors(MODULE, &[]);
    dora.push((format!("{MODULE}.dora_scale"), vec![18432, 1], 1.0));
    place.write("out.safetensors", &file(&[], &borrowed(&dora)));
    dora[2].1 = vec![1, 3072];
    place.write("in.safetensors", &file(&[], &borrowed(&dora)));
    let loader = |file: &str, name: &str| {
        let seen = place.ok(&["inspect", file, "--json"]).json();
        seen["loaders"].as_array().unwrap().iter().find(|l| l["name"] == name).unwrap().clone()
    };
    let asks = |loader: &serde_json::Value| {
        assert_eq!(loader["convert_to"], "diffusers", "{loader}");
        loader["expand"] == true && loader["needs_weights"] == true
    };
    // diffusers holds magnitudes of outputs; stable-diffusion.cpp reads none.
    assert!(!asks(&loader("out.safetensors", "diffusers")));
    assert!(asks(&loader("out.safetensors", "stable-diffusion.cpp")));
    assert!(asks(&loader("in.safetensors", "diffusers")));
    assert!(loader("in.safetensors", "ComfyUI").get("expand").is_none());
    let text = place.ok(&["inspect", "in.safetensors"]).out;
    assert!(text.contains("lorafmt expand in.safetensors --to diffusers --base-weights MODEL --rank RANK"), "{text}");
}

#[test]
fn an_error_says_what_why_and_what_helps() {
    let place = Place::new();
    let missing = place.run(&["inspect", "nope.safetensors"]);
    assert_eq!((missing.code, missing.out.as_str()), (2, ""));
    if cfg!(unix) {
        insta::assert_snapshot!(missing.err);
    }
    place.write("page.safetensors", b"<!DOCTYPE html>");
    insta::assert_snapshot!(place.run(&["inspect", "page.safetensors"]).err);
}

#[test]
fn detect_is_for_scripts() {
    let place = Place::with_x();
    let mut half_known = factors(MODULE, &[]);
    half_known.push(("else".to_owned(), vec![1], 1.0));
    place.write("y.safetensors", &file(&[], &borrowed(&half_known)));
    insta::assert_snapshot!(place.ok(&["detect", "x.safetensors", "y.safetensors"]).out);
}

#[test]
fn formats_is_a_matrix() {
    insta::assert_snapshot!(Place::new().ok(&["formats"]).out);
}

#[test]
fn many_warnings_of_one_code_are_cut_short() {
    let place = Place::new();
    let mut tensors = factors(MODULE, &[]);
    tensors.extend((0..6).map(|i| (format!("what.is.this.{i}"), vec![1], 1.0)));
    place.write("x.safetensors", &file(&[], &borrowed(&tensors)));
    let convert = ["convert", "x.safetensors", "--to", "kohya", "--unknown", "drop", "--force"];
    let short = place.ok(&convert).err;
    assert_eq!(short.matches("warning: [unknown-key] left out").count(), 3);
    assert!(short.contains("warning: [unknown-key] and 3 more"), "{short}");
    let long = place.ok(&[&convert as &[&str], &["-v"]].concat()).err;
    assert_eq!(long.matches("warning: [unknown-key] left out").count(), 6);
    let none = place.ok(&[&convert as &[&str], &["-q"]].concat());
    assert_eq!((none.out.as_str(), none.err.as_str()), ("", ""));
}

#[test]
fn diff_shows_the_worst() {
    let place = Place::with_x();
    place.ok(&["convert", "x.safetensors", "--to", "diffusers", "--strength", "0.5"]);
    let ran = place.run(&["diff", "x.safetensors", "x.diffusers.safetensors"]);
    assert_eq!(ran.code, 1);
    assert!(ran.out.starts_with("differ x.safetensors x.diffusers.safetensors  (1 of 1 module"), "{}", ran.out);
    assert!(ran.out.contains("5.0e-1  differs       transformer.transformer_blocks.0.norm1.linear"), "{}", ran.out);
    let near = place.ok(&["diff", "x.safetensors", "x.diffusers.safetensors", "--tolerance", "0.6"]);
    assert!(near.out.starts_with("same "), "{}", near.out);
}

#[test]
fn colours_only_where_they_are_wanted() {
    let place = Place::with_x();
    let colourful = |args: &[&str], name: &str, value: &str| {
        let seen = ran(place.command(&[&["inspect", "x.safetensors"], args].concat()).env(name, value));
        seen.out.contains('\u{1b}')
    };
    assert!(!colourful(&[], "UNUSED", "1"), "a pipe is no terminal");
    assert!(colourful(&[], "CLICOLOR_FORCE", "1"));
    assert!(colourful(&["--color", "always"], "UNUSED", "1"));
    assert!(!colourful(&["--color", "never"], "CLICOLOR_FORCE", "1"));
    assert!(!colourful(&["--color", "always"], "NO_COLOR", "1"));
    let plain = place.ok(&["inspect", "x.safetensors"]).out;
    let coloured = ran(&mut place.command(&["inspect", "x.safetensors", "--color", "always"])).out;
    assert_eq!(anstream::adapter::strip_str(&coloured).to_string(), plain);
    let help = ran(place.command(&["--help"]).env("NO_COLOR", "1").env("CLICOLOR_FORCE", "1"));
    assert!(!help.out.contains('\u{1b}'));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    place.ok(&["sample", "--family", "flux1", "--dialect", "xlabs", "--rank", "1", "-o", "s.safetensors"]);
    for args in [
        &["inspect", "s.safetensors"] as &[&str],
        &["formats", "--json"],
        &["completions", "bash"],
        &["--help"],
        &["convert", "s.safetensors", "--to", "kohya", "-o", "-"],
        &["convert", "s.safetensors", "--to", "kohya", "-n", "-v"],
    ] {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_lorafmt"))
            .args(args)
            .current_dir(place.dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()), "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_device_is_an_error() {
    let place = Place::with_x();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_lorafmt"))
        .args(["inspect", "x.safetensors"])
        .current_dir(place.dir.path())
        .stdout(full)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: -: cannot write the output"));
}
