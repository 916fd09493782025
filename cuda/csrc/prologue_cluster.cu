// quantize_down on sm_90a: x is read once, whatever its width.
//
// A cluster of blocks has 32 rows of x (64 if there are many ranks, so that down is read less often), each block a
// slice of their columns, which the tensor memory accelerator brings into its shared memory and which stays there. One
// warpgroup multiplies it with down, whose tiles come through a ring, one looks for the row maxima; then both write the
// codes. Blocks tell each other their maxima and read each other's partial sums of t in shared memory. Sums have a
// fixed order, so two runs agree in every bit.
#include "launch.h"

#if defined(LORAFMT_NO_CODE)

namespace lorafmt {
// Built without this chip: nobody can call it on one, but the symbol is named.
cudaError_t quantize_down_cluster(const QuantizeDown&, cudaStream_t) { return cudaErrorNoKernelImageForDevice; }
}  // namespace lorafmt

#else

#include "hopper.cuh"
#include "prologue.cuh"

namespace lorafmt {
namespace {

constexpr int kThreads = 288;  // products, maxima, and one warp that fetches
constexpr int kWorkers = 256;
constexpr int kPanel = kRowBytes / 2;  // columns of a tile of x
constexpr int kMaxPanels = 40;         // of a slice
constexpr int kMaxRankTiles = 3;       // more ranks are other clusters (grid.y)
constexpr int kMaxRing = 6;
constexpr int kSlice = 768;  // columns of a block, if that takes no more blocks than a cluster has
constexpr int kMaxCluster = 16;
constexpr int kHeadBytes = 1024;  // barriers, maxima
constexpr int kSharedLimit = 227 * 1024;
constexpr int kHalfShared = 113 * 1024;  // two blocks fit

// Where a pair of ranks of a row is in the buffer for t, in floats; neighbouring rows are spread over the banks.
LORAFMT_BOTH constexpr int sum_at(int row, int rank, int ranks) { return row * ranks + (rank ^ ((row & 3) << 3)); }

struct Head {
    uint64_t x_full[kMaxPanels];
    uint64_t ring_full[kMaxRing], ring_empty[kMaxRing];
    uint32_t largest[64];
};
static_assert(sizeof(Head) <= kHeadBytes);

struct Maps {
    CUtensorMap x, down;
};

struct Plan {
    int cluster, panels, ring;
};

// What a block works on, and where its things are.
template <int RANK_TILES, int ROWS>
struct Block {
    static constexpr int kRanks = RANK_TILES * kRankTile;
    static constexpr int kPanelBytes = ROWS * kRowBytes;
    static constexpr int kDownBytes = kRanks * kRowBytes;
    uint8_t* shared;
    Plan plan;
    int part, first_row, first_k, first_rank;

    __device__ __forceinline__ Block(uint8_t* shared, const Plan& plan)
        : shared(shared),
          plan(plan),
          part(blockIdx.x % plan.cluster),
          first_row(blockIdx.x / plan.cluster * ROWS),
          first_k(part * plan.panels * kPanel),
          first_rank(blockIdx.y * kMaxRankTiles * kRankTile) {}

    __device__ __forceinline__ Head& head() const { return *reinterpret_cast<Head*>(shared); }
    __device__ __forceinline__ uint8_t* panel(int i) const { return shared + kHeadBytes + i * kPanelBytes; }
    __device__ __forceinline__ uint8_t* ring(int slot) const { return panel(plan.panels) + slot * kDownBytes; }
    // When all products are done, the ring is the buffer for t.
    __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(ring(0)); }

