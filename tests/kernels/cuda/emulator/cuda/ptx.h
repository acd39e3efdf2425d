// The emulator of csrc/cuda/ptx.h: the same functions for a CPU. See emulator.h for what it checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/params.h"
#include "emulator.h"
#include "floats.h"

#define EA_KERNEL(threads, blocks) void
#define EA_DEVICE inline
#define EA_PARAMETER const
#define EA_UNROLL
#define EA_KEEP_LOOP

namespace efficient_attn {
namespace {

struct BFloat16 {};
struct Float16 {};

struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};

EA_DEVICE int thread_index() { return emulator::thread_index(); }
EA_DEVICE int64_t block_index() { return emulator::block_index(); }
EA_DEVICE int64_t block_count() { return emulator::block_count(); }

EA_DEVICE void block_sync() { emulator::block_barrier(0, 0); }
EA_DEVICE bool block_any(bool value) { return emulator::barrier_any(0, 0, value); }
EA_DEVICE void named_sync(int id, int threads) { emulator::block_barrier(id, threads); }
EA_DEVICE void named_arrive(int id, int threads) { emulator::barrier_arrive_only(id, threads); }
EA_DEVICE bool named_any(int id, int threads, bool value) { return emulator::barrier_any(id, threads, value); }
EA_DEVICE void warp_sync() { emulator::warp_wide(emulator::kWarpSync, nullptr); }

EA_DEVICE bool warp_any(bool value) {
    emulator::Vote vote{value};
    emulator::warp_wide(emulator::kWarpAny, &vote);
    return vote.value;
}

EA_DEVICE int uniform(int value) { return value; }

EA_DEVICE float shuffle_xor(float value, int mask) {
    emulator::Shuffle shuffle{value, mask};
    emulator::warp_wide(emulator::kShuffle, &shuffle);
    return shuffle.value;
}

template <class T>
EA_DEVICE T load_global(const T* address) {
    emulator::check_global(address, sizeof(T), false);
    return *address;
}
template <class T>
EA_DEVICE void store_global(T* address, T value) {
    emulator::check_global(address, sizeof(T), true);
    *address = value;
}

EA_DEVICE void require_aligned_shared() {}

EA_DEVICE int draw_ticket(int32_t* counter, int end) {
    emulator::Ticket ticket{counter, end, 0};
    emulator::warp_wide(emulator::kDrawTicket, &ticket);
    return ticket.value;
}

EA_DEVICE void store_shared_32(uint32_t address, uint32_t value) {
    emulator::Access access{address, {value, 0, 0, 0}};
    emulator::warp_wide(emulator::kStore32, &access);
}

EA_DEVICE void store_shared_128(uint32_t address, Words4 v) {
    emulator::Access access{address, {v.x, v.y, v.z, v.w}};
    emulator::warp_wide(emulator::kStore128, &access);
}

EA_DEVICE uint32_t load_shared_32(uint32_t address) {
    emulator::Access access{address, {}};
    emulator::warp_wide(emulator::kLoad32, &access);
    return access.words[0];
}

struct alignas(8) Words2 {
    uint32_t x, y;
};

EA_DEVICE Words2 load_shared_64(uint32_t address) {
    emulator::Access access{address, {}};
    emulator::warp_wide(emulator::kLoad64, &access);
    return {access.words[0], access.words[1]};
}

EA_DEVICE Words4 load_shared_128(uint32_t address) {
    emulator::Access access{address, {}};
    emulator::warp_wide(emulator::kLoad128, &access);
    return {access.words[0], access.words[1], access.words[2], access.words[3]};
}

EA_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
    emulator::Access access{address, {}};
    emulator::warp_wide(emulator::kMatrices, &access);
    std::memcpy(r, access.words, sizeof r);
}

EA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    emulator::Access access{address, {}};
    emulator::warp_wide(emulator::kMatricesTransposed, &access);
    std::memcpy(r, access.words, sizeof r);
}

EA_DEVICE void copy_async(uint32_t address, const void* source, int bytes) {
    emulator::Copy copy{address, source, bytes, 16};
    emulator::warp_wide(emulator::kCopyAsync, &copy);
}
EA_DEVICE void copy_async_32(uint32_t address, const void* source, bool exists) {
    emulator::Copy copy{address, source, exists ? 4 : 0, 4};
    emulator::warp_wide(emulator::kCopyAsync32, &copy);
}
EA_DEVICE void copy_async_commit() { emulator::commit_copies(); }
template <int kPending>
EA_DEVICE void copy_async_wait() {
    emulator::wait_copies(kPending);
}

