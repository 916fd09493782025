// quantize_down: int8 x with a scale for each row, and t = (x @ down^T) * strength.
//
// A block has 32 rows of x. It walks K in tiles of 64: x and down come through a ring of tiles in shared memory, eight
// warps multiply them (2 row halves x 4 rank quarters) while every thread looks for the largest magnitude of its own
// 16 bytes. A second walk reads the same rows again, now out of the second-level cache, and writes the codes. Sums have
// a fixed order and there are no atomics, so two runs agree in every bit.
#include "launch.h"
#include "prologue.cuh"

namespace lorafmt {
namespace {

constexpr int kRows = 32;
constexpr int kThreads = 256;
constexpr int kTileK = kRowBytes / 2;  // 16-bit values in a row of a tile
constexpr int kMaxRankTiles = 4;       // more ranks are other blocks (grid.y)

// Tiles in flight: as many as fit into 96 KB, the least that a chip offers.
LORAFMT_BOTH constexpr int stages_of(int rank_tiles) {
    const int bytes = (kRows + rank_tiles * kRankTile) * kRowBytes;
    const int fit = 96 * 1024 / bytes;
    return fit > 8 ? 8 : fit;
}

LORAFMT_BOTH constexpr int shared_bytes(int rank_tiles) {
    return stages_of(rank_tiles) * (kRows + rank_tiles * kRankTile) * kRowBytes;
}

template <typename T, int RANK_TILES>
__global__ void __launch_bounds__(kThreads) prologue(QuantizeDown p) {
    constexpr int kStages = stages_of(RANK_TILES);
    constexpr int kDownRows = RANK_TILES * kRankTile;
    constexpr int kStageBytes = (kRows + kDownRows) * kRowBytes;
    constexpr int kRankTiles8 = 2 * RANK_TILES;  // 8-rank columns of a warp
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float row_factor[kRows];

    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int first_row = blockIdx.x * kRows;
    const int first_rank = blockIdx.y * kMaxRankTiles * kRankTile;
    const T* x = static_cast<const T*>(p.x);
    const T* down = static_cast<const T*>(p.down);
    const int active = p.active == nullptr ? p.rank : min(max(*p.active, 0), p.rank);
    const int ranks = min(active - first_rank, kDownRows);  // of this block; may be negative

    // The thread's own 16 bytes of every tile of x.
    const int row = thread >> 3, chunk = thread & 7;
    const bool row_valid = first_row + row < p.rows;
    const T* source = x + static_cast<int64_t>(row_valid ? first_row + row : 0) * p.width;
    const uint32_t base = shared_address(shared);
    const int tiles = ceil_div(p.width, kTileK);

    auto fetch = [&](int tile) {
        if (tile < tiles) {
            const uint32_t stage = base + (tile % kStages) * kStageBytes;
            const int k = tile * kTileK + chunk * 8;
            const bool inside = k < p.width;
            copy_async(stage + chunk_offset(row, chunk), source + (inside ? k : 0), row_valid && inside);
#pragma unroll
            for (int i = 0; i < kDownRows / kRows; ++i) {
                const int rank = row + i * kRows;
                const bool valid = rank < ranks && inside;
                const T* from = valid ? down + static_cast<int64_t>(first_rank + rank) * p.width + k : down;
                copy_async(stage + chunk_offset(kRows + rank, chunk), from, valid);
            }
        }
        copy_commit();
    };

    float acc[kRankTiles8 > 0 ? kRankTiles8 : 1][4] = {};
    uint32_t largest = 0;
    const int row_half = warp & 1, quarter = warp >> 1;

#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<kStages - 2>();
        __syncthreads();
        fetch(tile + kStages - 1);
        const int slot = (tile % kStages) * kStageBytes;
        const uint4 raw = *reinterpret_cast<const uint4*>(shared + slot + chunk_offset(row, chunk));
        const int k = tile * kTileK + chunk * 8;
        if (k < p.width) {
            largest = largest_of<T>(raw, p.inv_smooth, k, largest);
        }
        if constexpr (RANK_TILES > 0) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint32_t a[4];
                const int a_row = row_half * 16 + a_lane_row(lane);
                load_matrices(a, base + slot + chunk_offset(a_row, 2 * step + a_lane_chunk(lane)));
#pragma unroll
                for (int j = 0; j < RANK_TILES; ++j) {
                    uint32_t b[4];
                    const int b_row = kRows + (quarter * RANK_TILES + j) * 16 + b_lane_row(lane);
                    load_matrices(b, base + slot + chunk_offset(b_row, 2 * step + b_lane_chunk(lane)));
                    Mma<T>::run(acc[2 * j], a, b[0], b[1]);
                    Mma<T>::run(acc[2 * j + 1], a, b[2], b[3]);
                }
            }
        }
    }
    copy_wait<0>();

    if constexpr (RANK_TILES > 0) {
        T* t = static_cast<T*>(p.t);
#pragma unroll
        for (int j = 0; j < kRankTiles8; ++j) {
            const int rank = first_rank + quarter * RANK_TILES * 16 + j * 8 + fragment_column(lane, 0);
            if (rank >= p.rank) continue;  // R is a multiple of 8, so both of a pair are inside or none
            const float s0 = rank < active ? p.strength[rank] : 0.0f;
            const float s1 = rank + 1 < active ? p.strength[rank + 1] : 0.0f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int m = first_row + row_half * 16 + fragment_row(lane, 2 * half);
                if (m >= p.rows) continue;
                const uint32_t pair =
                    pack_pair<T>(__fmul_rn(acc[j][2 * half], s0), __fmul_rn(acc[j][2 * half + 1], s1));
                *reinterpret_cast<uint32_t*>(t + static_cast<int64_t>(m) * p.rank + rank) = pair;
            }
        }
    }
    if (blockIdx.y != 0) return;

    // The eight threads of a row are neighbours.
