// The one file that knows torch: checks tensors, allocates results, finds the stream, calls the kernels.
//
// Only the stable part of libtorch is used (target 2.11), no Python and no runtime library of CUDA that is shared, so
// that one file loads into every torch from 2.11 on. Signatures, fakes and the meaning are in lorafmt/runtime/ops.py.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "launch.h"

// lorafmt/runtime/library.py reads this line before it loads the file.
extern "C" __attribute__((visibility("default"), used)) const char lorafmt_cuda_mark[] =
    "lorafmt-cuda abi=1 arches=" LORAFMT_ARCHES " cuda=" LORAFMT_CUDA_VERSION " torch=2.11;";

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kMaxDevices = 64;

struct Device {
    int major = 0, multiprocessors = 0;
};

void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, "lorafmt: ", what, ": ", cudaGetErrorString(error));
}

const Device& device(int index) {
    static Device known[kMaxDevices];
    STD_TORCH_CHECK(index >= 0 && index < kMaxDevices, "lorafmt: device ", index, " is out of range");
    Device& found = known[index];
    if (found.multiprocessors == 0) {
        check(cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, index), "capability");
        check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index), "multiprocessors");
    }
    return found;
}

cudaStream_t stream(int index) {
    void* found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &found));
    return static_cast<cudaStream_t>(found);
}

// Operands are read in pieces of 16 bytes.
void check_operand(const Tensor& tensor, const char* name, int index, ScalarType type, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == index, "lorafmt: ", name,
                    " is on another device than x");
    STD_TORCH_CHECK(tensor.scalar_type() == type, "lorafmt: ", name, " has another type than its signature says");
    const bool matrix = columns >= 0;
    STD_TORCH_CHECK(
        tensor.dim() == (matrix ? 2 : 1) && tensor.size(0) == rows && (!matrix || tensor.size(1) == columns),
        "lorafmt: ", name, " has another shape than its signature says");
    STD_TORCH_CHECK(tensor.is_contiguous(), "lorafmt: ", name, " is not contiguous");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, "lorafmt: ", name,
                    " is not aligned to 16 bytes");
}

const int32_t* check_active(const OptionalTensor& active, int index) {
    if (!active.has_value()) return nullptr;
    STD_TORCH_CHECK(active->is_cuda() && active->get_device_index() == index && active->numel() == 1 &&
                        active->scalar_type() == ScalarType::Int,
                    "lorafmt: active is one int32 on the device of x");
    return static_cast<const int32_t*>(active->data_ptr());
}

lorafmt::Half half_of(const Tensor& tensor, const char* name) {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "lorafmt: ", name,
                    " is neither bfloat16 nor float16");
    return type == ScalarType::Half ? lorafmt::Half::float16 : lorafmt::Half::bfloat16;
}

int checked_int(int64_t value, int64_t multiple, const char* name) {
    STD_TORCH_CHECK(value <= INT32_MAX, "lorafmt: ", name, " is too large");
    STD_TORCH_CHECK(value % multiple == 0, "lorafmt: ", name, " = ", value, " is not a multiple of ", multiple);
    return static_cast<int>(value);
}

