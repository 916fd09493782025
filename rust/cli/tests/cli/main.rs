//! The command line as its users meet it.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
mod convert;
mod help;
mod hostile;
mod human;
mod json;
#[cfg(unix)]
mod signals;
mod sources;
mod tables;
