// quantize_down on sm_90a: x is read once, whatever its width.
//
// A cluster of blocks has 32 rows of x (64 if there are many ranks, so that down is read less often), each block a slice of their columns, which the tensor memory accelerator brings into
// its shared memory and which stays there. One warpgroup multiplies it with down, whose tiles come through a ring, one
// looks for the row maxima; then both write the codes. Blocks exchange maxima and partial sums of t through each other's
// shared memory. Sums have a fixed order, so two runs agree in every bit.
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
constexpr int kMaxPanels = 40;  // of a slice
constexpr int kMaxRankTiles = 3;  // more ranks are other clusters (grid.y)
constexpr int kMaxRing = 6;
constexpr int kSlice = 768;  // columns of a block, if that takes no more blocks than a cluster has
constexpr int kMaxCluster = 16;
constexpr int kHeadBytes = 1024;  // barriers, maxima, factors
constexpr int kSharedLimit = 227 * 1024;
constexpr int kHalfShared = 113 * 1024;  // two blocks fit

// Where a pair of ranks of a row is in the buffer for t, in floats; neighbouring rows are spread over the banks.
LORAFMT_BOTH constexpr int sum_at(int row, int rank, int ranks) { return row * ranks + (rank ^ ((row & 3) << 3)); }

struct Head {
    uint64_t x_full[kMaxPanels];
    uint64_t ring_full[kMaxRing], ring_empty[kMaxRing];
    uint32_t largest[64];
    float factor[64];
};
static_assert(sizeof(Head) <= kHeadBytes);

struct Maps {
    CUtensorMap x, down;
};

struct Plan {
    int cluster, panels, ring;
};

