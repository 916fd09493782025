//! Ctrl-C.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Place, names, tiny};

fn start(place: &Place, args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_lorafmt"))
        .args(args)
        .current_dir(place.dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until the folder holds a name like this, then presses Ctrl-C.
fn interrupt_when(child: &Child, folder: &Path, found: impl Fn(&str) -> bool) {
    let started = Instant::now();
    while !(folder.is_dir() && names(folder).iter().any(|n| found(n))) {
        assert!(started.elapsed() < Duration::from_secs(20), "nothing was begun");
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
}

#[test]
fn one_file_leaves_nothing_behind() {
    let place = Place::new();
    place.ok(&["sample", "--family", "flux1", "--dialect", "kohya", "--rank", "12", "-o", "x.safetensors"]);
    for json in [false, true] {
        let mut args = vec!["convert", "x.safetensors", "--to", "diffusers", "--dtype", "fp32", "--jobs", "1"];
        args.extend(json.then_some("--json"));
        let child = start(&place, &args);
        interrupt_when(&child, place.dir.path(), |name| name.ends_with(".tmp"));
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        assert_eq!(place.names(), ["x.safetensors"]);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if json {
            let value: serde_json::Value = serde_json::from_str(&out).unwrap();
            assert_eq!((&value["error"]["code"], err.as_ref()), (&"interrupted".into(), ""));
        } else {
            assert_eq!((out.as_ref(), err.lines().next().unwrap()), ("", "error: x.safetensors: interrupted"));
        }
    }
}

#[test]
fn a_composition_leaves_nothing_behind() {
    let place = Place::new();
    place.ok(&["sample", "--family", "flux1", "--dialect", "kohya", "--rank", "12", "-o", "x.safetensors"]);
    let child = start(
        &place,
        &["compose", "x.safetensors:2", "-o", "y.safetensors", "--dtype", "fp32", "--jobs", "1", "--json"],
    );
    interrupt_when(&child, place.dir.path(), |name| name.ends_with(".tmp"));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert_eq!(place.names(), ["x.safetensors"]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&value["error"]["code"], output.stderr.as_slice()), (&"interrupted".into(), b"" as &[u8]));
}

#[test]
fn of_many_files_the_finished_ones_stay() {
    let place = Place::new();
    place.write("lib/0.safetensors", &tiny());
    for i in 1..1000 {
        std::fs::hard_link(place.path("lib/0.safetensors"), place.path(&format!("lib/{i}.safetensors"))).unwrap();
    }
    let child = start(&place, &["convert", "-r", "lib", "--to", "diffusers", "--out-dir", "out"]);
    interrupt_when(&child, &place.path("out"), |name| name.ends_with(".safetensors"));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let done = names(&place.path("out"));
    assert!(!done.is_empty() && done.len() < 1000, "{}", done.len());
    assert!(done.iter().all(|n| n.ends_with(".diffusers.safetensors")), "{done:?}");
    let first = place.path("out").join(&done[0]);
    place.ok(&["check", first.to_str().unwrap()]);
}

#[test]
fn waiting_for_input_ends_at_once() {
    let place = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorafmt"));
    let mut child = command
        .args(["convert", "-", "--to", "kohya", "-o", "x.safetensors"])
        .current_dir(place.dir.path())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // Held open: waiting for the child would close it.
    let _stdin = child.stdin.take();
    std::thread::sleep(Duration::from_millis(300));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(place.names().is_empty());
}
