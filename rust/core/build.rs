//! Lists the tables under `data/`, so that adding one is adding a file, and the words in them, by which a key shows which
//! families it may be of before any of their tables is read.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs};

#[path = "src/table/words.rs"]
mod words;

fn main() {
    println!("cargo::rerun-if-changed=data");
    println!("cargo::rerun-if-changed=src/table/words.rs");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("data");
    let mut out = String::new();
    for folder in ["components", "families", "dialects"] {
        println!("cargo::rerun-if-changed=data/{folder}");
        out += &format!("const {}: &[Listed] = &[\n", folder.to_uppercase());
        for file in tables(&root.join(folder)) {
            let name = file.file_stem().expect("a file").to_string_lossy().into_owned();
            let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            let all: BTreeSet<&str> = words::words(&text).collect();
            let all: Vec<&str> = all.into_iter().collect();
            let path = file.display().to_string();
            out += &format!("    Listed {{ name: {name:?}, text: include_str!({path:?}), words: &{all:?} }},\n");
        }
        out += "];\n";
    }
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("tables.rs");
    fs::write(target, out).expect("the build folder can be written");
}

/// The TOML files of a folder, by name.
fn tables(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("readable").path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "toml"));
    files.sort();
    files
}
