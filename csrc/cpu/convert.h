// Half precision in memory, float in registers. bfloat16 and float16 are carried as their bits.
#pragma once

#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace efficient_attn {
namespace {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
}
inline float from_bits(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}

template <class A>
inline A widen(float x) {
    return static_cast<A>(x);
}
template <class A>
inline A widen(double x) {
    return static_cast<A>(x);
}
template <class A>
inline A widen(BFloat16 x) {
    return from_bits(static_cast<uint32_t>(x.bits) << 16);
}
template <class A>
inline A widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
    if (rest >= 0x7C00) return from_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest < 0x400) return from_bits(sign | bits_of(static_cast<float>(rest) * 5.9604644775390625e-8f));  // * 2^-24
    return from_bits(sign | ((rest << 13) + 0x38000000));
}

template <class T>
inline T narrow(double x);
template <>
inline double narrow<double>(double x) {
    return x;
}
template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
    return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
    const uint32_t u = bits_of(x), rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16, quiet_nan = u >> 16 | 0x40;
    return {static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded)};
}
template <>
inline Float16 narrow<Float16>(float x) {
    const uint32_t u = bits_of(x) & 0x7FFFFFFF;
    const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
    if (u >= 0x47800000) return {static_cast<uint16_t>(sign | (u > 0x7F800000 ? 0x7E00 : 0x7C00))};
    if (u < 0x38800000)
        return {static_cast<uint16_t>(sign | (bits_of(from_bits(u) + 0.5f) - 0x3F000000))};  // subnormal
    return {static_cast<uint16_t>(sign | (u + 0xC8000FFF + (u >> 13 & 1)) >> 13)};
}

inline void widen_row(const float* source, int64_t n, float* out) {
    for (int64_t k = 0; k < n; ++k) out[k] = source[k];
}
inline void widen_row(const double* source, int64_t n, double* out) {
    for (int64_t k = 0; k < n; ++k) out[k] = source[k];
}
inline void widen_row(const BFloat16* source, int64_t n, float* out) {
    for (int64_t k = 0; k < n; ++k) out[k] = widen<float>(source[k]);
}
inline void widen_row(const Float16* source, int64_t n, float* out) {
    int64_t k = 0;
#if defined(__F16C__)
    for (; k + 8 <= n; k += 8)
        _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + k))));
#endif
    for (; k < n; ++k) out[k] = widen<float>(source[k]);
}

template <class T, class A>
inline void narrow_row(const A* source, int64_t n, T* out) {
    int64_t k = 0;
#if defined(__F16C__)
    if constexpr (sizeof(T) == sizeof(Float16) && __is_same(T, Float16)) {
        for (; k + 8 <= n; k += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k),
                             _mm256_cvtps_ph(_mm256_loadu_ps(source + k), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; k < n; ++k) out[k] = narrow<T>(source[k]);
}

}  // namespace
}  // namespace efficient_attn
