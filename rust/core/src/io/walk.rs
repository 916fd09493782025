//! Files below a folder.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A file that was found, or what could not be looked at.
#[derive(Debug)]
pub enum Found {
    /// A file.
    File(PathBuf),
    /// A folder that cannot be listed, or a link to nowhere.
    Unreadable(PathBuf, ErrorKind),
}

/// All files below a folder but those below `skip`, in the order of their names. Hidden ones are passed over; links are
/// followed, loops of links are not.
pub fn walk(root: &Path, skip: Option<&Path>) -> impl Iterator<Item = Found> + use<> {
    let skip = skip.and_then(|s| s.canonicalize().ok()).filter(|s| root.canonicalize().is_ok_and(|r| r != *s));
    let mut builder = ignore::WalkBuilder::new(root);
    builder.standard_filters(false).hidden(true).follow_links(true).sort_by_file_name(Ord::cmp);
    builder.filter_entry(move |entry| {
        let skipped = |s: &PathBuf| entry.path().is_dir() && entry.path().canonicalize().is_ok_and(|p| p == *s);
        !skip.as_ref().is_some_and(skipped)
    });
    builder.build().filter_map(|entry| match entry {
        Ok(entry) => entry.file_type().is_some_and(|t| t.is_file()).then(|| Found::File(entry.into_path())),
        // A loop has no error of the system.
        Err(error) => Some(Found::Unreadable(path_of(&error)?.to_path_buf(), error.io_error()?.kind())),
    })
}

fn path_of(error: &ignore::Error) -> Option<&Path> {
    match error {
        ignore::Error::WithPath { path, .. } => Some(path),
        ignore::Error::WithDepth { err, .. } | ignore::Error::WithLineNumber { err, .. } => path_of(err),
        _ => None,
    }
}
