// What both prologues do alike with one 16-byte piece of x.
#pragma once

#include "device.cuh"

namespace lorafmt {

constexpr float kTiny = 1e-30f;   // the least row maximum: zeros have a finite scale
constexpr float kLimit = 127.0f;  // the largest code

struct Eight {
    float v[8];
};

// Eight neighbouring values of x, smoothed; `k` is the first one's column.
template <typename T>
__device__ __forceinline__ Eight smoothed(uint4 raw, const float* inv_smooth, int k) {
    Eight out;
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_pair<T>(words[i]);
        out.v[2 * i] = pair.x;
        out.v[2 * i + 1] = pair.y;
    }
    if (inv_smooth != nullptr) {
        const float4 low = *reinterpret_cast<const float4*>(inv_smooth + k);
        const float4 high = *reinterpret_cast<const float4*>(inv_smooth + k + 4);
        const float factor[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) out.v[i] = __fmul_rn(out.v[i], factor[i]);
    }
    return out;
}

// Magnitudes are compared as bit patterns: the order of non-negative floats, with every NaN above infinity.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The larger of `largest` and the eight magnitudes of a piece. Unsmoothed values are compared two at a time, as they
// lie.
template <typename T>
__device__ __forceinline__ uint32_t largest_of(uint4 raw, const float* inv_smooth, int k, uint32_t largest) {
    if (inv_smooth == nullptr) {
        constexpr uint32_t kSigns = 0x7fff7fffu;
        const uint32_t pair =
            __vmaxu2(__vmaxu2(raw.x & kSigns, raw.y & kSigns), __vmaxu2(raw.z & kSigns, raw.w & kSigns));
        const float2 both = unpack_pair<T>(pair);
        return max(largest, max(magnitude(both.x), magnitude(both.y)));
    }
    const Eight values = smoothed<T>(raw, inv_smooth, k);
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max(largest, magnitude(values.v[i]));
    return largest;
}

// Four codes as a word. Adding 1.5 * 2^23 in the same rounding leaves the whole number, ties to even, in the low bits;
// a product of 24 by 24 bits is not rounded before. |v * factor| is at most 127 * (1 + 2^-22), so nothing overflows.
__device__ __forceinline__ uint32_t four_codes(const float* v, float factor) {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fmaf_rn(v[i], factor, 12582912.0f));
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

template <typename T>
__device__ __forceinline__ uint2 eight_codes(uint4 raw, const float* inv_smooth, int k, float factor) {
    const Eight values = smoothed<T>(raw, inv_smooth, k);
    return make_uint2(four_codes(values.v, factor), four_codes(values.v + 4, factor));
}

}  // namespace lorafmt
