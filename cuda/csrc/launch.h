// What the torch-facing file passes to the kernels: raw pointers and sizes, and no word of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lorafmt {

enum class Half { bfloat16, float16 };

// Shapes: x, xq [M, K]; down [R, K]; strength, float [R]; inv_smooth, float [K] or null; xscale, float [M]; t [M, R];
// active, one int32 on the device or null. Rows are contiguous. R is not 0 unless t and down are null.
struct QuantizeDown {
    const void* x;
    const void* down;
    const float* strength;
    const float* inv_smooth;
    const int32_t* active;
    int8_t* xq;
    float* xscale;
    void* t;
    int rows, width, rank;
    Half type;
};

// Shapes: xq [M, K], wq [N, K] int8; xscale [M], wscale [N] float; t [M, R], up [N, R], bias [N] or null, y [M, N]
// 16-bit.
struct Linear {
    const int8_t* xq;
    const int8_t* wq;
    const float* xscale;
    const float* wscale;
    const void* t;
    const void* up;
    const void* bias;
    const int32_t* active;
    void* y;
    int rows, columns, width, rank;
    Half type;
};

// Values of the operator's `kernel`; the same numbers stand in ops.py.
enum Kernel { kAuto, kMma, kWgmma128x256, kWgmma192x192, kWgmma128x192, kWgmma128x128 };

cudaError_t quantize_down(const QuantizeDown& call, cudaStream_t stream);
// cudaErrorInvalidConfiguration: rows are too wide for a cluster, or the chip has no room for one; quantize_down takes
// any.
cudaError_t quantize_down_cluster(const QuantizeDown& call, cudaStream_t stream);
cudaError_t linear_mma(const Linear& call, cudaStream_t stream);
cudaError_t linear_wgmma(const Linear& call, int kernel, int multiprocessors, cudaStream_t stream);

}  // namespace lorafmt
