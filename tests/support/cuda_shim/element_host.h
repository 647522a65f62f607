// CPU versions of the lines of train/cuda/csrc/weighted_cross_entropy.cu that only a GPU can run.
#pragma once
#include <math.h>
#include <string.h>

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float exp2_approximate(float x) {
#ifdef ROUGH_EXP2  // as far off as the GPU's instruction may be: 2^-22 up or down, and nothing below 2^-126
    const unsigned direction = __float_as_uint(x) * 2654435769u >> 31;
    const float value = exp2f(x);
    return value < 0x1p-126f ? 0.f : value * (direction ? 1 + 0x1p-22f : 1 - 0x1p-22f);
#else
    return exp2f(x);
#endif
}

inline unsigned bf16_bits(float value) {  // to nearest, ties to even; every NaN becomes the one that the GPU makes
    const unsigned bits = __float_as_uint(value);
    if (value != value) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline unsigned pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

inline unsigned fp16_bits(float value) {
    if (value != value) return 0x7fffu;
    const _Float16 rounded = static_cast<_Float16>(value);
    unsigned short bits;
    memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

inline unsigned pack_fp16(float low, float high) { return fp16_bits(low) | fp16_bits(high) << 16; }

inline float unpack_fp16(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
}

inline void forget(unsigned&) {}
inline void keep_stores_in_order() {}  // -fno-strict-aliasing
