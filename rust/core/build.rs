//! Lists the tables under `data/`, so that adding one is adding a file.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=data");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("data");
    let mut out = String::new();
    for folder in ["components", "families", "dialects"] {
        println!("cargo::rerun-if-changed=data/{folder}");
        out += &format!("const {}: &[(&str, &str)] = &[\n", folder.to_uppercase());
        for file in tables(&root.join(folder)) {
            let name = file.file_name().expect("a file").to_string_lossy().into_owned();
            out +=
                &format!("    ({:?}, include_str!({:?})),\n", format!("{folder}/{name}"), file.display().to_string());
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
