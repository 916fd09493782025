// The rate of warpgroup products on tiles that stay in shared memory: the ceiling of any kernel built on them.
//
// nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I../csrc wgmma_rate.cu -o wgmma_rate && ./wgmma_rate
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "layout.h"
#include "wgmma.cuh"

using namespace lorafmt;

#define CHECK(call)                                               \
    do {                                                          \
        cudaError_t error = (call);                               \
        if (error != cudaSuccess) {                               \
            printf("%s: %s\n", #call, cudaGetErrorString(error)); \
            exit(1);                                              \
        }                                                         \
    } while (0)

template <typename T, int N, int GROUPS>
__global__ void __launch_bounds__(GROUPS * 128, 1) rate(int loops, uint32_t seed, float* sink) {
    extern __shared__ __align__(1024) uint32_t shared[];
    const int words = (GROUPS * 64 + N) * 32;
    uint32_t state = seed + threadIdx.x * 7919u + blockIdx.x * 104729u;
    for (int i = threadIdx.x; i < words; i += GROUPS * 128) {
        state = state * 1664525u + 1013904223u;
        uint32_t value = state ^ (state >> 15);
        // 16-bit operands: keep exponents near 1, so that sums stay finite.
        shared[i] = std::is_same<T, int8_t>::value ? value : ((value & 0x807f807fu) | 0x3f003f00u);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const uint64_t a = tile_descriptor(base + (threadIdx.x / 128) * 64 * kRowBytes);
    const uint64_t b = tile_descriptor(base + GROUPS * 64 * kRowBytes);
    uint32_t acc[N / 2];
    for (auto& value : acc) value = 0;
    for (int loop = 0; loop < loops; ++loop) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int step = 0; step < kSteps; ++step) Wgmma<T, N>::run(acc, a + 2 * step, b + 2 * step, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float sum = 0;
    for (auto value : acc) sum += __uint_as_float(value);
    if (sum == 1.2345f) *sink = sum;
}

template <typename T, int N, int GROUPS>
void measure(const char* name, int blocks) {
    auto kernel = rate<T, N, GROUPS>;
    const int bytes = (GROUPS * 64 + N) * kRowBytes + 1024;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    const int loops = 20000;
    const double width = 4.0 * (std::is_same<T, int8_t>::value ? 32 : 16);
    const double work = 2.0 * 64 * N * width * GROUPS * double(loops) * blocks;
    double best = 0, last = 0;
    for (int repeat = 0; repeat < 40; ++repeat) {
        CHECK(cudaEventRecord(start));
        kernel<<<blocks, GROUPS * 128, bytes>>>(loops, 17 + repeat, nullptr);
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(stop));
        CHECK(cudaEventSynchronize(stop));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, start, stop));
        last = work / (ms * 1e-3) / 1e12;
        if (last > best) best = last;
    }
    printf("%-28s best %7.0f  after a while %7.0f T/s\n", name, best, last);
}

int main() {
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    const int blocks = properties.multiProcessorCount;
    printf("%s, %d multiprocessors\n", properties.name, blocks);
    measure<int8_t, 256, 2>("int8 128x256", blocks);
    measure<int8_t, 192, 3>("int8 192x192", blocks);
    measure<int8_t, 128, 2>("int8 128x128", blocks);
    measure<__nv_bfloat16, 256, 2>("bf16 128x256", blocks);
    measure<__nv_bfloat16, 192, 3>("bf16 192x192", blocks);
    return 0;
}