    __device__ __forceinline__ uint32_t x_full(int i) const { return shared_address(&head().x_full[i]); }
    __device__ __forceinline__ uint32_t ring_full(int slot) const { return shared_address(&head().ring_full[slot]); }
    __device__ __forceinline__ uint32_t ring_empty(int slot) const { return shared_address(&head().ring_empty[slot]); }
};

// One thread: all of x is on its way at once; down follows as its ring is emptied.
template <int RANK_TILES, int ROWS>
__device__ __forceinline__ void fetch(const Block<RANK_TILES, ROWS>& at, const Maps& maps) {
    using B = Block<RANK_TILES, ROWS>;
    auto fetch_down = [&](int panel, int slot) {
        barrier_expect(at.ring_full(slot), B::kDownBytes);
        const int k = at.first_k + panel * kPanel;
        fetch_tile(shared_address(at.ring(slot)), maps.down, at.ring_full(slot), k, at.first_rank);
    };
    for (int panel = 0; panel < at.plan.panels; ++panel) {
        barrier_expect(at.x_full(panel), B::kPanelBytes);
        const int k = at.first_k + panel * kPanel;
        fetch_tile(shared_address(at.panel(panel)), maps.x, at.x_full(panel), k, at.first_row);
        if (panel < at.plan.ring) fetch_down(panel, panel);
    }
    if constexpr (RANK_TILES > 0) {
        for (int panel = at.plan.ring; panel < at.plan.panels; ++panel) {
            const int slot = panel % at.plan.ring, round = panel / at.plan.ring;
            barrier_wait(at.ring_empty(slot), (round - 1) & 1);
            fetch_down(panel, slot);
        }
    }
}

// One warpgroup: this slice's part of t, into the buffer. Products have 64 rows; where a block has 32, the others are
// those of the next tile, whatever they are.
template <typename T, int RANK_TILES, int ROWS>
__device__ __forceinline__ void multiply(const Block<RANK_TILES, ROWS>& at, int thread) {
    using B = Block<RANK_TILES, ROWS>;
    uint32_t acc[B::kRanks / 2];
    for (int panel = 0; panel < at.plan.panels; ++panel) {
        const int slot = panel % at.plan.ring;
        barrier_wait(at.x_full(panel), 0);
        barrier_wait(at.ring_full(slot), (panel / at.plan.ring) & 1);
        const uint64_t a = tile_descriptor(shared_address(at.panel(panel)));
        const uint64_t b = tile_descriptor(shared_address(at.ring(slot)));
        product_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int skip = step * (kStepBytes / 16);
            Wgmma<T, B::kRanks>::run(acc, a + skip, b + skip, panel > 0 || step > 0);
        }
        product_commit();
        product_wait<0>();
        if (thread == 0) barrier_arrive(at.ring_empty(slot));
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");  // all products are done: the ring is free
    if (thread < ROWS * 2) {
#pragma unroll
        for (int i = 0; i < B::kRanks / 2; i += 2) {
            float* to = at.sums() + sum_at(group_row(thread, i), group_column(thread, i), B::kRanks);
            *reinterpret_cast<float2*>(to) = make_float2(__uint_as_float(acc[i]), __uint_as_float(acc[i + 1]));
        }
    }
}

// The other warpgroup: the largest magnitude of each row of the slice. A few threads have a row, each some chunks of a
// tile.
template <typename T, int RANK_TILES, int ROWS>
__device__ __forceinline__ void find_largest(const Block<RANK_TILES, ROWS>& at, const QuantizeDown& p, int thread) {
    constexpr int kTeam = 128 / ROWS, kEach = kChunks / kTeam;
    const int row = thread / kTeam, chunk = thread % kTeam * kEach;
    uint32_t largest = 0;
    for (int panel = 0; panel < at.plan.panels; ++panel) {
        barrier_wait(at.x_full(panel), 0);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int k = at.first_k + panel * kPanel + (chunk + i) * 8;
            if (k < p.width) {
                const uint4 raw = *reinterpret_cast<const uint4*>(at.panel(panel) + chunk_offset(row, chunk + i));
                largest = largest_of<T>(raw, p.inv_smooth, k, largest);
            }
        }
    }
#pragma unroll
    for (int step = 1; step < kTeam; step *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    // Everybody learns everybody's; the order does not matter to a maximum.
    cluster_wait();  // all blocks have begun
    if (thread % kTeam == 0) {
        for (int peer = 0; peer < at.plan.cluster; ++peer) {
            const uint32_t to = in_peer(shared_address(&at.head().largest[row]), peer);
            asm volatile("red.relaxed.cluster.shared::cluster.max.u32 [%0], %1;" ::"r"(to), "r"(largest) : "memory");
        }
    }
    __syncwarp();
}

// All threads of the cluster share out its pairs of ranks: sums over the blocks, in their order.
template <typename T, int RANK_TILES, int ROWS>
__device__ __forceinline__ void write_t(const Block<RANK_TILES, ROWS>& at, const QuantizeDown& p, int active,
                                        int thread) {
    constexpr int kRanks = RANK_TILES * kRankTile, kPairs = kRanks / 2;
    T* t = static_cast<T*>(p.t);
    for (int i = at.part * kThreads + thread; i < ROWS * kPairs; i += at.plan.cluster * kThreads) {
        const int row = i / kPairs, column = i % kPairs * 2, rank = at.first_rank + column;
        if (at.first_row + row < p.rows && rank < p.rank) {
            const uint32_t address = shared_address(at.sums() + sum_at(row, column, kRanks));
            float2 all[kMaxCluster];
#pragma unroll
            for (int peer = 0; peer < kMaxCluster; ++peer) {
                const uint32_t from = in_peer(address, peer < at.plan.cluster ? peer : 0);
                asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                             : "=f"(all[peer].x), "=f"(all[peer].y)
                             : "r"(from));
            }
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int peer = 0; peer < kMaxCluster; ++peer) {
                if (peer < at.plan.cluster)
                    sum = make_float2(__fadd_rn(sum.x, all[peer].x), __fadd_rn(sum.y, all[peer].y));
            }
            const float first = rank < active ? __fmul_rn(sum.x, p.strength[rank]) : 0.0f;
            const float second = rank + 1 < active ? __fmul_rn(sum.y, p.strength[rank + 1]) : 0.0f;
            T* to = t + static_cast<int64_t>(at.first_row + row) * p.rank + rank;
            *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(first, second);
        }
    }
}

