//! The command line as its users meet it.

#![allow(clippy::unwrap_used, missing_docs)]

mod base;
mod checkpoints;
mod common;
mod compose;
mod convert;
mod expand;
mod help;
mod hostile;
mod human;
mod json;
mod merge;
mod native;
mod recipes;
mod report;
mod scale;
#[cfg(unix)]
mod signals;
mod sources;
mod strength;
mod tables;
mod weights;
