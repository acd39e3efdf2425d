// Every machine instruction that the kernels use beside plain arithmetic, one function each; nothing else in csrc/cuda
// names a thread, an address space or a line of PTX. The same kernels therefore run on a CPU with
// tests/cuda_host/cuda/ptx.h in the place of this file.
//
// Layouts of fragments are those of the PTX ISA. With g = lane / 4 and t = lane % 4, for m16n8k16:
//     A [16, 16]  a0 (g, 2t..2t+1)  a1 (g+8, 2t..)  a2 (g, 2t+8..)  a3 (g+8, 2t+8..)     two 16-bit elements a register
//     B [16, 8]   b0 (2t..2t+1, g)  b1 (2t+8.., g)
//     C [16, 8]   c0 c1 (g, 2t..2t+1)  c2 c3 (g+8, 2t..2t+1)                             float32
//
// Shared memory is addressed in bytes from its beginning. "Warp-wide": all 32 lanes call it together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define EA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define EA_DEVICE __device__ __forceinline__
#define EA_PARAMETER const __grid_constant__
#define EA_UNROLL _Pragma("unroll")
#define EA_KEEP_LOOP _Pragma("unroll 1")

namespace efficient_attn {
namespace {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};

// --- where a thread is ---

EA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
EA_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
EA_DEVICE int64_t block_count() { return static_cast<int64_t>(gridDim.x); }

// --- barriers and votes ---

// bar.sync 0: every thread of the block; memory written before is seen after.
EA_DEVICE void block_sync() { asm volatile("bar.sync 0;" ::: "memory"); }

// bar.red.or.pred 0: a block_sync that says whether some thread's `value` was true.
EA_DEVICE bool block_any(bool value) { return __syncthreads_or(value) != 0; }

// bar.sync id, threads: a barrier of its own for `threads` threads (whole warps), id from 1 to 15.
EA_DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// bar.warp.sync: every lane of the warp; memory written before is seen after.
EA_DEVICE void warp_sync() { __syncwarp(); }

// vote.any: warp-wide.
EA_DEVICE bool warp_any(bool value) { return __any_sync(0xFFFFFFFFu, value) != 0; }

// shfl.bfly: `value` of the lane whose number differs by the bits of `mask`; warp-wide.
EA_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

// --- global memory ---

template <class T>
EA_DEVICE T load_global(const T* address) {
    return *address;
}
template <class T>
EA_DEVICE void store_global(T* address, T value) {
    *address = value;
}

// --- shared memory ---

extern __shared__ __align__(1024) uint8_t shared_memory[];

EA_DEVICE uint32_t shared_address(uint32_t offset) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
}

// st.shared.b32, warp-wide.
EA_DEVICE void store_shared_32(uint32_t address, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared_address(address)), "r"(value) : "memory");
}

// st.shared.v4.b32, warp-wide; 16-byte aligned.
EA_DEVICE void store_shared_128(uint32_t address, Words4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(address)), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

// ld.shared.b32, warp-wide.
EA_DEVICE uint32_t load_shared_32(uint32_t address) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(shared_address(address)) : "memory");
    return value;
}

struct alignas(8) Words2 {
    uint32_t x, y;
};

// ld.shared.v2.b32, warp-wide; 8-byte aligned.
EA_DEVICE Words2 load_shared_64(uint32_t address) {
    Words2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared_address(address)) : "memory");
    return v;
}

// ld.shared.v4.b32, warp-wide; 16-byte aligned.
EA_DEVICE Words4 load_shared_128(uint32_t address) {
    Words4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address(address))
                 : "memory");
    return v;
}

// ldmatrix.x4: four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16-byte
// aligned) and gets of matrix m, in r[m], the elements (l / 4, 2 (l % 4) ..+1); warp-wide.
EA_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(address))
                 : "memory");
}

// ldmatrix.x4.trans: the same, and each matrix transposed: r[m] holds its elements (2 (l % 4) ..+1, l / 4).
EA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(address))
                 : "memory");
}

// --- asynchronous copies: global to shared memory past the registers ---

// cp.async.cg 16 with zero fill: `bytes` (0 to 16) from `source`, zeros behind them. Both 16-byte aligned; warp-wide.
EA_DEVICE void copy_async(uint32_t address, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(address)), "l"(source),
                 "r"(bytes)
                 : "memory");
}

// cp.async.ca 4 with zero fill: one word from `source`, or zero where not `exists`; warp-wide.
EA_DEVICE void copy_async_32(uint32_t address, const void* source, bool exists) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(address)), "l"(source),
                 "r"(exists ? 4 : 0)
                 : "memory");
}

// cp.async.commit_group: the copies since the last commit become one group.
EA_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: returns when at most the latest kPending groups of this thread are still under way. What other
// threads copied needs a barrier besides.
template <int kPending>
EA_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- tensor cores ---

// mma.sync.m16n8k16: c += a b, products exact, sums in float32; warp-wide.
template <class T>
EA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
EA_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
EA_DEVICE void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- arithmetic ---

// cvt.rn.bf16x2 / f16x2: two float32 rounded to nearest even, `low` in the lower half.
template <class T>
EA_DEVICE uint32_t pack(float low, float high);

template <>
EA_DEVICE uint32_t pack<BFloat16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

template <>
EA_DEVICE uint32_t pack<Float16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// The float32 of 16 bits.
template <class T>
EA_DEVICE float unpack(uint32_t bits);

template <>
EA_DEVICE float unpack<BFloat16>(uint32_t bits) {
    return __uint_as_float(bits << 16);
}

template <>
EA_DEVICE float unpack<Float16>(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// ex2.approx.ftz: 2^x within 2 ulp, 0 for -inf, NaN for NaN.
EA_DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

EA_DEVICE float logarithm_2(float x) { return log2f(x); }

// fma.rn: a b + c rounded once.
EA_DEVICE float multiply_add_scalar(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// mul.hi.u32: the upper half of the product.
EA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

EA_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
EA_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
EA_DEVICE float infinity() { return __uint_as_float(0x7F800000u); }
EA_DEVICE float not_a_number() { return __uint_as_float(0x7FFFFFFFu); }

}  // namespace
}  // namespace efficient_attn