template <typename T, int RANK_TILES, int ROWS>
__device__ __forceinline__ void write_codes(const Block<RANK_TILES, ROWS>& at, const QuantizeDown& p, int warp,
                                            int lane) {
    const int chunks = at.plan.panels * kChunks;
    for (int row = warp; row < ROWS; row += kWorkers / 32) {
        const int m = at.first_row + row;
        if (m < p.rows) {
            const float largest = __uint_as_float(at.head().largest[row]);
            const float factor = __fdiv_rn(kLimit, largest);
            if (at.part == 0 && lane == 0) p.xscale[m] = __fdiv_rn(largest, kLimit);
            int8_t* to = p.xq + static_cast<int64_t>(m) * p.width;
#pragma unroll 4
            for (int chunk = lane; chunk < chunks; chunk += 32) {
                const int k = at.first_k + chunk * 8;
                if (k < p.width) {
                    const uint8_t* from = at.panel(chunk / kChunks) + chunk_offset(row, chunk % kChunks);
                    const uint4 raw = *reinterpret_cast<const uint4*>(from);
                    *reinterpret_cast<uint2*>(to + k) = eight_codes<T>(raw, p.inv_smooth, k, factor);
                }
            }
        }
    }
}

template <typename T, int RANK_TILES, int ROWS>
__global__ void __launch_bounds__(kThreads, RANK_TILES < 3 ? 2 : 1)
    prologue(const __grid_constant__ Maps maps, const __grid_constant__ QuantizeDown p,
             const __grid_constant__ Plan plan) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const Block<RANK_TILES, ROWS> at(shared, plan);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int active = p.active == nullptr ? p.rank : min(max(*p.active, 0), p.rank);
    if (thread == 0) {
        for (int panel = 0; panel < plan.panels; ++panel) barrier_init(at.x_full(panel), 1);
        for (int slot = 0; slot < plan.ring; ++slot) {
            barrier_init(at.ring_full(slot), 1);
            barrier_init(at.ring_empty(slot), 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (thread < ROWS) at.head().largest[thread] = magnitude(kTiny);
    __syncthreads();
    allow_next();
    cluster_arrive();

    if (thread >= kWorkers) {
        if (lane == 0) fetch(at, maps);
        __syncwarp();
        cluster_wait();
    } else if (thread >= 128) {
        find_largest<T>(at, p, thread - 128);
    } else {
        if constexpr (RANK_TILES > 0) multiply<T>(at, thread);
        cluster_wait();
    }

    __syncthreads();  // the cluster's barrier orders a block's own accesses, too, but tools do not see that
    cluster_arrive();
    cluster_wait();
    if constexpr (RANK_TILES > 0) write_t<T>(at, p, active, thread);
    __syncwarp();
    cluster_arrive();  // what others have is read
    if (thread < kWorkers && blockIdx.y == 0) write_codes<T>(at, p, warp, lane);
    __syncwarp();
    cluster_wait();  // nobody leaves while others read its sums
}

template <typename T, int RANK_TILES, int ROWS>
cudaError_t launch(const QuantizeDown& call, cudaStream_t stream) {
    constexpr int kPanelBytes = ROWS * kRowBytes;
    constexpr int kDownBytes = RANK_TILES * kRankTile * kRowBytes;
    if (encoder() == nullptr) return cudaErrorInvalidConfiguration;
    Plan plan{1, 0, 0};
    while (plan.cluster < kMaxCluster && ceil_div(call.width, plan.cluster) > kSlice) plan.cluster *= 2;
    plan.panels = ceil_div(ceil_div(call.width, plan.cluster), kPanel);
    const int fixed = kHeadBytes + plan.panels * kPanelBytes;
    if (plan.panels > kMaxPanels || fixed + 2 * kDownBytes > kSharedLimit) return cudaErrorInvalidConfiguration;
    if constexpr (RANK_TILES > 0) {
        const int room = (fixed + 2 * kDownBytes <= kHalfShared ? kHalfShared : kSharedLimit) - fixed;
        plan.ring = min(min(room / kDownBytes, ROWS == 32 ? 3 : kMaxRing), max(plan.panels, 2));
    }
    // The last product reads 32 rows behind the slice.
    const int bytes = fixed + max(plan.ring * kDownBytes, kPanelBytes);

    const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    Maps maps;
    bool good = describe(maps.x, call.x, type, 2, call.rows, call.width, ROWS);
    if (RANK_TILES > 0)
        good = good && describe(maps.down, call.down, type, 2, call.rank, call.width, RANK_TILES * kRankTile);
    if (!good) return cudaErrorInvalidValue;

    auto kernel = prologue<T, RANK_TILES, ROWS>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(ceil_div(call.rows, ROWS) * plan.cluster,
                          call.rank == 0 ? 1 : ceil_div(call.rank, kMaxRankTiles * kRankTile));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, maps, call, plan);
    if (error != cudaErrorInvalidClusterSize) return error;
    cudaGetLastError();  // a part of a chip may be too small for so many blocks; then the common kernel does it
    return cudaErrorInvalidConfiguration;
}

template <typename T>
cudaError_t by_rank(const QuantizeDown& call, cudaStream_t stream) {
    switch (ceil_div(call.rank, kRankTile)) {
        case 0:
            return launch<T, 0, 32>(call, stream);
        case 1:
            return launch<T, 1, 32>(call, stream);
        case 2:
            return launch<T, 2, 64>(call, stream);
        default:
            return launch<T, kMaxRankTiles, 64>(call, stream);
    }
}

}  // namespace

cudaError_t quantize_down_cluster(const QuantizeDown& call, cudaStream_t stream) {
    return call.type == Half::float16 ? by_rank<__half>(call, stream) : by_rank<__nv_bfloat16>(call, stream);
}

}  // namespace lorafmt

#endif
