// linear_w8a8 with warpgroup products and the tensor memory accelerator: sm_90a.
//
// Blocks stay and walk output tiles. One warpgroup fetches: a single thread asks the accelerator for tiles of 128 bytes
// of K, first of xq and wq, then of t and up, into a ring in shared memory. The others multiply, 64 rows of the tile
// each: bytes into integers, which become floats in the same registers, onto which the ranks are multiplied. What lies
// outside of an operand arrives as zeros, so no size needs padding. The ring runs on while a tile is stored.
#include "launch.h"

#if defined(LORAFMT_NO_CODE)

namespace lorafmt {
// Built without this chip: nobody can call it on one, but the symbol is named.
cudaError_t linear_wgmma(const Linear&, int, int, cudaStream_t) { return cudaErrorNoKernelImageForDevice; }
}  // namespace lorafmt

#else

#include "hopper.cuh"

namespace lorafmt {
namespace {

constexpr int kSharedLimit = 227 * 1024;
constexpr int kBarrierBytes = 1024;  // barriers
constexpr int kAlignBytes = 1024;    // what it takes to bring the ring to a multiple of 1024
constexpr int kMaxStages = 8;
constexpr int kBand = 4;  // row tiles that are walked together

template <int CONSUMERS, int TILE_N>
struct Shape {
    static constexpr int kTileM = CONSUMERS * 64;
    static constexpr int kTileN = TILE_N;
    static constexpr int kThreads = (CONSUMERS + 1) * 128;
    static constexpr int kStageBytes = (kTileM + TILE_N) * kRowBytes;
    // Scales and biases of the tile's columns, a copy for each warpgroup so that these need not wait for each other.
    static constexpr int kColumnBytes = TILE_N * 2 * static_cast<int>(sizeof(float));
    static constexpr int kHeadBytes = kBarrierBytes + CONSUMERS * kColumnBytes;
    static constexpr int kFit = (kSharedLimit - kHeadBytes - kAlignBytes) / kStageBytes;
    static constexpr int kStages = kFit > kMaxStages ? kMaxStages : kFit;
    static constexpr int kSharedBytes = kStages * kStageBytes + kHeadBytes + kAlignBytes;
    // 65536 registers are 512 for each thread of a warpgroup, shared out in eights.
    static constexpr int kProducerRegisters = CONSUMERS == 3 ? 32 : 40;
    static constexpr int kConsumerRegisters = CONSUMERS == 3 ? 160 : 232;
};

struct Maps {
    CUtensorMap xq, wq, t, up;
};

// Where the ring stands: the tile in use and how often it was in use before.
template <int STAGES>
struct Ring {
    int slot = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) {
            slot = 0;
            phase ^= 1;
        }
    }
};

// The four lanes of a quad exchange words: lane q of `w[i]` gives what lane i of `w[q]` held.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool high = lane & bit;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const int low_word = bit == 1 ? 2 * pair : pair, high_word = low_word + bit;
            const uint32_t sent = high ? w[low_word] : w[high_word];
            const uint32_t received = __shfl_xor_sync(0xffffffffu, sent, bit);
            if (high) {
                w[low_word] = received;
            } else {
                w[high_word] = received;
            }
        }
    }
}

// Multiplies `tiles` tiles of the ring into `acc`. A slot is given back when the products that read it are done, which
// is known one tile later.
template <typename T, typename S, int COUNT>
__device__ __forceinline__ void multiply(uint32_t (&acc)[COUNT], int tiles, bool keep, Ring<S::kStages>& ring,
                                         uint32_t ring_base, uint32_t full, uint32_t empty, int group) {
    int previous = -1;
    for (int tile = 0; tile < tiles; ++tile) {
        barrier_wait(full + 8 * ring.slot, ring.phase);
        const uint32_t stage = ring_base + ring.slot * S::kStageBytes;
        const uint64_t a = tile_descriptor(stage + group * 64 * kRowBytes);
        const uint64_t b = tile_descriptor(stage + S::kTileM * kRowBytes);
        product_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            Wgmma<T, S::kTileN>::run(acc, a + step * (kStepBytes / 16), b + step * (kStepBytes / 16),
                                     keep || tile > 0 || step > 0);
        }
        product_commit();
        product_wait<1>();
        if (previous >= 0 && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * previous);
        previous = ring.slot;
        ring.next();
    }
    product_wait<0>();
    if (previous >= 0 && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * previous);
}

