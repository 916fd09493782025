// Where things lie: constexpr functions that kernels and a plain C++ compiler share.
//
// A tile in shared memory is a stack of rows of 128 bytes: 128 int8 or 64 16-bit values of K. Byte rows and rank rows
// have the same shape, which is why the low-rank branch is nothing but some more tiles. Inside a row the 16-byte chunks
// are exchanged (chunk ^ row mod 8), so that eight rows of one chunk lie in eight different groups of banks; it is the
// 128-byte swizzle of the tensor memory accelerator, in atoms of 8 rows (1024 bytes).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LORAFMT_BOTH __host__ __device__
#else
#define LORAFMT_BOTH
#endif

namespace lorafmt {

constexpr int kRowBytes = 128;                    // of a tile in shared memory
constexpr int kChunkBytes = 16;                   // of one access, and of one row of an 8 x 8 matrix of ldmatrix
constexpr int kChunks = kRowBytes / kChunkBytes;  // in a row
constexpr int kStepBytes = 32;                    // of K that one matrix instruction takes
constexpr int kSteps = kRowBytes / kStepBytes;    // instructions in a row
constexpr int kRankTile = kRowBytes / 2;          // ranks in a row

template <typename T>
LORAFMT_BOTH constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// Byte offset of a 16-byte chunk of a row in a tile.
LORAFMT_BOTH constexpr int chunk_offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// Which row and chunk a lane names for ldmatrix.x4 of a 16-row, 32-byte operand: matrices 0..3 are rows 0-7 and 8-15 of
// the first 16 bytes, then of the second. That is the A fragment of m16n8k32 (bytes) and of m16n8k16 (16-bit).
LORAFMT_BOTH constexpr int a_lane_row(int lane) { return lane & 15; }
LORAFMT_BOTH constexpr int a_lane_chunk(int lane) { return lane >> 4; }

// The same for two B operands of 8 columns beside each other: matrices 0 and 1 are both halves of K for columns 0-7,
// matrices 2 and 3 for columns 8-15.
LORAFMT_BOTH constexpr int b_lane_row(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
LORAFMT_BOTH constexpr int b_lane_chunk(int lane) { return (lane >> 3) & 1; }

// Accumulators of m16n8: element i (0..3) of a lane is row fragment_row, column fragment_column.
LORAFMT_BOTH constexpr int fragment_row(int lane, int i) { return (lane >> 2) + ((i >> 1) << 3); }
LORAFMT_BOTH constexpr int fragment_column(int lane, int i) { return ((lane & 3) << 1) + (i & 1); }

// Accumulators of a warpgroup's 64 x N product: thread 0..127, element i of N / 2.
LORAFMT_BOTH constexpr int group_row(int thread, int i) {
    return (thread >> 5) * 16 + fragment_row(thread & 31, i & 3);
}
LORAFMT_BOTH constexpr int group_column(int thread, int i) {
    return ((i >> 2) << 3) + fragment_column(thread & 31, i & 3);
}

// Descriptor of a K-major tile with the 128-byte swizzle for wgmma: address / 16 in bits 0-13, distance of two atoms of
// 8 rows / 16 in bits 32-45, swizzle 1 in bits 62-63. `address` is that of shared memory and a multiple of 1024, plus
// the step of K in bytes.
LORAFMT_BOTH constexpr uint64_t tile_descriptor(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (uint64_t{1} << 16) |
           (static_cast<uint64_t>(8 * kRowBytes >> 4) << 32) | (uint64_t{1} << 62);
}

// Order of output tiles: groups of `height` row tiles are walked column by column, so that the tiles that run at one
// time share rows of both operands in the second-level cache. `index` counts from 0 to rows * columns - 1.
struct TileAt {
    int row, column;
};
LORAFMT_BOTH constexpr TileAt tile_at(int index, int rows, int columns, int height) {
    const int band = index / (height * columns);
    const int first = band * height;
    const int tall = rows - first < height ? rows - first : height;
    const int within = index - band * height * columns;
    return TileAt{first + within % tall, within / tall};
}

}  // namespace lorafmt