template <class T>
EA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Mma mma{c, a, {b0, b1}};
    emulator::warp_wide(sizeof(T) && std::is_same_v<T, BFloat16> ? emulator::kMmaBFloat16 : emulator::kMmaFloat16,
                        &mma);
}

// --- Hopper ---

constexpr bool kHopper = true;

template <int kCount>
EA_DEVICE void registers_give() {
    emulator::RegisterCount change{kCount, false};
    emulator::warp_wide(emulator::kRegisters, &change);
}
template <int kCount>
EA_DEVICE void registers_take() {
    emulator::RegisterCount change{kCount, true};
    emulator::warp_wide(emulator::kRegisters, &change);
}

EA_DEVICE void barrier_init(uint32_t barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
EA_DEVICE void barrier_init_fence() { emulator::barrier_init_fence(); }
EA_DEVICE void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, 0); }
EA_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) { emulator::barrier_arrive(barrier, bytes); }
EA_DEVICE void barrier_wait(uint32_t barrier, int parity) { emulator::barrier_wait(barrier, parity); }

static_assert(sizeof(emulator::TensorMapFields) <= sizeof(TensorMap));

EA_DEVICE void tensor_prefetch(const TensorMap&) {}
EA_DEVICE void tensor_load(uint32_t address, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    emulator::TensorMapFields fields;
    std::memcpy(&fields, &map, sizeof fields);
    emulator::tensor_load(address, fields, barrier, {c0, c1, c2, c3});
}
EA_DEVICE void async_proxy_fence() { emulator::async_proxy_fence(); }

EA_DEVICE void bulk_add(float* target, uint32_t source, int bytes) { emulator::bulk_add(target, source, bytes); }
EA_DEVICE void bulk_commit() { emulator::bulk_commit(); }
EA_DEVICE void bulk_wait_read() { emulator::bulk_wait(true); }
EA_DEVICE void bulk_wait() { emulator::bulk_wait(false); }
EA_DEVICE void sums_fence() { emulator::sums_fence(); }
EA_DEVICE void await_turn(const int32_t* turn, int number) { emulator::await_turn(turn, number); }
EA_DEVICE void pass_turn(int32_t* turn) { emulator::pass_turn(turn); }

EA_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}
EA_DEVICE uint64_t matrix_further(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

template <class... R>
EA_DEVICE void group_fence(R&... written) {
    const emulator::Registers named[] = {{&written, sizeof written}..., {}};
    emulator::Fence fence{named, sizeof...(R), 0};
    emulator::warp_wide(emulator::kGroupFence, &fence);
}
EA_DEVICE void group_commit() { emulator::warp_wide(emulator::kGroupCommit, nullptr); }
template <int kPending, class... R>
EA_DEVICE void group_wait(R&... done) {
    const emulator::Registers named[] = {{&done, sizeof done}..., {}};
    emulator::Fence fence{named, sizeof...(R), kPending};
    emulator::warp_wide(emulator::kGroupWait, &fence);
}

template <class T, int kN, bool kTransposeB, bool kTransposeA = false>
EA_DEVICE void group_multiply(float (&c)[kN / 8][4], uint64_t a, uint64_t b, bool accumulate) {
    emulator::GroupMultiply multiply{&c[0][0],    nullptr,    a,          b, kN, std::is_same_v<T, BFloat16>,
                                     kTransposeB, accumulate, kTransposeA};
    emulator::warp_wide(emulator::kGroupMultiply, &multiply);
}
template <class T, int kN, bool kTransposeB>
EA_DEVICE void group_multiply(float (&c)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emulator::GroupMultiply multiply{&c[0][0],    a,          0,    b, kN, std::is_same_v<T, BFloat16>,
                                     kTransposeB, accumulate, false};
    emulator::warp_wide(emulator::kGroupMultiply, &multiply);
}

template <class T>
EA_DEVICE uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, BFloat16>)
        return emulator::to_bfloat16(low) | static_cast<uint32_t>(emulator::to_bfloat16(high)) << 16;
    return emulator::to_float16(low) | static_cast<uint32_t>(emulator::to_float16(high)) << 16;
}

template <class T>
EA_DEVICE float unpack(uint32_t bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    return std::is_same_v<T, BFloat16> ? emulator::from_bfloat16(half) : emulator::from_float16(half);
}

EA_DEVICE float power_of_2(float x) { return std::exp2(x); }
EA_DEVICE float logarithm_2(float x) { return std::log2(x); }
EA_DEVICE float multiply_add_scalar(float a, float b, float c) { return std::fma(a, b, c); }
EA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
EA_DEVICE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
EA_DEVICE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
EA_DEVICE float infinity() { return std::numeric_limits<float>::infinity(); }
EA_DEVICE float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }

}  // namespace
}  // namespace efficient_attn
