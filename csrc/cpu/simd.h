// Vectors through the compiler's own extension, so that one source serves SSE2, AVX2, AVX-512 and NEON; intrinsics only
// where the compiler cannot express the instruction.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "convert.h"

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
#define EA_NOINLINE __attribute__((noinline))

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
EA_INLINE Mask<A> load_integers(const Integer<A>* p) {
    Mask<A> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

template <class A>
EA_INLINE void store_integers(Integer<A>* p, Mask<A> v) {
    __builtin_memcpy(p, &v, sizeof(v));
}

// kLanes elements of half precision or of A itself, as A.
template <class A>
EA_INLINE Vec<A> load_widened(const A* p) {
    return load(p);
}
template <class A>
EA_INLINE Vec<float> load_widened(const BFloat16* p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec<float>)_mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, half), 16);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
    Vec<float> wide;
    for (int lane = 0; lane < kLanes<float>; ++lane) wide[lane] = widen<float>(p[lane]);
    return wide;
#endif
}
template <class A>
EA_INLINE Vec<float> load_widened(const Float16* p) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> wide;
    for (int lane = 0; lane < kLanes<float>; ++lane) wide[lane] = widen<float>(p[lane]);
    return wide;
#endif
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
    return _mm512_maskz_max_ps(0xFFFF, x, fallback);
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

// Bit l is set where lane l is -1.
template <class A>
EA_INLINE uint64_t bits_from_lanes(Mask<A> lanes) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(lanes));
#elif defined(__AVX2__)
    if constexpr (sizeof(A) == 4) return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(lanes)));
    return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(lanes)));
#else
    uint64_t bits = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) bits |= static_cast<uint64_t>(lanes[lane] & 1) << lane;
    return bits;
#endif
}

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());

// 1.5 * 2^23 (2^52) and the exponent's offset: the low bits of x + magic are the nearest integer to x plus the offset.
constexpr float kMagicFloat = 12582912.0f + 127.0f;
constexpr double kMagicDouble = 6755399441055744.0 + 1023.0;

// (2^f - 1) / f and 2^n, |f| <= 1/2, where `shifted` is n + magic. The polynomial's relative error is 5e-9 (float),
// 1e-19 (double).
EA_INLINE Vec<float> power_slope(Vec<float> f) {
    Vec<float> p = broadcast(1.5453162950e-4f);
    p = p * f + 1.3390863665e-3f;
    p = p * f + 9.6180825773e-3f;
    p = p * f + 5.5503571142e-2f;
    p = p * f + 2.4022650761e-1f;
    return p * f + 6.9314718803e-1f;
}
EA_INLINE Vec<double> power_slope(Vec<double> f) {
    constexpr double c[] = {0.69314718055994530925,     0.24022650695910071233,   0.055504108664821627039,
                            0.0096181291076284794928,   0.0013333558146406470697, 0.00015403530393370733411,
                            0.000015252733841556772589, 1.321548680870556279e-6,  1.0178057087733941105e-7,
                            7.0548973041554992774e-9,   4.455817908336064493e-10, 2.5729324177362304214e-11};
    Vec<double> p = broadcast(c[11]);
#pragma GCC unroll 16
    for (int k = 10; k >= 0; --k) p = p * f + c[k];
    return p;
}
EA_INLINE Vec<float> power_of_integer(Vec<float> shifted) { return (Vec<float>)((Mask<float>)shifted << 23); }
EA_INLINE Vec<double> power_of_integer(Vec<double> shifted) { return (Vec<double>)((Mask<double>)shifted << 52); }

// 2^(n + f)
template <class V>
EA_INLINE V power_of_two(V shifted, V f) {
    return (power_slope(f) * f + 1) * power_of_integer(shifted);
}

// 2^t for t <= 0 or a little above; 0 below -126.5 (double: -1022.5), NaN for NaN.
EA_INLINE Vec<float> exp2(Vec<float> t) {
    t = larger(broadcast(-127.0f), t);
    const Vec<float> shifted = t + kMagicFloat;
    return power_of_two(shifted, t - (shifted - kMagicFloat));
}
EA_INLINE Vec<double> exp2(Vec<double> t) {
    t = larger(broadcast(-1023.0), t);
    const Vec<double> shifted = t + kMagicDouble;
    return power_of_two(shifted, t - (shifted - kMagicDouble));
}