#pragma unroll
    for (int step = 1; step < 8; step *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    const float amax = __uint_as_float(max(largest, magnitude(kTiny)));
    if (chunk == 0) {
        row_factor[row] = __fdiv_rn(kLimit, amax);
        if (row_valid) p.xscale[first_row + row] = __fdiv_rn(amax, kLimit);
    }
    __syncthreads();

    // Each warp writes four whole rows, 8 codes to a lane.
    for (int r = warp * 4; r < warp * 4 + 4 && first_row + r < p.rows; ++r) {
        const float factor = row_factor[r];
        const int64_t offset = static_cast<int64_t>(first_row + r) * p.width;
#pragma unroll 4
        for (int k = lane * 8; k < p.width; k += 256) {
            const uint4 raw = *reinterpret_cast<const uint4*>(x + offset + k);
            *reinterpret_cast<uint2*>(p.xq + offset + k) = eight_codes<T>(raw, p.inv_smooth, k, factor);
        }
    }
}

template <typename T, int RANK_TILES>
cudaError_t launch(const QuantizeDown& call, cudaStream_t stream) {
    auto kernel = prologue<T, RANK_TILES>;
    constexpr int bytes = shared_bytes(RANK_TILES);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const int per_block = kMaxRankTiles * kRankTile;
    const dim3 grid(ceil_div(call.rows, kRows), call.rank == 0 ? 1 : ceil_div(call.rank, per_block));
    kernel<<<grid, kThreads, bytes, stream>>>(call);
    return cudaGetLastError();
}

template <typename T>
cudaError_t by_rank(const QuantizeDown& call, cudaStream_t stream) {
    switch (ceil_div(call.rank, kRankTile)) {
        case 0:
            return launch<T, 0>(call, stream);
        case 1:
            return launch<T, 1>(call, stream);
        case 2:
            return launch<T, 2>(call, stream);
        case 3:
            return launch<T, 3>(call, stream);
        default:
            return launch<T, kMaxRankTiles>(call, stream);
    }
}

}  // namespace

cudaError_t quantize_down(const QuantizeDown& call, cudaStream_t stream) {
    return call.type == Half::float16 ? by_rank<__half>(call, stream) : by_rank<__nv_bfloat16>(call, stream);
}

}  // namespace lorafmt
