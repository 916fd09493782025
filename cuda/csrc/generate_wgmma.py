"""Writes ``wgmma.cuh``: one wrapper for each warpgroup product that the kernels use.

An instruction names every accumulator register, so the text is long and regular: ``python generate_wgmma.py`` makes it,
``--check`` says whether the file is what it makes. Syntax: PTX ISA, "wgmma.mma_async".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

#: C++ type of an operand element -> (PTX types and K, what follows the predicate, columns of tiles; rows are 64).
TYPES = {
    "int8_t": ("k32.s32.s8.s8", "", (128, 192, 256)),
    "__nv_bfloat16": ("k16.f32.bf16.bf16", ", 1, 1, 0, 0", (64, 128, 192, 256)),
    "__half": ("k16.f32.f16.f16", ", 1, 1, 0, 0", (64, 128, 192, 256)),
}

HEAD = """// Written by generate_wgmma.py; change that.
//
// Wgmma<T, N>::run(acc, a, b, keep): acc[64, N] = (keep ? acc : 0) + A[64, 32 bytes] * B[N, 32 bytes]^T, issued by
// the 128 threads of a warpgroup. `a` and `b` are descriptors of K-major tiles in shared memory (layout.h). Every
// thread has N / 2 accumulators: integers for bytes, floats for 16-bit operands. Both are words here, so that the one
// can become the other in the same registers; with two arrays the compiler keeps both and spills.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lorafmt {

template <typename T, int N>
struct Wgmma;
"""


def wrapper(operand: str, width: int) -> str:
    ptx, tail, _ = TYPES[operand]
    count = width // 2
    lines = [", ".join(f"%{i}" for i in range(at, min(at + 16, count))) for at in range(0, count, 16)]
    registers = ',"\n            "'.join(lines)
    outputs = [", ".join(f'"+r"(acc[{i}])' for i in range(at, min(at + 6, count))) for at in range(0, count, 6)]
    joined = ",\n              ".join(outputs)
    return f"""
template <>
struct Wgmma<{operand}, {width}> {{
    static __device__ __forceinline__ void run(uint32_t (&acc)[{count}], uint64_t a, uint64_t b, int keep) {{
        asm volatile(
            "{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0;"
            "wgmma.mma_async.sync.aligned.m64n{width}{ptx} {{"
            "{registers}"
            "}}, %{count}, %{count + 1}, p{tail};}}"
            : {joined}
            : "l"(a), "l"(b), "r"(keep));
    }}
}};
"""


def text() -> str:
    return (
        HEAD
        + "".join(wrapper(operand, width) for operand in TYPES for width in TYPES[operand][2])
        + "\n}  // namespace lorafmt\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    path = Path(__file__).with_name("wgmma.cuh")
    if parser.parse_args().check:
        return int(path.read_text() != text())
    path.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
