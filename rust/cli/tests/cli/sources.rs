use crate::common::{Place, names, tiny};

/// A folder with files at several depths, and what is no adapter.
fn library() -> Place {
    let place = Place::new();
    for name in ["b.safetensors", "a.safetensors", "sub/c.safetensors", "sub/deep/a.safetensors"] {
        place.write(&format!("lib/{name}"), &tiny());
    }
    for name in [".hidden/h.safetensors", ".lorafmt-1.tmp", "readme.txt", "sub/x.bin"] {
        place.write(&format!("lib/{name}"), b"no adapter");
    }
    place
}

fn paths(out: &str) -> Vec<&str> {
    out.lines().filter_map(|l| l.split('\t').next()).collect()
}

#[test]
fn folders_are_walked_in_order() {
    let place = library();
    let found = place.ok(&["detect", "-r", "lib"]);
    let want = ["lib/a.safetensors", "lib/b.safetensors", "lib/sub/c.safetensors", "lib/sub/deep/a.safetensors"];
    assert_eq!(paths(&found.out), want);
    let flat = place.run(&["detect", "lib", "--json"]);
    assert_eq!((flat.code, flat.error_code().as_str()), (2, "is-a-directory"));
    assert!(flat.out.contains("--recursive"));
    std::fs::create_dir(place.path("empty")).unwrap();
    assert_eq!(place.run(&["detect", "-r", "empty", "--json"]).error_code(), "not-found");
}

#[test]
fn the_tree_is_kept_below_the_output_folder() {
    let place = library();
    let convert = ["convert", "-r", "lib", "--to", "diffusers", "--out-dir", "lib/out"];
    let first = place.ok(&convert);
    assert_eq!(first.out.lines().count(), 4);
    assert_eq!(names(&place.path("lib/out")), ["a.diffusers.safetensors", "b.diffusers.safetensors", "sub"]);
    assert!(place.exists("lib/out/sub/deep/a.diffusers.safetensors"));
    // A second run does not take the outputs of the first for inputs.
    assert_eq!(place.ok(&[&convert as &[&str], &["--force"]].concat()).out.lines().count(), 4);
}

#[test]
fn outputs_of_one_run_never_collide() {
    let place = library();
    let args =
        ["convert", "lib/a.safetensors", "lib/sub/deep/a.safetensors", "--to", "kohya", "--out-dir", "out", "--json"];
    let ran = place.run(&args);
    assert_eq!((ran.code, ran.error_code().as_str()), (2, "invalid-argument"));
    let twice = place.run(&["convert", "lib/a.safetensors", "lib/a.safetensors", "--to", "kohya", "--json"]);
    assert_eq!(twice.error_code(), "invalid-argument");
    let one = place.run(&["convert", "-r", "lib", "--to", "kohya", "-o", "o.safetensors", "--json"]);
    assert_eq!(one.error_code(), "invalid-argument");
    assert!(one.out.contains("--out-dir"));
    assert_eq!(place.names(), ["lib"]);
}

#[test]
fn some_of_many_fail() {
    let place = library();
    place.write("lib/bad.safetensors", b"nonsense");
    let ran = place.run(&["convert", "-r", "lib", "--to", "diffusers", "--out-dir", "out"]);
    assert_eq!(ran.code, 3);
    assert_eq!(ran.out.lines().count(), 4);
    assert!(ran.err.contains("error: lib/bad.safetensors: ") && ran.err.contains("4 of 5 files done, 1 failed"));
    let none = place.run(&["convert", "-r", "lib", "--to", "diffusers", "--out-dir", "out"]);
    assert_eq!((none.code, none.out.as_str()), (2, ""));
    let json = place.run(&["convert", "-r", "lib", "--to", "bfl", "--out-dir", "out", "--json"]);
    assert_eq!(json.code, 3);
    let elements = json.json();
    let failed: Vec<&str> = elements.as_array().unwrap().iter().filter_map(|e| e["error"]["code"].as_str()).collect();
    assert_eq!(failed, ["not-safetensors"]);
}

#[cfg(unix)]
#[test]
fn links_are_followed_but_not_in_circles() {
    let place = library();
    std::os::unix::fs::symlink("..", place.path("lib/sub/up")).unwrap();
    std::os::unix::fs::symlink("gone.txt", place.path("lib/dangling.txt")).unwrap();
    std::os::unix::fs::symlink("b.safetensors", place.path("lib/link.safetensors")).unwrap();
    let found = place.ok(&["detect", "-r", "lib"]);
    assert_eq!(paths(&found.out).len(), 5);
    std::os::unix::fs::symlink("gone.safetensors", place.path("lib/dangling.safetensors")).unwrap();
    assert_eq!(place.run(&["detect", "-r", "lib"]).code, 3);
}

#[test]
fn a_peft_folder_needs_no_recursion() {
    let place = Place::with_x();
    place.ok(&["convert", "x.safetensors", "--to", "peft", "-o", "style"]);
    assert_eq!(place.ok(&["detect", "style"]).out, "style/adapter_model.safetensors\tpeft\tflux1\t100%\n");
    assert_eq!(place.ok(&["detect", "-r", "style", "--json"]).json().as_array().unwrap().len(), 1);
}
