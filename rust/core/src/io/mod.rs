//! Files: reading headers within bounds, mapping bodies, writing whole files or none.

mod header;
mod partial;
mod source;
mod store;
mod walk;
mod write;

pub(crate) use header::parse_head;
pub use header::{Header, MAX_HEADER, TensorInfo, parse};
pub use source::{Beside, Bytes, Source};
pub use store::{Local, Object, Store};
pub use walk::{Found, walk};
pub(crate) use write::write_at;
pub use write::{Control, Layout, Pending, WriteOptions, refuse_existing, write_file, write_to};
