//! The engine of lorafmt: everything that is true without a network, a terminal or Python.
//!
//! A file is opened as a [`io::Source`], read through the tables of a [`table::Registry`] into an [`adapter::Adapter`]
//! whose tensors are lazy descriptions ([`tensor::Tensor`]), and encoded for a dialect as a [`plan::Plan`] that a
//! thread pool writes. Operations between reading and encoding know no key, no dialect and no family.

#![deny(unsafe_code)]

pub mod adapter;
pub mod alpha;
pub mod batch;
pub mod cast;
pub mod check;
pub mod compose;
pub mod convert;
pub mod decode;
pub mod detect;
pub mod dtype;
pub mod encode;
pub mod error;
pub mod inspect;
pub mod io;
pub mod kind;
pub mod library;
pub mod linalg;
pub mod meta;
pub mod native;
pub mod ops;
pub mod page;
pub mod plan;
mod pool;
pub mod random;
pub mod recipe;
pub mod report;
pub mod sample;
mod simd;
pub mod strength;
pub mod table;
pub mod tensor;
pub mod weights;

pub use error::{Code, Error, Result};