// Waits for the 128 threads of a warpgroup.
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// What a tile needs besides its operands, on its way from memory while the tile is multiplied: a thread has the scales
// of its two rows, and scales and biases of every 128th column, which it passes on to its warpgroup.
template <typename T, int TILE_N>
struct Margins {
    static constexpr int kEach = ceil_div(TILE_N, 128);
    float row_scale[2], column_scale[kEach], bias[kEach];

    __device__ __forceinline__ Margins(const Linear& p, int row, int column, int thread) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            row_scale[half] = row + 8 * half < p.rows ? p.xscale[row + 8 * half] : 0.0f;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int at = thread + i * 128, n = column + at;
            const bool inside = at < TILE_N && n < p.columns;
            column_scale[i] = inside ? p.wscale[n] : 0.0f;
            bias[i] = inside && p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[n]) : 0.0f;
        }
    }

    // Into `columns`: first all scales, then all biases.
    __device__ __forceinline__ void share(float* columns, int thread, int group) const {
        group_sync(group);  // everybody is done with those of the tile before
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int at = thread + i * 128;
            if (at < TILE_N) {
                columns[at] = column_scale[i];
                columns[TILE_N + at] = bias[i];
            }
        }
        group_sync(group);
    }
};

template <typename T, int COUNT>
__device__ __forceinline__ void store(const Linear& p, const uint32_t (&acc)[COUNT], const float* bias, int row,
                                      int column, int lane) {
    T* y = static_cast<T*>(p.y);
#pragma unroll
    for (int block = 0; block < COUNT / 16; ++block) {  // 32 columns: four accumulator tiles of 8
        float2 add[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            add[j] = *reinterpret_cast<const float2*>(bias + block * 32 + j * 8 + fragment_column(lane, 0));
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int at = block * 16 + j * 4 + half * 2;
                words[j] = pack_pair<T>(__fadd_rn(__uint_as_float(acc[at]), add[j].x),
                                        __fadd_rn(__uint_as_float(acc[at + 1]), add[j].y));
            }
            transpose_quad(words, lane);
            const int m = row + 8 * half, n = column + block * 32 + (lane & 3) * 8;
            if (m < p.rows && n < p.columns) {
                *reinterpret_cast<uint4*>(y + static_cast<int64_t>(m) * p.columns + n) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm(const __grid_constant__ Maps maps, const __grid_constant__ Linear p, int row_tiles, int column_tiles) {
    extern __shared__ uint8_t shared[];
    const uint32_t start = shared_address(shared);
    const uint32_t ring_base = (start + S::kHeadBytes + kAlignBytes - 1) & ~(kAlignBytes - 1u);
    const uint32_t full = start, empty = start + 8 * kMaxStages;
    const int group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::kStages; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, S::kTileM / 64);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    wait_for_previous();

    const int byte_tiles = ceil_div(p.width, kRowBytes);
    const int active = p.active == nullptr ? p.rank : min(max(*p.active, 0), p.rank);
    const int rank_tiles = ceil_div(active, kRankTile);
    const int tiles = row_tiles * column_tiles;
    Ring<S::kStages> ring;

    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kProducerRegisters));
        if (threadIdx.x == 0) {
            for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
                const TileAt place = tile_at(index, row_tiles, column_tiles, kBand);
                const int m0 = place.row * S::kTileM, n0 = place.column * S::kTileN;
                for (int tile = 0; tile < byte_tiles + rank_tiles; ++tile) {
                    barrier_wait(empty + 8 * ring.slot, ring.phase ^ 1);
                    const uint32_t barrier = full + 8 * ring.slot;
                    const uint32_t stage = ring_base + ring.slot * S::kStageBytes;
                    barrier_expect(barrier, S::kStageBytes);
                    const bool bytes = tile < byte_tiles;
                    const int at = bytes ? tile * kRowBytes : (tile - byte_tiles) * kRankTile;
                    fetch_tile(stage, bytes ? maps.xq : maps.t, barrier, at, m0);
                    fetch_tile(stage + S::kTileM * kRowBytes, bytes ? maps.wq : maps.up, barrier, at, n0);
                    ring.next();
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
        constexpr int kCount = S::kTileN / 2;
        const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
        float* columns = reinterpret_cast<float*>(shared + kBarrierBytes) + (group - 1) * 2 * S::kTileN;
        for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
            const TileAt place = tile_at(index, row_tiles, column_tiles, kBand);
            const int row = place.row * S::kTileM + (group - 1) * 64 + group_row(thread, 0);
            const int column = place.column * S::kTileN;
            const Margins<T, S::kTileN> margins(p, row, column, thread);
            uint32_t acc[kCount];
            multiply<int8_t, S>(acc, byte_tiles, false, ring, ring_base, full, empty, group - 1);
            margins.share(columns, thread, group);
#pragma unroll
            for (int j = 0; j < S::kTileN / 8; ++j) {
                const float2 scale = *reinterpret_cast<const float2*>(columns + j * 8 + fragment_column(lane, 0));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = 4 * j + 2 * half;
                    acc[at] = __float_as_uint(rescale(acc[at], margins.row_scale[half], scale.x));
                    acc[at + 1] = __float_as_uint(rescale(acc[at + 1], margins.row_scale[half], scale.y));
                }
            }
            multiply<T, S>(acc, rank_tiles, true, ring, ring_base, full, empty, group - 1);
            store<T>(p, acc, columns + S::kTileN, row, column, lane);
        }
    }
}

