//! Loops compiled for the processor that runs them.
//!
//! What is released is compiled for the oldest processor of its architecture. An operation that is given to [`run`] is
//! compiled once more for each of the larger instruction sets, and the one that the processor has is taken. Only what
//! is inlined into the operation gains, so its functions are `#[inline(always)]`.

pub(crate) use pulp::{Simd, WithSimd};

/// Runs an operation with the widest vectors there are.
pub(crate) fn run<Op: WithSimd>(op: Op) -> Op::Output {
    pulp::Arch::new().dispatch(op)
}
