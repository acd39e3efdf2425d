// Every machine instruction that the kernels use beside plain arithmetic, one function each; nothing else in csrc/cuda
// names a thread, an address space or a line of PTX. The same kernels therefore run on a CPU with
// tests/kernels/cuda/emulator/cuda/ptx.h in the place of this file.
//
// Layouts of fragments are those of the PTX ISA. With g = lane / 4 and t = lane % 4, for m16n8k16:
//     A [16, 16]  a0 (g, 2t..2t+1)  a1 (g+8, 2t..)  a2 (g, 2t+8..)  a3 (g+8, 2t+8..)     two 16-bit elements a register
//     B [16, 8]   b0 (2t..2t+1, g)  b1 (2t+8.., g)
//     C [16, 8]   c0 c1 (g, 2t..2t+1)  c2 c3 (g+8, 2t..2t+1)                             float32
//
// Shared memory is addressed in bytes from its beginning. "Warp-wide": all 32 lanes call it together. "Group-wide": all
// four warps of a warpgroup (128 threads, the first a multiple of 128) do. What stands below "Hopper" needs sm_90a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/params.h"

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

// bar.arrive id, threads: counts the warp for a named_sync of others, without waiting; warp-wide.
EA_DEVICE void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.red.or.pred id, threads: a named_sync that says whether some thread's `value` was true.
EA_DEVICE bool named_any(int id, int threads, bool value) {
    int any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.b32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.b32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"(static_cast<int>(value))
                 : "memory");
    return any != 0;
}

// bar.warp.sync: every lane of the warp; memory written before is seen after.
EA_DEVICE void warp_sync() { __syncwarp(); }

// vote.any: warp-wide.
EA_DEVICE bool warp_any(bool value) { return __any_sync(0xFFFFFFFFu, value) != 0; }

// shfl.bfly: `value` of the lane whose number differs by the bits of `mask`; warp-wide.
EA_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

// A value that is the same in all lanes, said so (shfl.idx of lane 0): what follows from it needs no register of a
// lane's own; warp-wide.
EA_DEVICE int uniform(int value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// --- global memory ---

template <class T>
EA_DEVICE T load_global(const T* address) {
    return *address;
}
template <class T>
EA_DEVICE void store_global(T* address, T value) {
    *address = value;
}

// atom.add by one lane: what stood there before, for the whole warp; warp-wide. `end`: beyond it nothing is drawn for.
EA_DEVICE int draw_ticket(int32_t* counter, int /*end*/) {
    int drawn = 0;
    if (threadIdx.x % 32 == 0)
        asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(drawn) : "l"(counter) : "memory");
    return __shfl_sync(0xFFFFFFFFu, drawn, 0);
}

// --- shared memory ---

extern __shared__ __align__(1024) uint8_t shared_memory[];

EA_DEVICE uint32_t shared_address(uint32_t offset) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + offset;
}

// The swizzle of tensor copies and of wgmma goes by the address: a beginning that is no multiple of 1024, which only a
// toolchain that ignores the alignment above could give, would be silently wrong numbers. So it is an error.
EA_DEVICE void require_aligned_shared() {
    if (shared_address(0) % 1024 != 0) asm volatile("trap;");
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

// --- Hopper ---

// Whether this compilation may use what only sm_90a has; kernels that need it are empty elsewhere.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif

// setmaxnreg.dec / inc: the threads of a warpgroup give registers back, or take some that others gave and wait for
// them; kCount a thread from here on, a multiple of 8. Group-wide.
template <int kCount>
EA_DEVICE void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
EA_DEVICE void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- Hopper: barriers in shared memory (mbarrier), 8 bytes each ---
//
// A barrier counts through phases. A phase completes when `arrivals` arrivals have come and as many bytes as were
// expected have been copied; then the next one begins. The parity of the first phase is 0.

// mbarrier.init: by one thread, before others see it by barrier_init_fence and block_sync.
EA_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// fence.mbarrier_init, fence.proxy.async: the barriers that this thread made are seen by asynchronous copies too.
EA_DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// mbarrier.arrive: memory accessed before is done with for those who wait for the phase.
EA_DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// mbarrier.arrive.expect_tx: an arrival that lets the phase wait for `bytes` copied bytes as well.
EA_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// mbarrier.try_wait.parity: returns when the phase of that parity is complete: at once where it is the one before the
// current one, as parity 1 is for a new barrier.
EA_DEVICE void barrier_wait(uint32_t barrier, int parity) {
    uint32_t complete;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(complete)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!complete);
}

// --- Hopper: copies of boxes of a tensor (TMA) ---