template <typename T, int CONSUMERS, int TILE_N>
cudaError_t launch(const Linear& call, int multiprocessors, cudaStream_t stream) {
    using S = Shape<CONSUMERS, TILE_N>;
    if (encoder() == nullptr) return cudaErrorNotSupported;
    Maps maps;
    const auto half = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const auto byte = CU_TENSOR_MAP_DATA_TYPE_UINT8;
    bool good = describe(maps.xq, call.xq, byte, 1, call.rows, call.width, S::kTileM) &&
                describe(maps.wq, call.wq, byte, 1, call.columns, call.width, S::kTileN);
    if (call.rank > 0) {
        good = good && describe(maps.t, call.t, half, 2, call.rows, call.rank, S::kTileM) &&
               describe(maps.up, call.up, half, 2, call.columns, call.rank, S::kTileN);
    }
    if (!good) return cudaErrorInvalidValue;
    auto kernel = gemm<T, S>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
    if (error != cudaSuccess) return error;
    const int row_tiles = ceil_div(call.rows, S::kTileM), column_tiles = ceil_div(call.columns, S::kTileN);
    const int tiles = row_tiles * column_tiles;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(tiles < multiprocessors ? tiles : multiprocessors);
    config.blockDim = dim3(S::kThreads);
    config.dynamicSmemBytes = S::kSharedBytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, maps, call, row_tiles, column_tiles);
}

// The tile that needs the least time: rounds over the chip times the area of a tile.
int choose(const Linear& call, int multiprocessors) {
    constexpr struct {
        int kernel, tile_m, tile_n, cost;  // cost: of a product, relative, as measured on an H100
    } kTiles[] = {
        {kWgmma128x256, 128, 256, 106},
        {kWgmma192x192, 192, 192, 100},
        {kWgmma128x192, 128, 192, 113},
        {kWgmma128x128, 128, 128, 118},
    };
    int best = kWgmma128x256;
    int64_t least = INT64_MAX;
    for (const auto& tile : kTiles) {
        const int64_t tiles = int64_t{ceil_div(call.rows, tile.tile_m)} * ceil_div(call.columns, tile.tile_n);
        const int64_t time = ceil_div<int64_t>(tiles, multiprocessors) * tile.tile_m * tile.tile_n * tile.cost;
        if (time < least) {
            least = time;
            best = tile.kernel;
        }
    }
    return best;
}

template <typename T>
cudaError_t by_kernel(const Linear& call, int kernel, int multiprocessors, cudaStream_t stream) {
    switch (kernel == kAuto ? choose(call, multiprocessors) : kernel) {
        case kWgmma128x256:
            return launch<T, 2, 256>(call, multiprocessors, stream);
        case kWgmma192x192:
            return launch<T, 3, 192>(call, multiprocessors, stream);
        case kWgmma128x192:
            return launch<T, 2, 192>(call, multiprocessors, stream);
        case kWgmma128x128:
            return launch<T, 2, 128>(call, multiprocessors, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t linear_wgmma(const Linear& call, int kernel, int multiprocessors, cudaStream_t stream) {
    return call.type == Half::float16 ? by_kernel<__half>(call, kernel, multiprocessors, stream)
                                      : by_kernel<__nv_bfloat16>(call, kernel, multiprocessors, stream);
}

}  // namespace lorafmt

#endif
