// dQ, dK and dV in one pass, for heads of up to 128: five products a pair of tiles instead of the seven of
// attention_key_gradient.h and attention_query_gradient.h. dQ = scale dS K is a sum over the blocks of threads, each
// with its keys, that is added up in global memory in whatever order they come: so its bits may differ from run to run,
// and only a caller who asks for it gets this kernel.
//
// It is the kernel of dK and dV (attention_key_gradient.h) and more: the two groups write dS^T of their keys to shared
// memory, multiply the dS of both by half of the columns of K each and add that to the sums of these columns.
//
// The sums are float32 [B, Hq, 2, Nq, 64]: a head's columns in two halves. The row of a query is 16 chunks of 4; with m
// = 0..3 and t = 0..3, chunk (4 m + t) ^ (4 (i % 2)) of query i holds the columns 16 m + 2 t, ..+1, ..+8 and ..+9: what
// a thread has of the row, without bank conflicts.
#pragma once

#include "cuda/sm90/attention_key_gradient.h"

namespace efficient_attn {
namespace sm90 {
namespace {

template <class T>
using OnePass = KeyGradient<T, 128, true>;

// Byte of a chunk in the row of query `row`, and its first column by chunk.
EA_DEVICE uint32_t sum_chunk(int row, int m, int t) { return static_cast<uint32_t>((m * 4 + t) ^ (row % 2 * 4)) * 16; }

EA_DEVICE float* sums_of(const KernelParams& p, int b, int h, int half, int i) {
    return p.query_sums + (((static_cast<int64_t>(b) * p.call.Hq + h) * 2 + half) * p.call.Nq + i) * kPanel;
}

// Writes dS^T of the group's keys as rows of a tile [keys, queries].
template <class G>
EA_DEVICE void share_gradients(const uint32_t (&gradients)[G::kN / 2][4], uint32_t tile, int lane) {
    EA_UNROLL
    for (int k = 0; k < G::kN / 2; ++k) {
        EA_UNROLL
        for (int r = 0; r < 4; ++r) {
            const int row = group_index() * kGroupRows + group_warp_row() + lane / 4 + r % 2 * 8;
            store_shared_32(tile + chunk_offset<G::kQueries>(row, 2 * k + r / 2) + lane % 4 * 4, gradients[k][r]);
        }
    }
}

// dq = dS K for the group's half of the columns; dS^T [keys, queries] is a tile. Not complete before a group_wait.
template <class G>
EA_DEVICE void multiply_by_keys(float (&dq)[kPanel / 8][4], uint32_t tile) {
    const uint64_t a = matrix_descriptor(tile, 0, kEightRows);
    const uint64_t b = matrix_descriptor(G::kKey + group_index() * (kGroupRows * kRowBytes), 0, kEightRows);
    EA_UNROLL
    for (int k = 0; k < G::kRows / 16; ++k) {
        const int group = k * 16 / kGroupRows, row = k * 16 % kGroupRows;
        group_multiply<typename G::T, kPanel, true, true>(
            dq, matrix_further(a, k * 16 * kRowBytes), matrix_further(b, group * G::kGroupTile + row * kRowBytes),
            k > 0);
    }
}

// Adds the group's half of dQ of a step to the sums, through its part of shared memory.
template <class G>
EA_DEVICE void add_to_sums(const float (&dq)[kPanel / 8][4], float* sums, int rows, int lane) {
    const uint32_t partial = G::kPartial + group_index() * G::kPartialBytes;
    const bool first = thread_index() % kGroupThreads == 0;
    if (first) bulk_wait_read();
    named_sync(group_barrier(), kGroupThreads);  // the part is free
    EA_UNROLL
    for (int m = 0; m < kPanel / 16; ++m) {
        EA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = group_warp_row() + lane / 4 + half * 8;
            store_shared_128(partial + row * (kPanel * 4) + sum_chunk(row, m, lane % 4),
                             {as_bits(dq[2 * m][2 * half]), as_bits(dq[2 * m][2 * half + 1]),
                              as_bits(dq[2 * m + 1][2 * half]), as_bits(dq[2 * m + 1][2 * half + 1])});
        }
    }
    async_proxy_fence();
    named_sync(group_barrier(), kGroupThreads);
    if (!first) return;
    bulk_add(sums, partial, rows * kPanel * 4);
    bulk_commit();
}

// Adds a step to dK and dV of the group's keys and to dQ of the queries.
template <class G>
EA_DEVICE void add_step_and_queries(float (&dk)[1][G::kHead / 8][4], float (&dv)[1][G::kHead / 8][4],
                                    const KernelParams& p, const Step& step, float* sums, Span alive, bool full,
                                    int stage, uint32_t tile) {
    using T = typename G::T;
    const int lane = thread_index() % kWarp;
    const uint32_t queries = G::kSlots + stage * G::kSlotBytes;
    uint32_t weights[G::kN / 2][4], gradients[G::kN / 2][4];
    find_gradients<G>(weights, gradients, dv, p, step, alive, full, stage);
    share_gradients<G>(gradients, tile, lane);
    async_proxy_fence();
    named_sync(kBothGroups, kGroups * kGroupThreads);  // both groups' dS is there; that of two steps ago is done with
    group_fence(gradients, dk[0]);
    group_multiply_rows<T, G::kHead, G::kQueries>(dk[0], gradients, queries);
    float dq[kPanel / 8][4];
    multiply_by_keys<G>(dq, tile);
    group_commit();
    group_wait<0>(dk[0], dv[0], dq, weights, gradients);
    add_to_sums<G>(dq, sums, step.end - step.first, lane);
}
