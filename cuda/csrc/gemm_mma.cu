// linear_w8a8 with mma.sync: every chip from sm_80 on.
//
// A block has an output tile of 128 x 128, four warps of 64 x 64. K comes in rows of 128 bytes through a ring of three
// tiles of both operands (96 KB). The last tiles of the walk are not bytes but ranks: 64 values of t and of up, in the
// same shape, multiplied into the same accumulators after these were rescaled in place.
#include "device.cuh"
#include "launch.h"

namespace lorafmt {
namespace {

constexpr int kTileM = 128, kTileN = 128;
constexpr int kWarpM = 64, kWarpN = 64;
constexpr int kThreads = 128;
constexpr int kStages = 3;
constexpr int kStageBytes = (kTileM + kTileN) * kRowBytes;
constexpr int kSharedBytes = kStages * kStageBytes;
constexpr int kBand = 8;  // row tiles that are walked together
constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;

union Accumulators {
    int32_t i[kFragmentsM][kFragmentsN][4];
    float f[kFragmentsM][kFragmentsN][4];
};

// Brings 128 bytes of each of 128 rows: `from` is the operand, `pitch` its bytes in a row, `at` the byte in the row.
__device__ __forceinline__ void fetch_rows(uint32_t target, const void* from, int64_t pitch, int first, int rows,
                                           int at) {
    const int chunk = threadIdx.x & 7;
    const bool inside = at + chunk * kChunkBytes < pitch;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int row = (threadIdx.x >> 3) + i * 16;
        const bool valid = inside && first + row < rows;
        const uint8_t* source = static_cast<const uint8_t*>(from);
        if (valid) source += (first + row) * pitch + at + chunk * kChunkBytes;
        copy_async(target + chunk_offset(row, chunk), source, valid);
    }
}

template <typename T, typename Acc>
__device__ __forceinline__ void multiply(Acc (&acc)[kFragmentsM][kFragmentsN][4], uint32_t stage, int warp_m,
                                         int warp_n) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        uint32_t a[kFragmentsM][4], b[kFragmentsN / 2][4];
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
            const int row = warp_m + i * 16 + a_lane_row(lane);
            load_matrices(a[i], stage + chunk_offset(row, 2 * step + a_lane_chunk(lane)));
        }
#pragma unroll
        for (int j = 0; j < kFragmentsN / 2; ++j) {
            const int row = kTileM + warp_n + j * 16 + b_lane_row(lane);
            load_matrices(b[j], stage + chunk_offset(row, 2 * step + b_lane_chunk(lane)));
        }
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
            for (int j = 0; j < kFragmentsN; ++j) {
                Mma<T>::run(acc[i][j], a[i], b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]);
            }
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gemm(Linear p, int row_tiles, int column_tiles) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const TileAt place = tile_at(blockIdx.x, row_tiles, column_tiles, kBand);
    const int m0 = place.row * kTileM, n0 = place.column * kTileN;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int warp_m = (warp & 1) * kWarpM, warp_n = (warp >> 1) * kWarpN;
    const uint32_t base = shared_address(shared);

    const int byte_tiles = ceil_div(p.width, kRowBytes);
    const int active = p.active == nullptr ? p.rank : min(max(*p.active, 0), p.rank);
    const int tiles = byte_tiles + ceil_div(active, kRankTile);
    auto fetch = [&](int tile) {
        if (tile < tiles) {
            const uint32_t stage = base + (tile % kStages) * kStageBytes;
            const bool bytes = tile < byte_tiles;
            const int at = (bytes ? tile : tile - byte_tiles) * kRowBytes;
            const int64_t pitch = bytes ? p.width : 2 * static_cast<int64_t>(p.rank);
            fetch_rows(stage, bytes ? static_cast<const void*>(p.xq) : p.t, pitch, m0, p.rows, at);
            fetch_rows(stage + kTileM * kRowBytes, bytes ? static_cast<const void*>(p.wq) : p.up, pitch, n0, p.columns,
                       at);
        }
        copy_commit();
    };
    auto next = [&](int tile) {
        copy_wait<kStages - 2>();
        __syncthreads();
        fetch(tile + kStages - 1);
        return base + (tile % kStages) * kStageBytes;
    };

    Accumulators acc;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc.i[i][j][e] = 0;

#pragma unroll
    for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
    for (int tile = 0; tile < byte_tiles; ++tile) multiply<int8_t>(acc.i, next(tile), warp_m, warp_n);

    float row_scale[kFragmentsM][2];
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int m = m0 + warp_m + i * 16 + fragment_row(lane, 2 * half);
            row_scale[i][half] = m < p.rows ? p.xscale[m] : 0.0f;
        }
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int n = n0 + warp_n + j * 8 + fragment_column(lane, e);
            const float column_scale = n < p.columns ? p.wscale[n] : 0.0f;
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = 2 * half + e;
                    acc.f[i][j][at] = rescale(acc.i[i][j][at], row_scale[i][half], column_scale);
                }
        }

    for (int tile = byte_tiles; tile < tiles; ++tile) multiply<T>(acc.f, next(tile), warp_m, warp_n);
    copy_wait<0>();
    __syncthreads();

    // Through shared memory, so that whole rows of 128 bytes are stored: each warp has its own 64 x 64 values.
    const uint32_t mine = base + warp * kWarpM * kRowBytes;
    const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) {
        float add[2] = {0.0f, 0.0f};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int n = n0 + warp_n + j * 8 + fragment_column(lane, e);
            if (bias != nullptr && n < p.columns) add[e] = to_float(bias[n]);
        }
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t pair = pack_pair<T>(__fadd_rn(acc.f[i][j][2 * half], add[0]),
                                                   __fadd_rn(acc.f[i][j][2 * half + 1], add[1]));
                const int row = i * 16 + fragment_row(lane, 2 * half);
                const uint32_t address = mine + chunk_offset(row, j) + (lane & 3) * 4;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(pair) : "memory");
            }
    }
    __syncwarp();
    T* y = static_cast<T*>(p.y);
    const int chunk = lane & 7, n = n0 + warp_n + chunk * 8;
#pragma unroll
    for (int i = 0; i < kWarpM / 4; ++i) {
        const int row = i * 4 + (lane >> 3), m = m0 + warp_m + row;
        if (m < p.rows && n < p.columns) {
            const uint8_t* from = shared + warp * kWarpM * kRowBytes + chunk_offset(row, chunk);
            *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m) * p.columns + n) =
                *reinterpret_cast<const uint4*>(from);
        }
    }
}

template <typename T>
cudaError_t launch(const Linear& call, cudaStream_t stream) {
    const cudaError_t error = cudaFuncSetAttribute(gemm<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    const int row_tiles = ceil_div(call.rows, kTileM), column_tiles = ceil_div(call.columns, kTileN);
    gemm<T><<<row_tiles * column_tiles, kThreads, kSharedBytes, stream>>>(call, row_tiles, column_tiles);
    return cudaGetLastError();
}

}  // namespace

cudaError_t linear_mma(const Linear& call, cudaStream_t stream) {
    return call.type == Half::float16 ? launch<__half>(call, stream) : launch<__nv_bfloat16>(call, stream);
}

}  // namespace lorafmt
