// Vectors through the compiler's own extension, so that one source serves SSE2, AVX2, AVX-512 and NEON; intrinsics only
// where the compiler cannot express the instruction.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace efficient_attn {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;  // rows x kTileVectors accumulators fill the register file
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 8;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 3;

#define EA_INLINE inline __attribute__((always_inline))

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
    typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
    using integer = int32_t;
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
    typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
    using integer = int64_t;
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
using Mask = typename VectorOf<A>::mask;  // 0 or -1 in each lane
template <class A>
using Integer = typename VectorOf<A>::integer;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
EA_INLINE Vec<A> load(const A* p) {
    Vec<A> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

template <class A>
EA_INLINE void store(A* p, Vec<A> v) {
    __builtin_memcpy(p, &v, sizeof(v));
}

template <class A>
EA_INLINE Vec<A> broadcast(A x) {
    return x - Vec<A>{};
}

template <class A>
EA_INLINE Vec<A> select(Mask<A> take, Vec<A> yes, Vec<A> no) {
    return take ? yes : no;
}

// The larger of two; a NaN in `x` yields `fallback`, so that a running maximum ignores it.
EA_INLINE Vec<float> larger(Vec<float> x, Vec<float> fallback) {
#if defined(__AVX512F__)
    return _mm512_max_ps(x, fallback);
#elif defined(__AVX2__)
    return _mm256_max_ps(x, fallback);
#elif defined(__SSE2__)
    return _mm_max_ps(x, fallback);
#else
    return x > fallback ? x : fallback;
#endif
}
EA_INLINE Vec<double> larger(Vec<double> x, Vec<double> fallback) { return x > fallback ? x : fallback; }

template <class A>
EA_INLINE Mask<A> lane_index() {
    Mask<A> index;
    for (int lane = 0; lane < kLanes<A>; ++lane) index[lane] = lane;
    return index;
}

// Lane l is -1 where bit l is set.
template <class A>
EA_INLINE Mask<A> lanes_from_bits(uint64_t bits) {
    Mask<A> bit;
    for (int lane = 0; lane < kLanes<A>; ++lane) bit[lane] = Integer<A>{1} << lane;
    const Mask<A> all = static_cast<Integer<A>>(bits & ((uint64_t{1} << kLanes<A>)-1)) - Mask<A>{};
    return (all & bit) != 0;
}

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());

// e^x for x <= 0 or a little above, 0 below the smallest normal number, NaN for NaN. e^x = 2^n e^r with |r| <= ln2 / 2;
// n ln2 is taken off in two parts, of which the first is exact, so that large |x| cost no accuracy: about 1 ulp, also
// without fused multiply-add. The polynomial is 2^t, t = r log2(e); relative error 5e-9 (float), 1e-19 (double).
EA_INLINE Vec<float> exp(Vec<float> x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
    const Vec<float> shifted = x * 1.44269504f + magic;
    const Vec<float> n = shifted - magic;
    const Vec<float> t = ((x - n * 0.693145751953125f) - n * 1.42860682e-6f) * 1.44269504f;
    Vec<float> p = broadcast(1.5453162950e-4f);
    p = p * t + 1.3390863665e-3f;
    p = p * t + 9.6180825773e-3f;
    p = p * t + 5.5503571142e-2f;
    p = p * t + 2.4022650761e-1f;
    p = p * t + 6.9314718803e-1f;
    p = p * t + 1.0f;
    const Mask<float> power = ((Mask<float>)shifted << 23) + 0x3f800000;
    return select<float>(x < -87.336544f, Vec<float>{}, p * (Vec<float>)power);
}

EA_INLINE Vec<double> exp(Vec<double> x) {
    constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
    constexpr double c[] = {0.69314718055994530925,     0.24022650695910071233,   0.055504108664821627039,
                            0.0096181291076284794928,   0.0013333558146406470697, 0.00015403530393370733411,
                            0.000015252733841556772589, 1.321548680870556279e-6,  1.0178057087733941105e-7,
                            7.0548973041554992774e-9,   4.455817908336064493e-10, 2.5729324177362304214e-11};
    const Vec<double> shifted = x * 1.4426950408889634074 + magic;
    const Vec<double> n = shifted - magic;
    const Vec<double> t = ((x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10) * 1.4426950408889634074;
    Vec<double> p = broadcast(c[11]);
    for (int k = 10; k >= 0; --k) p = p * t + c[k];
    p = p * t + 1.0;
    const Mask<double> power = ((Mask<double>)shifted << 52) + 0x3ff0000000000000;
    return select<double>(x < -708.39641853226408, Vec<double>{}, p * (Vec<double>)power);
}

}  // namespace
}  // namespace efficient_attn
