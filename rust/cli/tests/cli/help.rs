use crate::common::{Place, command, ran};

const COMMANDS: [&str; 19] = [
    "inspect",
    "detect",
    "check",
    "convert",
    "compose",
    "resize",
    "normalize",
    "expand",
    "fuse",
    "unfuse",
    "extract",
    "scale",
    "diff",
    "report",
    "quantize",
    "sample",
    "formats",
    "completions",
    "man",
];

#[test]
fn help_of_lorafmt() {
    let place = Place::new();
    insta::assert_snapshot!(place.ok(&["-h"]).out);
}

#[test]
fn every_command_has_examples_and_fits_a_screen() {
    for name in COMMANDS {
        for flag in ["-h", "--help"] {
            let help = ran(command().env("COLUMNS", "80").args([name, flag]));
            assert_eq!((help.code, help.err.as_str()), (0, ""), "{name}");
            let (_, examples) = help.out.split_once("Examples:\n").unwrap_or_else(|| panic!("{name} has no examples"));
            let lines = examples.lines().filter(|l| l.contains("lorafmt ")).count();
            assert!((2..=4).contains(&lines), "{name}: {lines} examples");
            let narrow = |l: &str| l.chars().count() <= 80 || l.starts_with("Usage: ");
            assert!(help.out.lines().all(narrow), "{name} is wide: {}", help.out);
            if flag == "-h" {
                assert!(help.out.lines().count() <= 50, "{name} is long");
            }
        }
    }
}

#[test]
fn examples_are_understood() {
    use std::ffi::OsString;
    for name in COMMANDS {
        let help = ran(command().args([name, "--help"])).out;
        let (_, examples) = help.split_once("Examples:\n").unwrap();
        for line in examples.lines().flat_map(|l| l.split(['|', '>', '&'])) {
            let Some(args) = line.trim().strip_prefix("lorafmt ") else { continue };
            let args = args.split_whitespace().map(|a| a.trim_matches('\''));
            let matches =
                lorafmt::command().try_get_matches_from(["lorafmt"].into_iter().chain(args).map(OsString::from));
            assert!(matches.is_ok(), "`{line}` in {name}: {}", matches.unwrap_err());
        }
    }
}

#[test]
fn version_and_no_arguments() {
    let place = Place::new();
    for flag in ["--version", "-V"] {
        assert_eq!(place.ok(&[flag]).out, concat!("lorafmt ", env!("CARGO_PKG_VERSION"), "\n"));
    }
    let bare = place.run(&[]);
    assert_eq!((bare.code, bare.out.as_str()), (2, ""));
    assert!(bare.err.contains("Usage"), "{}", bare.err);
}

#[test]
fn completions_and_manual() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = place.ok(&["completions", shell]).out;
        assert!(script.contains("convert") && script.contains("dry-run"), "{shell}");
    }
    assert!(place.ok(&["man"]).out.contains(".TH lorafmt"));
    let page = place.ok(&["man", "convert"]).out;
    assert!(page.contains("lorafmt\\-convert") && page.contains("Examples"), "{page}");
    assert_eq!(place.ok(&["man", "--json"]).json()["schema"], 1);
    assert_eq!(place.run(&["man", "nothing"]).code, 2);
}