// prefetch.tensormap: the map will be used soon.
EA_DEVICE void tensor_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// cp.async.bulk.tensor.4d: one thread starts copying the map's box at these coordinates, innermost first, zeros where
// it leaves the tensor. All bytes of the box count for the current phase of `barrier`. With the 128-byte swizzle, chunk
// c (16 bytes) of row r of a box 128 bytes wide comes to rest in chunk c ^ (r & 7); `address` is a multiple of 1024.
EA_DEVICE void tensor_load(uint32_t address, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared_address(address)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// fence.proxy.async: what this thread wrote to or read from shared memory by ordinary accesses comes before later
// accesses by tensor copies and group_multiply; those of other threads need a barrier besides, behind the fence.
EA_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Hopper: sums in global memory, from shared memory ---

// cp.reduce.async.bulk add.f32: one thread starts adding `bytes` of float32 (a multiple of 16, both addresses too).
// Sums of several blocks come in any order.
EA_DEVICE void bulk_add(float* target, uint32_t source, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
                 "r"(shared_address(source)), "r"(bytes)
                 : "memory");
}

// cp.async.bulk.commit_group: the sums since the last commit become one group of this thread.
EA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// cp.async.bulk.wait_group.read: no group of this thread still reads shared memory.
EA_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// cp.async.bulk.wait_group: every group of this thread is complete.
EA_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// fence.proxy.async of global memory, between sums and the turns that order them: behind bulk_wait before pass_turn,
// and behind await_turn before bulk_add.
EA_DEVICE void sums_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ld.acquire of all blocks of threads: returns when `turn` has been passed on `number` times. What they who passed it
// had done before is done.
EA_DEVICE void await_turn(const int32_t* turn, int number) {
    int passed = -1;
    while (true) {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(passed) : "l"(turn) : "memory");
        if (passed == number) return;
        __nanosleep(20);
    }
}

// red.release: a turn goes to the next one, who finds done what this thread has done.
EA_DEVICE void pass_turn(int32_t* turn) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
}

// --- Hopper: tensor cores of a warpgroup (wgmma) ---
//
// Accumulators [64, kN] of a warpgroup: warp w has rows 16 w .. +15, as m16n8 accumulators side by side. A in registers
// likewise: the A fragment of m16n8k16. A multiply reads its registers and shared memory, and writes its accumulators,
// at any time until a group_wait that covers it: nothing may touch them in between.

// Shared memory matrix with 128-byte swizzle, rows of 128 bytes (64 elements), eight rows to 1024 bytes:
//     sum along the rows of memory (K-major)     `stride` from 8 rows to the next 8; `leading` is not used
//     sum across the rows of memory (MN-major)   `stride` from 8 rows to the next 8; `leading` from 64 columns to the
//                                                next 64
// A step of the sum further on: address + 32 bytes (16 columns) K-major, + 16 rows MN-major.
EA_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    return static_cast<uint64_t>((shared_address(address) & 0x3FFFFu) >> 4) |
           static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