std::tuple<Tensor, Tensor, Tensor> quantize_down(Tensor x, Tensor down, Tensor strength, OptionalTensor inv_smooth,
                                                 OptionalTensor active) {
    STD_TORCH_CHECK(x.dim() == 2 && down.dim() == 2, "lorafmt: x is [M, K], down is [R, K]");
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    const int index = x.get_device_index();
    const ScalarType type = x.scalar_type();
    lorafmt::QuantizeDown call{};
    call.type = half_of(x, "x");
    call.rows = checked_int(x.size(0), 1, "M");
    call.width = checked_int(x.size(1), 16, "K");
    call.rank = checked_int(down.size(0), 8, "R");
    check_operand(x, "x", index, type, call.rows, call.width);
    check_operand(down, "down", index, type, call.rank, call.width);
    check_operand(strength, "strength", index, ScalarType::Float, call.rank, -1);
    if (inv_smooth.has_value()) check_operand(*inv_smooth, "inv_smooth", index, ScalarType::Float, call.width, -1);

    Tensor xq = torch::stable::new_empty(x, {call.rows, call.width}, ScalarType::Char);
    Tensor xscale = torch::stable::new_empty(x, {call.rows}, ScalarType::Float);
    Tensor t = torch::stable::new_empty(x, {call.rows, call.rank}, type);
    call.x = x.data_ptr();
    call.down = down.data_ptr();
    call.strength = static_cast<const float*>(strength.data_ptr());
    call.inv_smooth = inv_smooth.has_value() ? static_cast<const float*>(inv_smooth->data_ptr()) : nullptr;
    call.active = check_active(active, index);
    call.xq = static_cast<int8_t*>(xq.data_ptr());
    call.xscale = static_cast<float*>(xscale.data_ptr());
    call.t = t.data_ptr();
    if (call.rows > 0) {
        torch::stable::accelerator::DeviceGuard guard(index);
        cudaError_t error = cudaErrorInvalidConfiguration;
        if (device(index).major == 9) error = lorafmt::quantize_down_cluster(call, stream(index));
        if (error == cudaErrorInvalidConfiguration) error = lorafmt::quantize_down(call, stream(index));
        check(error, "quantize_down");
    }
    return {xq, xscale, t};
}

Tensor linear_w8a8(Tensor xq, Tensor xscale, Tensor wq, Tensor wscale, Tensor t, Tensor up, OptionalTensor bias,
                   OptionalTensor active, int64_t kernel) {
    STD_TORCH_CHECK(xq.dim() == 2 && wq.dim() == 2 && t.dim() == 2, "lorafmt: xq is [M, K], wq is [N, K], t is [M, R]");
    const int index = xq.get_device_index();
    const ScalarType type = t.scalar_type();
    lorafmt::Linear call{};
    call.type = half_of(t, "t");
    call.rows = checked_int(xq.size(0), 1, "M");
    call.width = checked_int(xq.size(1), 16, "K");
    call.columns = checked_int(wq.size(0), 8, "N");
    call.rank = checked_int(t.size(1), 8, "R");
    check_operand(xq, "xq", index, ScalarType::Char, call.rows, call.width);
    check_operand(wq, "wq", index, ScalarType::Char, call.columns, call.width);
    check_operand(xscale, "xscale", index, ScalarType::Float, call.rows, -1);
    check_operand(wscale, "wscale", index, ScalarType::Float, call.columns, -1);
    check_operand(t, "t", index, type, call.rows, call.rank);
    check_operand(up, "up", index, type, call.columns, call.rank);
    if (bias.has_value()) check_operand(*bias, "bias", index, type, call.columns, -1);

    Tensor y = torch::stable::new_empty(t, {call.rows, call.columns});
    if (call.rows == 0 || call.columns == 0) return y;
    call.xq = static_cast<const int8_t*>(xq.data_ptr());
    call.wq = static_cast<const int8_t*>(wq.data_ptr());
    call.xscale = static_cast<const float*>(xscale.data_ptr());
    call.wscale = static_cast<const float*>(wscale.data_ptr());
    call.t = t.data_ptr();
    call.up = up.data_ptr();
    call.bias = bias.has_value() ? bias->data_ptr() : nullptr;
    call.active = check_active(active, index);
    call.y = y.data_ptr();

    const Device& on = device(index);
    STD_TORCH_CHECK(kernel >= lorafmt::kAuto && kernel <= lorafmt::kWgmma128x128, "lorafmt: no kernel ", kernel);
    const bool warpgroups = kernel == lorafmt::kAuto ? on.major == 9 : kernel != lorafmt::kMma;
    STD_TORCH_CHECK(!warpgroups || on.major == 9, "lorafmt: kernel ", kernel, " needs compute capability 9.0");
    torch::stable::accelerator::DeviceGuard guard(index);
    if (warpgroups) {
        check(lorafmt::linear_wgmma(call, static_cast<int>(kernel), on.multiprocessors, stream(index)), "linear_w8a8");
    } else {
        check(lorafmt::linear_mma(call, stream(index)), "linear_w8a8");
    }
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorafmt, CUDA, m) {
    m.impl("quantize_down", TORCH_BOX(&quantize_down));
    m.impl("linear_w8a8", TORCH_BOX(&linear_w8a8));
}
