// The sums of linear attention on tensor cores of compute capability 8.0 and newer (mma.sync): forward and backward.
//
//     out_s = sum_t (x_s . y_t + e_s f_t) u_t        over all t, over t <= s, or (reverse) over t >= s
//
// Katharopoulos et al., "Transformers are RNNs", ICML 2020; chunks as in Sun et al., "Retentive Network", 2023, section
// 2.3. Time is cut into segments of chunks of kChunk rows. `linear_attention_states` adds up the state u^T y of each
// segment, `linear_attention_scan` turns them into what was seen before (reverse: comes after) each segment, and
// `linear_attention_sums` walks a segment chunk by chunk with that state: the part of a chunk within itself is a masked
// product [kChunk, kChunk].
//
// What a block of threads and a warp own of a sum, and the products of a chunk: linear_attention_tiles.h.
#pragma once

#include "cuda/sm80/linear_attention_tiles.h"

namespace efficient_attn {
namespace sm80 {
namespace {

// --- states in memory ---

// f(element, offset) for what exists of a warp's part of state number `index`.
template <class S, class Function>
EA_DEVICE void each_state(State<S>& state, const SumsParams& p, int64_t index, int r_tile, int warp, int lane,
                          Function f) {
    const int R = p.u.width, E = p.x.width, width = E + p.extra, height = R + (p.normaliser ? 1 : 0);
    EA_UNROLL
    for (int n = 0; n <= S::kE / 8; ++n) {
        EA_UNROLL
        for (int e = 0; e < 4; ++e) {
            const int row = lane / 4 + e / 2 * 8, column = n * 8 + lane % 4 * 2 + e % 2;
            const bool of_ones = warp == S::kWarps, of_f = n == S::kE / 8;
            const int r = of_ones ? R + row : r_tile * S::kR + warp * 16 + row;
            const int c = of_f ? E + column - S::kE : column;
            const bool exists = r < (of_ones ? height : R) && (of_f ? c < width : c < E);
            if (exists) f(state[n][e], (index * height + r) * width + c);
        }
    }
}

template <class S>
EA_DEVICE void clear_state(State<S>& state) {
    EA_UNROLL
    for (int k = 0; k < (S::kE / 8 + 1) * 4; ++k) state[k / 4][k % 4] = 0.0f;
}

// The state of every segment. Grid: lines * slots * r_tiles; a line is a batch element and `spread` heads of y and u.
template <class S>
EA_KERNEL(S::kMostThreads, S::kBlocksAtOnce)
linear_attention_states(EA_PARAMETER SumsParams p) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int r_tile = static_cast<int>(block_index() % p.r_tiles), lines = p.y.heads / p.spread;
    const int64_t index = block_index() / p.r_tiles;  // of the state
    const int slot = static_cast<int>(index % p.times.slots), line = static_cast<int>(index / p.times.slots);
    const int b = line / lines, head = line % lines * p.spread;
    const Columns<S> columns{warp == S::kWarps, warp, lane};
    State<S> state;
    clear_state<S>(state);
    for (int step = 0; step < p.times.chunks * p.spread; ++step) {
        const int t = p.times.first + (slot * p.times.chunks + step / p.spread) * S::kChunk, h = head + step % p.spread;
        block_sync();  // every warp is done with the rows before
        load_rows<S, S::kE>(S::kY, p.y, b, h, t + p.y.shift, 0);
        load_rows<S, S::kR>(S::kU, p.u, b, h, t + p.u.shift, r_tile * S::kR);
        if (p.extra) load_extra<S>(S::kExtraY, p.y, b, h, t + p.y.shift);
        block_sync();  // the rows are there
        add_to_state<S>(state, columns, p.extra, lane);
    }
    if (warp == S::kWarps && r_tile > 0) return;  // the ones are the same in every block
    each_state<S>(state, p, index, r_tile, warp, lane,
                  [&](float x, int64_t offset) { store_global(p.states + offset, x); });
}

constexpr int kScanThreads = 256;

// In place over (lines, slots, size): each slot becomes the sum of those before it (reverse: after it); without
// causality the first becomes the sum of all. Grid: lines * ceil(size / kScanThreads).
EA_KERNEL(kScanThreads, 1)
linear_attention_scan(EA_PARAMETER SumsParams p) {
    const int64_t size = static_cast<int64_t>(p.u.width + (p.normaliser ? 1 : 0)) * (p.x.width + p.extra);
    const int64_t blocks = (size + kScanThreads - 1) / kScanThreads;
    const int64_t place = block_index() % blocks * kScanThreads + thread_index();
    if (place >= size) return;
    float* line = p.states + block_index() / blocks * p.times.slots * size + place;
    float sum = 0.0f;
    for (int s = 0; s < p.times.slots; ++s) {
        float* slot = line + (p.reverse ? p.times.slots - 1 - s : s) * size;
        const float now = load_global(slot);
        if (p.causal) store_global(slot, sum);
        sum += now;
    }
    if (!p.causal) store_global(line, sum);
}

// --- a segment ---

EA_DEVICE void store_pair(const Rows& out, int64_t offset, int column, float first, float second) {
    const bool both = out.aligned && column + 1 < out.width;
    if (out.dtype == kFloat32) {
        float* target = static_cast<float*>(out.view.data) + offset + column;
        if (both) return store_global(reinterpret_cast<Words2*>(target), Words2{as_bits(first), as_bits(second)});
        if (column < out.width) store_global(target, first);
        if (column + 1 < out.width) store_global(target + 1, second);
        return;
    }
    uint16_t* target = static_cast<uint16_t*>(out.view.data) + offset + column;
    const uint32_t word = out.dtype == kBFloat16 ? pack<BFloat16>(first, second) : pack<Float16>(first, second);
    if (both) return store_global(reinterpret_cast<uint32_t*>(target), word);
    if (column < out.width) store_global(target, static_cast<uint16_t>(word));
    if (column + 1 < out.width) store_global(target + 1, static_cast<uint16_t>(word >> 16));
}

// Hands the sums of the ones, column 0 of the fifth warp, to all warps.
template <class S>
EA_DEVICE void share_normaliser(const float (&out)[S::kM][2][4], int warp, int lane) {
    if (warp == S::kWarps) {
        const int t = lane % 4;
        EA_UNROLL
        for (int m = 0; m < S::kM; m += 2) {
            const float others[4] = {out[m][0][0], shuffle_xor(out[m][0][2], 1), shuffle_xor(out[m + 1][0][0], 2),
                                     shuffle_xor(out[m + 1][0][2], 3)};
            const float mine = t == 0 ? others[0] : t == 1 ? others[1] : t == 2 ? others[2] : others[3];
            store_shared_32(S::kNorms + (m * 16 + t * 8 + lane / 4) * 4, as_bits(mine));
        }
    }
    block_sync();  // the normalisers are there
}

// Writes a chunk of out, divided by the normaliser where there is one.
template <class S>
EA_DEVICE void store_sums(const float (&out)[S::kM][2][4], const SumsParams& p, int b, int h, int first, int r_tile,
                          int warp, int lane) {
    if (p.normaliser) share_normaliser<S>(out, warp, lane);
    EA_UNROLL
    for (int k = 0; k < 2 * S::kM; ++k) {
        const int m = k / 2, half = k % 2, row = m * 16 + half * 8 + lane / 4, n = first + row;
        const float norm = p.normaliser ? as_float(load_shared_32(S::kNorms + row * 4)) : 1.0f;
        if (n < 0 || n >= p.x.N) continue;
        if (warp == S::kWarps) {
            if (r_tile == 0 && lane % 4 == 0) store_global(p.normaliser + line_offset(p.x, b, h) + n, norm);
            continue;
        }
        const bool zero = norm == 0.0f || !counts(p.x, b, n);
        EA_UNROLL
        for (int tile = 0; tile < 2; ++tile) {
            const float first_of = out[m][tile][2 * half], second = out[m][tile][2 * half + 1];
            store_pair(p.out, row_offset(p.out, b, h, n), r_tile * S::kR + warp * 16 + tile * 8 + lane % 4 * 2,
                       zero ? 0.0f : first_of / norm, zero ? 0.0f : second / norm);
        }
    }
}

// Grid: B * heads of x * slots * r_tiles.
template <class S>
EA_KERNEL(S::kMostThreads, S::kBlocksAtOnce)
linear_attention_sums(EA_PARAMETER SumsParams p) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int r_tile = static_cast<int>(block_index() % p.r_tiles);
    const int64_t segment = block_index() / p.r_tiles, line_of_x = segment / p.times.slots;
    const int slot = static_cast<int>(segment % p.times.slots);
    const int b = static_cast<int>(line_of_x / p.x.heads), h = static_cast<int>(line_of_x % p.x.heads);
    const int lines = p.y.heads / p.spread, line = h / (p.x.heads / lines);  // of the state
    const Columns<S> columns{warp == S::kWarps, warp, lane};
    State<S> state;
    clear_state<S>(state);
    each_state<S>(state, p, (static_cast<int64_t>(b) * lines + line) * p.times.slots + (p.causal ? slot : 0), r_tile,
                  warp, lane, [&](float& x, int64_t offset) { x = load_global(p.states + offset); });
    for (int step = 0; step < p.times.chunks; ++step) {
        const int chunk = p.reverse ? p.times.chunks - 1 - step : step;
        const int t = p.times.first + (slot * p.times.chunks + chunk) * S::kChunk;
        float out[S::kM][2][4];
        clear(out);
        block_sync();  // every warp is done with the chunk before
        load_rows<S, S::kE>(S::kX, p.x, b, h, t + p.x.shift, 0);
        if (p.extra) load_extra<S>(S::kExtraX, p.x, b, h, t + p.x.shift);
        for (int g = 0; g < p.spread; ++g) {
            bool bad = false;
            if (p.causal) {
                const int head = line * p.spread + g;
                if (g > 0) block_sync();  // every warp is done with the head before
                load_rows<S, S::kE>(S::kY, p.y, b, head, t + p.y.shift, 0);
                bad = load_rows<S, S::kR>(S::kU, p.u, b, head, t + p.u.shift, r_tile * S::kR);
                if (p.extra) load_extra<S>(S::kExtraY, p.y, b, head, t + p.y.shift);
            }
            bad = block_any(bad);  // and the rows are there
            if (g == 0) multiply_state<S>(out, state, p.extra, lane);
            if (!p.causal) break;
            store_weights<S>(p, warp, lane);
            block_sync();  // the weights are there
            multiply_weights<S>(out, columns, bad, lane);
            if (bad) mark<S>(out, p, columns, lane);
            add_to_state<S>(state, columns, p.extra, lane);
        }
        store_sums<S>(out, p, b, h, t + p.x.shift, r_tile, warp, lane);
    }
}

}  // namespace
}  // namespace sm80
}  // namespace efficient_attn
