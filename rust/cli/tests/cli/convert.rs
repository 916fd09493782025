use crate::common::{Place, command, ran, tiny};

#[test]
fn writes_beside_the_source_and_never_twice() {
    let place = Place::with_x();
    let first = place.ok(&["convert", "x.safetensors", "--to", "diffusers"]);
    assert!(
        first.out.starts_with("wrote x.diffusers.safetensors  (kohya -> diffusers, flux1, 1 module, 3 tensors used")
    );
    assert_eq!(first.err, "");
    let written = place.read("x.diffusers.safetensors");
    let again = place.run(&["convert", "x.safetensors", "--to", "diffusers", "--strength", "2"]);
    assert_eq!((again.code, again.out.as_str()), (2, ""));
    assert!(again.err.contains("--force"), "{}", again.err);
    assert_eq!(place.run(&["convert", "x.safetensors", "--to", "diffusers", "--json"]).error_code(), "output-exists");
    assert_eq!(place.read("x.diffusers.safetensors"), written);
    place.ok(&["convert", "x.safetensors", "--to", "diffusers", "--strength", "2", "--force"]);
    assert_ne!(place.read("x.diffusers.safetensors"), written);
    assert_eq!(place.names(), ["x.diffusers.safetensors", "x.safetensors"]);
}

#[test]
fn aliases_give_the_name_of_the_dialect() {
    let place = Place::with_x();
    place.ok(&["convert", "x.safetensors", "--to", "civitai"]);
    assert_eq!(place.names(), ["x.kohya.safetensors", "x.safetensors"]);
    assert_eq!(place.read("x.kohya.safetensors").len() % 8, place.read("x.safetensors").len() % 8);
}

#[test]
fn the_source_is_never_the_output() {
    let place = Place::with_x();
    let before = place.read("x.safetensors");
    for force in [&[] as &[&str], &["--force"]] {
        let args = ["convert", "x.safetensors", "--to", "kohya", "-o", "./x.safetensors", "--json"];
        let ran = place.run(&[&args, force].concat());
        assert_eq!((ran.code, ran.error_code().as_str()), (2, "same-file"));
    }
    // One output that is another input.
    place.write("x.kohya.safetensors", &tiny());
    let both = ["convert", "x.safetensors", "x.kohya.safetensors", "--to", "kohya", "--force", "--json"];
    assert_eq!(place.run(&both).error_code(), "same-file");
    assert_eq!(place.read("x.safetensors"), before);
    assert_eq!(place.names(), ["x.kohya.safetensors", "x.safetensors"]);
}

#[test]
fn a_dry_run_writes_nothing() {
    let place = Place::with_x();
    let plan = place.ok(&["convert", "x.safetensors", "--to", "comfyui", "--out-dir", "new", "--dry-run"]);
    assert!(plan.out.starts_with("would write new/x.comfyui.safetensors"), "{}", plan.out);
    assert!(plan.out.contains("diffusion_model.double_blocks.0.img_mod.lin.lora_down.weight"), "{}", plan.out);
    assert!(plan.out.contains("F32 [1, 3072]"), "{}", plan.out);
    place.ok(&["sample", "--family", "flux1", "--dialect", "xlabs", "--rank", "1", "-o", "s.safetensors", "-n"]);
    place.ok(&["convert", "x.safetensors", "--to", "peft", "-o", "folder", "-n"]);
    assert_eq!(place.names(), ["x.safetensors"]);
    // What stands in the way is said, and does not.
    place.ok(&["convert", "x.safetensors", "--to", "comfyui"]);
    let taken = place.ok(&["convert", "x.safetensors", "--to", "comfyui", "-n"]);
    assert!(taken.err.contains("warning: [output-exists]"), "{}", taken.err);
    let forced = place.ok(&["convert", "x.safetensors", "--to", "comfyui", "-n", "--force"]);
    assert_eq!(forced.err, "");
}

#[test]
fn peft_as_a_folder_and_as_a_file() {
    let place = Place::with_x();
    place.ok(&["convert", "x.safetensors", "--to", "peft", "-o", "style"]);
    assert_eq!(crate::common::names(&place.path("style")), ["adapter_config.json", "adapter_model.safetensors"]);
    place.ok(&["convert", "x.safetensors", "--to", "peft"]);
    place.ok(&["diff", "style", "x.peft.safetensors"]);
    place.ok(&["diff", "x.safetensors", "style"]);
    assert_eq!(place.run(&["convert", "x.safetensors", "--to", "peft", "-o", "style"]).code, 2);
    // The folder is the source: its name is the stem, and the output goes beside it.
    place.ok(&["convert", "style", "--to", "kohya"]);
    assert!(place.exists("style.kohya.safetensors"));
    place.ok(&["diff", "x.safetensors", "style.kohya.safetensors"]);
}

#[test]
fn from_pipe_to_pipe() {
    let place = Place::with_x();
    place.ok(&["convert", "x.safetensors", "--to", "diffusers"]);
    let x = place.read("x.safetensors");
    let piped =
        place.command(&["convert", "-", "--to", "diffusers", "-o", "-"]).write_stdin(x.clone()).output().unwrap();
    assert!(piped.status.success());
    assert_eq!(piped.stdout, place.read("x.diffusers.safetensors"));
    assert!(String::from_utf8_lossy(&piped.stderr).starts_with("wrote -  ("));
    let quiet = place.command(&["convert", "x.safetensors", "--to", "diffusers", "-o", "-", "-q"]).output().unwrap();
    assert_eq!((quiet.stdout, quiet.stderr.as_slice()), (piped.stdout, b"" as &[u8]));

    let nameless = ran(place.command(&["convert", "-", "--to", "kohya", "--json"]).write_stdin(x.clone()));
    assert_eq!((nameless.code, nameless.error_code().as_str()), (2, "invalid-argument"));
    assert!(nameless.out.contains("`-o`"));
    ran(place.command(&["convert", "-", "--to", "kohya", "-o", "named.safetensors"]).write_stdin(x.clone()));
    assert!(place.exists("named.safetensors"));
    let detected = ran(place.command(&["detect", "-"]).write_stdin(x));
    assert_eq!(detected.out, "-\tkohya\tflux1\t100%\n");
    assert_eq!(place.run(&["inspect", "-", "-"]).code, 2);
}