// The descriptor of the matrix `bytes` further on.
EA_DEVICE uint64_t matrix_further(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Keeps the compiler from moving ordinary accesses of these registers across this place.
template <int kN>
EA_DEVICE void hold(float (&c)[kN][4]) {
    EA_UNROLL
    for (int n = 0; n < kN; ++n)
        asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}
template <int kN>
EA_DEVICE void hold(uint32_t (&a)[kN][4]) {
    EA_UNROLL
    for (int n = 0; n < kN; ++n)
        asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}

// wgmma.fence: ordinary accesses of registers come before later multiplies. Needed before the first multiply, after
// each group_wait, and whenever registers were written: these are named. Group-wide, as commit and wait are: behind no
// branch in which the warps of a group may differ.
template <class... Registers>
EA_DEVICE void group_fence(Registers&... written) {
    (hold(written), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group: the multiplies since the last commit become one group.
EA_DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: returns when at most the latest kPending groups are still under way. `done`: the accumulators, and
// the registers of A, that are free again by that.
template <int kPending, class... Registers>
EA_DEVICE void group_wait(Registers&... done) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (hold(done), ...);
}

#define EA_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define EA_TEN_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define EA_NAMES_32 EA_TEN_0 ", %10, %11, %12, %13, %14, %15"
#define EA_NAMES_64 EA_TEN_0 ", " EA_TEN(1) ", " EA_TEN(2) ", %30, %31"
#define EA_NAMES_80 EA_TEN_0 ", " EA_TEN(1) ", " EA_TEN(2) ", " EA_TEN(3)
#define EA_NAMES_96 EA_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define EA_NAMES_128 EA_NAMES_80 ", " EA_TEN(4) ", " EA_TEN(5) ", %60, %61, %62, %63"
#define EA_NAMES_176 \
    EA_NAMES_80 ", " EA_TEN(4) ", " EA_TEN(5) ", " EA_TEN(6) ", " EA_TEN(7) ", %80, %81, %82, %83, %84, %85, %86, %87"
#define EA_NAMES_256                                                                                                   \
    EA_NAMES_80 ", " EA_TEN(4) ", " EA_TEN(5) ", " EA_TEN(6) ", " EA_TEN(7) ", " EA_TEN(8) ", " EA_TEN(9) ", " EA_TEN( \
        10) ", " EA_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define EA_C(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define EA_C4(n) EA_C(n), EA_C(n + 1), EA_C(n + 2), EA_C(n + 3)
#define EA_C_32 EA_C4(0)
#define EA_C_64 EA_C_32, EA_C4(4)
#define EA_C_80 EA_C_64, EA_C(8), EA_C(9)
#define EA_C_96 EA_C_64, EA_C4(8)
#define EA_C_128 EA_C_96, EA_C4(12)
#define EA_C_176 EA_C_128, EA_C4(16), EA_C(20), EA_C(21)
#define EA_C_256 EA_C_128, EA_C4(16), EA_C4(20), EA_C4(24), EA_C4(28)

// wgmma of kN = N columns; the operands behind the accumulators have the numbers that follow.
#define EA_SHARED_ASM(TYPE, N, A, B, ADD, TRANSPOSE_A, TRANSPOSE_B)                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N    \
                 "k16.f32." TYPE "." TYPE " {" EA_NAMES_##N "}, %" #A ", %" #B ", p, 1, 1, %" #TRANSPOSE_A \
                                                            ", %" #TRANSPOSE_B ";\n}"                      \
                 : EA_C_##N                                                                                \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposeA)),  \
                   "n"(static_cast<int>(kTransposeB))                                                      \
                 : "memory")
#define EA_SHARED(N, ...)                                   \
    if constexpr (kN == N && std::is_same_v<T, BFloat16>) { \
        EA_SHARED_ASM("bf16", N, __VA_ARGS__);              \
    } else if constexpr (kN == N) {                         \
        EA_SHARED_ASM("f16", N, __VA_ARGS__);               \
    }
#define EA_REGISTERS_ASM(TYPE, N, A0, A1, A2, A3, B, ADD, TRANSPOSE)                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N         \
                 "k16.f32." TYPE "." TYPE " {" EA_NAMES_##N "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B \
                                                            ", p, 1, 1, %" #TRANSPOSE ";\n}"                    \
                 : EA_C_##N                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),       \
                   "n"(static_cast<int>(kTransposeB))                                                           \
                 : "memory")
#define EA_REGISTERS(N, ...)                                \
    if constexpr (kN == N && std::is_same_v<T, BFloat16>) { \
        EA_REGISTERS_ASM("bf16", N, __VA_ARGS__);           \
    } else if constexpr (kN == N) {                         \
        EA_REGISTERS_ASM("f16", N, __VA_ARGS__);            \
    }

template <int kN>
constexpr bool kGroupWidth = kN == 32 || kN == 64 || kN == 80 || kN == 96 || kN == 128 || kN == 176 || kN == 256;

// wgmma.mma_async.m64nNk16: c = a b, or c += a b where `accumulate`. a: [64, 16] in shared memory, K-major, or
// MN-major where kTransposeA. b: [16, kN], K-major in shared memory (as the rows of B^T), or MN-major where
// kTransposeB; group-wide.
template <class T, int kN, bool kTransposeB, bool kTransposeA = false>
EA_DEVICE void group_multiply(float (&c)[kN / 8][4], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(kGroupWidth<kN>, "no instruction of this width is written down here");
    EA_SHARED(32, 16, 17, 18, 19, 20)
    EA_SHARED(64, 32, 33, 34, 35, 36)
    EA_SHARED(80, 40, 41, 42, 43, 44)
    EA_SHARED(96, 48, 49, 50, 51, 52)
    EA_SHARED(128, 64, 65, 66, 67, 68)
    EA_SHARED(176, 88, 89, 90, 91, 92)
    EA_SHARED(256, 128, 129, 130, 131, 132)
}

// The same with a, [64, 16], in registers.
template <class T, int kN, bool kTransposeB>
EA_DEVICE void group_multiply(float (&c)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(kGroupWidth<kN>, "no instruction of this width is written down here");
    EA_REGISTERS(32, 16, 17, 18, 19, 20, 21, 22)
    EA_REGISTERS(64, 32, 33, 34, 35, 36, 37, 38)
    EA_REGISTERS(80, 40, 41, 42, 43, 44, 45, 46)
    EA_REGISTERS(96, 48, 49, 50, 51, 52, 53, 54)
    EA_REGISTERS(128, 64, 65, 66, 67, 68, 69, 70)
    EA_REGISTERS(256, 128, 129, 130, 131, 132, 133, 134)
}

#undef EA_TEN
#undef EA_TEN_0
#undef EA_NAMES_32
#undef EA_NAMES_64
#undef EA_NAMES_80
#undef EA_NAMES_96
#undef EA_NAMES_128
#undef EA_NAMES_256
#undef EA_C
#undef EA_C4
#undef EA_C_32
#undef EA_C_64
#undef EA_C_80
#undef EA_C_96
#undef EA_C_128
#undef EA_C_256
#undef EA_SHARED_ASM
#undef EA_SHARED
#undef EA_REGISTERS_ASM
#undef EA_REGISTERS

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