template <typename T, int RANK_TILES, int ROWS>
__global__ void __launch_bounds__(kThreads, RANK_TILES < 3 ? 2 : 1)
    prologue(const __grid_constant__ Maps maps, const __grid_constant__ QuantizeDown p, const __grid_constant__ Plan plan) {
    constexpr int kRanks = RANK_TILES * kRankTile;
    constexpr int kPanelBytes = ROWS * kRowBytes;
    constexpr int kDownBytes = kRanks * kRowBytes;
    extern __shared__ __align__(1024) uint8_t shared[];
    Head& head = *reinterpret_cast<Head*>(shared);
    const uint32_t panels_base = shared_address(shared) + kHeadBytes;
    const uint32_t ring_base = panels_base + plan.panels * kPanelBytes;
    // When all products are done, the ring is the buffer for t.
    float* sums = reinterpret_cast<float*>(shared + kHeadBytes + plan.panels * kPanelBytes);

    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int part = blockIdx.x % plan.cluster;
    const int first_row = blockIdx.x / plan.cluster * ROWS;
    const int first_k = part * plan.panels * kPanel;
    const int first_rank = blockIdx.y * kMaxRankTiles * kRankTile;
    const int active = p.active == nullptr ? p.rank : min(max(*p.active, 0), p.rank);
    if (thread == 0) {
        for (int panel = 0; panel < plan.panels; ++panel) barrier_init(shared_address(&head.x_full[panel]), 1);
        for (int slot = 0; slot < plan.ring; ++slot) {
            barrier_init(shared_address(&head.ring_full[slot]), 1);
            barrier_init(shared_address(&head.ring_empty[slot]), 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    allow_next();

    if (warp == kWorkers / 32) {
        auto fetch_x = [&](int panel) {
            const uint32_t barrier = shared_address(&head.x_full[panel]);
            barrier_expect(barrier, kPanelBytes);
            fetch_tile(panels_base + panel * kPanelBytes, maps.x, barrier, first_k + panel * kPanel, first_row);
        };
        auto fetch_down = [&](int panel, int slot) {
            const uint32_t barrier = shared_address(&head.ring_full[slot]);
            barrier_expect(barrier, kDownBytes);
            fetch_tile(ring_base + slot * kDownBytes, maps.down, barrier, first_k + panel * kPanel, first_rank);
        };
        if (lane == 0) {
            // All of x is on its way at once; down follows as its ring is emptied.
            for (int panel = 0; panel < plan.panels; ++panel) {
                fetch_x(panel);
                if (panel < plan.ring) fetch_down(panel, panel);
            }
            if constexpr (RANK_TILES > 0) {
                for (int panel = plan.ring; panel < plan.panels; ++panel) {
                    const int slot = panel % plan.ring, round = panel / plan.ring;
                    barrier_wait(shared_address(&head.ring_empty[slot]), (round - 1) & 1);
                    fetch_down(panel, slot);
                }
            }
        }
        __syncwarp();
    } else if (warp < 4) {
        if constexpr (RANK_TILES > 0) {
            // Products have 64 rows; where a block has 32, the others are those of the next tile, whatever they are.
            uint32_t acc[kRanks / 2];
            for (int panel = 0; panel < plan.panels; ++panel) {
                const int slot = panel % plan.ring;
                barrier_wait(shared_address(&head.x_full[panel]), 0);
                barrier_wait(shared_address(&head.ring_full[slot]), (panel / plan.ring) & 1);
                const uint64_t a = tile_descriptor(panels_base + panel * kPanelBytes);
                const uint64_t b = tile_descriptor(ring_base + slot * kDownBytes);
                product_fence();
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    Wgmma<T, kRanks>::run(acc, a + step * (kStepBytes / 16), b + step * (kStepBytes / 16), panel > 0 || step > 0);
                }
                product_commit();
                product_wait<0>();
                if (thread == 0) barrier_arrive(shared_address(&head.ring_empty[slot]));
            }
            asm volatile("bar.sync 1, 128;" ::: "memory");  // all products are done: the ring is free
            if (warp < ROWS / 16) {
#pragma unroll
                for (int i = 0; i < kRanks / 2; i += 2) {
                    *reinterpret_cast<float2*>(sums + sum_at(group_row(thread, i), group_column(thread, i), kRanks)) =
                        make_float2(__uint_as_float(acc[i]), __uint_as_float(acc[i + 1]));
                }
            }
        }
    } else {
        // A few threads have a row, each some of the eight chunks of a tile.
        constexpr int kTeam = 128 / ROWS, kEach = kChunks / kTeam;
        const int row = (thread - 128) / kTeam, chunk = thread % kTeam * kEach;
        uint32_t largest = 0;
        for (int panel = 0; panel < plan.panels; ++panel) {
            barrier_wait(shared_address(&head.x_full[panel]), 0);
            const uint8_t* tile = shared + kHeadBytes + panel * kPanelBytes;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int k = first_k + panel * kPanel + (chunk + i) * 8;
                if (k < p.width) {
                    const uint4 raw = *reinterpret_cast<const uint4*>(tile + chunk_offset(row, chunk + i));
                    largest = largest_of<T>(raw, p.inv_smooth, k, largest);
                }
            }
        }
#pragma unroll
        for (int step = 1; step < kTeam; step *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        if (lane % kTeam == 0) head.largest[row] = largest;
    }

    cluster_arrive();
    cluster_wait();
    if (thread < ROWS) {
        uint32_t all[kMaxCluster];
#pragma unroll
        for (int peer = 0; peer < kMaxCluster; ++peer) {
            const uint32_t from = in_peer(shared_address(&head.largest[thread]), peer < plan.cluster ? peer : 0);
            asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(all[peer]) : "r"(from));
        }
        uint32_t largest = magnitude(kTiny);
#pragma unroll
        for (int peer = 0; peer < kMaxCluster; ++peer) largest = max(largest, all[peer]);
        const float amax = __uint_as_float(largest);
        head.factor[thread] = __fdiv_rn(kLimit, amax);
        const int row = first_row + thread;
        if (part == 0 && blockIdx.y == 0 && row < p.rows) p.xscale[row] = __fdiv_rn(amax, kLimit);
    }
    if constexpr (RANK_TILES > 0) {
        // Pairs of ranks are shared out among the blocks of the cluster.
        constexpr int kPairs = kRanks / 2;
        T* t = static_cast<T*>(p.t);
        for (int at = part * kThreads + thread; at < ROWS * kPairs; at += plan.cluster * kThreads) {
            const int row = at / kPairs, column = at % kPairs * 2, rank = first_rank + column;
            if (first_row + row >= p.rows || rank >= p.rank) continue;
            const uint32_t address = shared_address(sums + sum_at(row, column, kRanks));
            float2 all[kMaxCluster];
#pragma unroll
            for (int peer = 0; peer < kMaxCluster; ++peer) {
                const uint32_t from = in_peer(address, peer < plan.cluster ? peer : 0);
                asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(all[peer].x), "=f"(all[peer].y) : "r"(from));
            }
            float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int peer = 0; peer < kMaxCluster; ++peer) {
                if (peer < plan.cluster) {
                    total = make_float2(__fadd_rn(total.x, all[peer].x), __fadd_rn(total.y, all[peer].y));
                }
            }
            const float s0 = rank < active ? __fmul_rn(total.x, p.strength[rank]) : 0.0f;
            const float s1 = rank + 1 < active ? __fmul_rn(total.y, p.strength[rank + 1]) : 0.0f;
            *reinterpret_cast<uint32_t*>(t + static_cast<int64_t>(first_row + row) * p.rank + rank) = pack_pair<T>(s0, s1);
        }
    }
    cluster_arrive();  // this block has read what it needs of others
    __syncthreads();

    if (blockIdx.y == 0 && warp < kWorkers / 32) {
        const int chunks = plan.panels * kChunks;
        for (int row = warp; row < ROWS && first_row + row < p.rows; row += kWorkers / 32) {
            const float factor = head.factor[row];
            int8_t* to = p.xq + static_cast<int64_t>(first_row + row) * p.width;
#pragma unroll 4
            for (int chunk = lane; chunk < chunks; chunk += 32) {
                const int k = first_k + chunk * 8;
                if (k < p.width) {
                    const uint8_t* tile = shared + kHeadBytes + (chunk / kChunks) * kPanelBytes;
                    const uint4 raw = *reinterpret_cast<const uint4*>(tile + chunk_offset(row, chunk % kChunks));
                    *reinterpret_cast<uint2*>(to + k) = eight_codes<T>(raw, p.inv_smooth, k, factor);
                }
            }
        }
    }
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
    if (RANK_TILES > 0) good = good && describe(maps.down, call.down, type, 2, call.rank, call.width, RANK_TILES * kRankTile);
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
    return cudaLaunchKernelEx(&config, kernel, maps, call, plan);
}

template <typename T>
cudaError_t by_rank(const QuantizeDown& call, cudaStream_t stream) {
    switch (ceil_div(call.rank, kRankTile)) {
        case 0: return launch<T, 0, 32>(call, stream);
        case 1: return launch<T, 1, 32>(call, stream);
        case 2: return launch<T, 2, 64>(call, stream);
        default: return launch<T, kMaxRankTiles, 64>(call, stream);
    }
}

}  // namespace

cudaError_t quantize_down_cluster(const QuantizeDown& call, cudaStream_t stream) {
    return call.type == Half::float16 ? by_rank<__half>(call, stream) : by_rank<__nv_bfloat16>(call, stream);
}

}  // namespace lorafmt

#endif