// x / y for y >= 1, within a unit in the last place.
EA_INLINE Vec<float> quotient(Vec<float> x, Vec<float> y) {
#if defined(__AVX512F__)
    const Vec<float> r = _mm512_maskz_rcp14_ps(0xFFFF, y), q = x * r;
    return q + r * (x - q * y);
#else
    return x / y;
#endif
}
EA_INLINE Vec<double> quotient(Vec<double> x, Vec<double> y) { return x / y; }
// tanh(x) of t = 2 log2(e) x, as E / (E + 2) with E = 2^t - 1, which loses no digits near 0. The error is at most 3
// units in the last place (float; double 4); +-1 from |x| = 10 (22) on, NaN for NaN.
template <class A>
EA_INLINE Vec<A> tanh_of_log2(Vec<A> t) {
    constexpr A limit = sizeof(A) == 4 ? 30 : 64, magic = static_cast<A>(sizeof(A) == 4 ? kMagicFloat : kMagicDouble);
    t = larger(broadcast<A>(-limit), t);
    t = t > limit ? broadcast<A>(limit) : t;
    const Vec<A> shifted = t + magic;
    const Vec<A> power = power_of_integer(shifted), f = t - (shifted - magic);
    const Vec<A> less_one = power * (power_slope(f) * f) + (power - A{1});
    return quotient(less_one, less_one + A{2});
}

// e^x likewise. n ln2 is taken off in two parts, of which the first is exact, so that large |x| cost no accuracy.
EA_INLINE Vec<float> exp(Vec<float> x) {
    x = larger(broadcast(-88.029692f), x);
    const Vec<float> shifted = x * 1.44269504f + kMagicFloat, n = shifted - kMagicFloat;
    return power_of_two(shifted, ((x - n * 0.693145751953125f) - n * 1.42860682e-6f) * 1.44269504f);
}
EA_INLINE Vec<double> exp(Vec<double> x) {
    x = larger(broadcast(-709.08956571282405), x);
    const Vec<double> shifted = x * 1.4426950408889634074 + kMagicDouble, n = shifted - kMagicDouble;
    return power_of_two(shifted,
                        ((x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10) * 1.4426950408889634074);
}

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// What stands at p in every lane, and x * y + sum.
template <class A>
EA_INLINE Vec<A> broadcast_at(const A* p) {
    return broadcast<A>(*p);
}
template <class V>
EA_INLINE V multiply_add(V x, V y, V sum) {
    return sum + x * y;
}

template <bool kFirst, class X, class Y>
struct Choose {
    using type = X;
};
template <class X, class Y>
struct Choose<false, X, Y> {
    using type = Y;
};

// Two terms of a sum.
struct Pair {
    BFloat16 first, second;
};

#if defined(__AVX512BF16__)
template <class T>
constexpr bool kPairProducts = __is_same(T, BFloat16);

typedef uint32_t PairVector __attribute__((vector_size(kVectorBytes)));

template <class A>
EA_INLINE PairVector load_widened(const Pair* p) {
    PairVector v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

EA_INLINE PairVector broadcast_at(const BFloat16* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return pair - PairVector{};
}

EA_INLINE Vec<float> multiply_add(PairVector x, PairVector y, Vec<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}

// First and second of each pair from two vectors of float, rounded.
EA_INLINE PairVector join(Vec<float> first, Vec<float> second) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    const __m512i index = (__m512i)(lane_index<float>() | (lane_index<float>() + 16) << 16);
    return (PairVector)_mm512_maskz_permutexvar_epi16(~__mmask32{0}, index, both);
}

typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));

EA_INLINE HalfVector round(Vec<float> x) { return (HalfVector)_mm512_cvtneps_pbh(x); }