#[test]
fn an_output_that_cannot_be() {
    let place = Place::with_x();
    let code = |args: &[&str]| place.run(&[&["convert", "x.safetensors", "--to", "kohya", "--json"], args].concat());
    assert_eq!(code(&["-o", "no/such/folder/y.safetensors"]).error_code(), "not-found");
    assert_eq!(code(&["-o", "."]).error_code(), "is-a-directory");
    assert_eq!(code(&["--out-dir", "x.safetensors"]).error_code(), "invalid-argument");
    assert_eq!(code(&["-o", "a.safetensors", "--out-dir", "b"]).error_code(), "invalid-argument");
    if cfg!(unix) {
        assert_eq!(code(&["-o", "/dev/null", "--force"]).error_code(), "invalid-argument");
    }
    assert_eq!(place.names(), ["x.safetensors"]);
}

#[test]
fn options_reach_the_engine() {
    let place = Place::with_x();
    let report = |args: &[&str]| {
        place.ok(&[&["convert", "x.safetensors", "--to", "diffusers", "--json", "--force"], args].concat()).json()
    };
    assert_eq!(report(&["--dtype", "bf16"])["fidelity"], "approximate");
    assert_eq!(report(&["--dtype", "fp32"])["fidelity"], "rescaled");
    assert_eq!(report(&["--family", "flux1", "--from", "sd-scripts"])["source"]["family"], "flux1");
    let wrong =
        place.run(&["convert", "x.safetensors", "--to", "diffusers", "--family", "chroma", "--force", "--json"]);
    assert_eq!((wrong.code, wrong.error_code().as_str()), (2, "unknown-family"));
    place.ok(&["sample", "--family", "chroma", "--dialect", "kohya", "--rank", "1", "-o", "c.safetensors"]);
    assert_eq!(place.run(&["convert", "c.safetensors", "--to", "xlabs", "--json"]).error_code(), "unsupported-target");
    place.ok(&["convert", "x.safetensors", "--to", "bfl", "-n", "--lossy", "error", "--jobs", "1"]);
    let threads = |n: &str| ran(place.command(&["check", "x.safetensors"]).env("LORAFMT_NUM_THREADS", n)).code;
    assert_eq!((threads("1"), threads("0"), threads("many")), (0, 2, 2));
}

/// Names that two families share do not make one the other: shapes tell, and the message says which fits.
#[test]
fn a_family_with_other_shapes_is_not_taken_for_the_named_one() {
    let place = Place::new();
    place.ok(&["sample", "--family", "sdxl", "--dialect", "kohya", "--rank", "1", "-o", "x.safetensors"]);
    for (family, fits) in [("sd15", "sdxl"), ("sd21", "sdxl"), ("flux1", "sdxl")] {
        let ran = place.run(&["convert", "x.safetensors", "--to", "diffusers", "--family", family, "--json"]);
        assert_eq!((ran.code, ran.error_code().as_str()), (2, "unknown-family"), "{family}");
        let message = ran.json()["error"]["message"].to_string();
        assert!(message.contains(family) && message.contains(&format!("{fits} explains")), "{message}");
    }
}

#[test]
fn xlabs_cannot_hold_a_modulation() {
    let place = Place::with_x();
    let strict = place.run(&["convert", "x.safetensors", "--to", "xlabs", "--json"]);
    assert_eq!((strict.code, strict.error_code().as_str()), (2, "unsupported-module"));
    assert!(strict.out.contains("--lossy allow"));
    // Nothing would be left.
    let lossy = place.run(&["convert", "x.safetensors", "--to", "xlabs", "--lossy", "allow", "--json"]);
    assert_eq!((lossy.code, lossy.error_code().as_str()), (2, "no-modules"));
}

#[test]
fn a_sample_is_what_it_says() {
    let place = Place::new();
    let sample = |more: &[&str]| {
        let args = ["sample", "--family", "chroma", "--dialect", "kohya", "--rank", "1", "--dtype", "fp16", "--json"];
        place.run(&[&args, more].concat())
    };
    let made = sample(&["-o", "s.safetensors", "--alpha", "0.5"]);
    assert_eq!(made.json()["target"]["bytes"], place.read("s.safetensors").len());
    assert_eq!(sample(&["-o", "s.safetensors"]).error_code(), "output-exists");
    sample(&["-o", "t.safetensors", "--alpha", "0.5"]);
    sample(&["-o", "u.safetensors", "--alpha", "0.5", "--seed", "1"]);
    assert_eq!(place.read("s.safetensors"), place.read("t.safetensors"));
    assert_ne!(place.read("s.safetensors"), place.read("u.safetensors"));
    let seen = place.ok(&["inspect", "s.safetensors", "--json"]).json();
    assert_eq!(
        (&seen["family"], &seen["rank"], &seen["dtypes"]["F16"]),
        (&"chroma".into(), &1.into(), &seen["dtypes"]["F16"])
    );
    // The command of the help: into a pipe.
    let piped = ran(command().args(["sample", "--family", "chroma", "--dialect", "kohya", "--rank", "0", "-o", "-"]));
    assert_eq!((piped.code, piped.out.as_str()), (2, ""));
}