// Elements of two rows, of which `count` exist.
EA_INLINE PairVector join(const BFloat16* first, const BFloat16* second, int64_t count = kLanes<float>) {
    const __mmask16 exist = static_cast<__mmask16>((1u << count) - 1);
    const auto lanes = [exist](const BFloat16* p) {
        return _mm512_maskz_cvtepu16_epi32(exist, _mm256_maskz_loadu_epi16(exist, p));
    };
    return (PairVector)lanes(first) | (PairVector)lanes(second) << 16;
}

EA_INLINE void store(Pair* p, PairVector v) { __builtin_memcpy(p, &v, sizeof(v)); }
EA_INLINE void store(BFloat16* p, HalfVector v) { __builtin_memcpy(p, &v, sizeof(v)); }
#else
template <class T>
constexpr bool kPairProducts = false;
#endif

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
    using type = Lanes<I...>;
};

// One half of exchanging blocks of S lanes between two rows.
template <class A, int S, bool kSecond, int... I>
EA_INLINE Vec<A> exchange(Vec<A> x, Vec<A> y, Lanes<I...>) {
    constexpr int L = kLanes<A>;
    return __builtin_shufflevector(x, y, (kSecond ? (I & S ? L + I : I + S) : (I & S ? L + I - S : I))...);
}

// Transposes a square of kLanes x kLanes elements in registers: blocks of 1, 2, 4, ... lanes change places (Eklundh
// 1972).
template <class A, int S = 1>
EA_INLINE void transpose_square(Vec<A> (&row)[kLanes<A>]) {
    if constexpr (S < kLanes<A>) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<A>; ++i) {
            if (i & S) continue;
            const Vec<A> x = row[i], y = row[i + S];
            row[i] = exchange<A, S, false>(x, y, typename MakeLanes<kLanes<A>>::type{});
            row[i + S] = exchange<A, S, true>(x, y, typename MakeLanes<kLanes<A>>::type{});
        }
        transpose_square<A, 2 * S>(row);
    }
}

template <class A, int S, int... I>
EA_INLINE Vec<A> swap_blocks(Vec<A> x, Lanes<I...>) {
    return __builtin_shufflevector(x, x, (I ^ S)...);
}

// The largest of a vector.
template <class A>
EA_INLINE A largest_lane(Vec<A> x) {
    if constexpr (kLanes<A> >= 4) {
        constexpr typename MakeLanes<kLanes<A>>::type lanes{};
        if constexpr (kLanes<A> >= 16) x = larger(x, swap_blocks<A, 8>(x, lanes));
        if constexpr (kLanes<A> >= 8) x = larger(x, swap_blocks<A, 4>(x, lanes));
        x = larger(x, swap_blocks<A, 2>(x, lanes));
        x = larger(x, swap_blocks<A, 1>(x, lanes));
    } else {
        for (int lane = 1; lane < kLanes<A>; ++lane)
            if (x[lane] > x[0]) x[0] = x[lane];
    }
    return x[0];
}

// The sums of the lanes of four vectors, of which `count` are stored.
template <class A>
EA_INLINE void store_sums(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d, int count, A* out) {
    A sums[4] = {};
    if constexpr (kLanes<A> >= 4) {
        constexpr typename MakeLanes<kLanes<A>>::type lanes{};
        const Vec<A> ab = exchange<A, 1, false>(a, b, lanes) + exchange<A, 1, true>(a, b, lanes);
        const Vec<A> cd = exchange<A, 1, false>(c, d, lanes) + exchange<A, 1, true>(c, d, lanes);
        Vec<A> all = exchange<A, 2, false>(ab, cd, lanes) + exchange<A, 2, true>(ab, cd, lanes);
        if constexpr (kLanes<A> >= 8) all += swap_blocks<A, 4>(all, lanes);
        if constexpr (kLanes<A> >= 16) all += swap_blocks<A, 8>(all, lanes);
        __builtin_memcpy(sums, &all, sizeof(sums));
    } else {
        for (int lane = 0; lane < kLanes<A>; ++lane)
            sums[0] += a[lane], sums[1] += b[lane], sums[2] += c[lane], sums[3] += d[lane];
    }
    __builtin_memcpy(out, sums, static_cast<size_t>(count) * sizeof(A));
}

}  // namespace
}  // namespace efficient_attn
