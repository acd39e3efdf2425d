// Reading a mask: which keys a tile of queries walks, tile by tile, and which pairs of a tile are visible.
//
//     visible(i, j)  =  list(i, j)  and  low <= j - i <= high  and  j < length[b]
//
// A kernel walks along one side of the mask, so everything here is written for `lines` (what a block of threads owns)
// and `steps` (what it walks): queries and keys in the forward, keys and queries where dK and dV are gathered.
#pragma once

#include "cuda/params.h"
#include "cuda/ptx.h"

namespace efficient_attn {
namespace {

EA_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
EA_DEVICE int larger(int a, int b) { return a > b ? a : b; }

struct Span {
    int begin, end;
};

EA_DEVICE Span intersect(Span a, Span b) {
    const int begin = larger(a.begin, b.begin);
    return {begin, larger(begin, smaller(a.end, b.end))};
}

EA_DEVICE int key_count(const KernelParams& p, int b) {
    const int Nk = static_cast<int>(p.call.Nk);
    if (!p.call.mask.kv_lengths) return Nk;
    return larger(0, smaller(load_global(p.call.mask.kv_lengths + b), Nk));
}

// Of an axis of `count` positions, those that some of the lines [first, last] see by window and length, and those that
// all of them see. Line i sees the steps i + low .. i + high.
struct Reach {
    Span any, all;
};

EA_DEVICE Reach reach(int first, int last, int low, int high, int count) {
    Reach r;
    r.any = intersect({first + low, last + high + 1}, {0, count});
    r.all = intersect({last + low, first + high + 1}, {0, count});
    return r;
}

// One step of a walk: positions [first, end), no more than the tile is wide; `tile` is the bit tile of its block, or
// below 0 where every pair is listed, and `offset` the place of `first` in that block.
struct Step {
    int first, end, tile, offset;
};

// Whether some pairs of a tile of lines and a step of `width` positions are visible, and whether all of them are.
struct Sight {
    bool any, all;
};

EA_DEVICE Sight sight_of(const Reach& sees, const Step& step, int width) {
    const bool any = step.first < sees.any.end && step.end > sees.any.begin;
    const bool all = step.tile < 0 && step.first >= sees.all.begin && step.first + width <= sees.all.end &&
                     step.end == step.first + width;
    return {any, all};
}

// The lists of a mask by query block, as the forward and dQ walk them, or by key block, as dK and dV are gathered.
enum Side : int { kByQuery, kByKey };

template <Side kSide>
EA_DEVICE const int64_t* list_rows(const MaskView& m) {
    return kSide == kByQuery ? m.indptr : m.t_indptr;
}
template <Side kSide>
EA_DEVICE const int32_t* list_indices(const MaskView& m) {
    return kSide == kByQuery ? m.indices : m.t_indices;
}
template <Side kSide>
EA_DEVICE const int32_t* list_tile_ids(const MaskView& m) {
    return kSide == kByQuery ? m.tile_ids : m.t_tile_ids;
}

EA_DEVICE int ceil_div(int64_t a, int64_t b) {
    return (static_cast<int>(a) + static_cast<int>(b) - 1) / static_cast<int>(b);
}

// Walks the steps that the lines of one tile (inside one block of the list) may see, kWidth positions at a time,
// ascending. The entry behind the current one is read ahead, so that no load of a tile waits for it. Whatever the list
// holds, steps stay inside `limits`.
template <int kWidth, Side kSide>
class Walk {
  public:
    EA_DEVICE Walk(const KernelParams& p, int b, int h, int line, Span limits)
        : begin_(limits.begin), limit_(limits.end) {
        const MaskView& m = p.call.mask;
        if (!list_rows<kSide>(m)) {
            cursor_ = begin_ / kWidth * kWidth;
            end_ = begin_ < limit_ ? limit_ : cursor_;
            entry_ = last_ = 0;
            return;
        }
        const int block = static_cast<int>(kSide == kByQuery ? m.block_q : m.block_k);
        const int rows = kSide == kByQuery ? ceil_div(p.call.Nq, m.block_q) : ceil_div(p.call.Nk, m.block_k);
        const int64_t head = static_cast<int64_t>(m.batch == 1 ? 0 : b) * m.heads + (m.heads == 1 ? 0 : h);
        const int64_t* row = list_rows<kSide>(m) + head * rows + line / block;
        const int64_t most = m.entries, first = load_global(row), last = load_global(row + 1);
        entry_ = static_cast<int>(first < 0 ? 0 : first > most ? most : first);
        last_ = begin_ < limit_ ? static_cast<int>(last < entry_ ? entry_ : last > most ? most : last) : entry_;
        entry_ = first_entry(m, begin_ / step_block(m));
        cursor_ = end_ = 0;
        read_ahead(m);
    }

    // Before the first step: keeps part `part` of `parts`, of as many steps, or where there is a list, entries each.
    EA_DEVICE void take_part(const KernelParams& p, int part, int parts) {
        const MaskView& m = p.call.mask;
        if (!list_rows<kSide>(m)) {
            const int each = ceil_div(ceil_div(end_ - cursor_, kWidth), parts) * kWidth;
            cursor_ = smaller(cursor_ + part * each, end_);
            end_ = smaller(cursor_ + each, end_);
            return;
        }
        last_ = first_entry(m, ceil_div(limit_, step_block(m)));
        const int each = ceil_div(last_ - entry_, parts);
        entry_ = smaller(entry_ + part * each, last_);
        last_ = smaller(entry_ + each, last_);
        read_ahead(m);
    }

    EA_DEVICE bool next(const KernelParams& p, Step& step) {
        const MaskView& m = p.call.mask;
        while (cursor_ >= end_) {
            if (entry_ >= last_) return false;
            const int block = next_block_, size = step_block(m);
            tile_ = next_tile_;
            ++entry_;
            read_ahead(m);
            if (block < 0) continue;
            if (block > (limit_ - 1) / size) {
                entry_ = last_;
                return false;
            }
            origin_ = block * size;
            cursor_ = origin_ + larger(0, begin_ - origin_) / kWidth * kWidth;
            end_ = smaller(origin_ + size, limit_);
        }
        step.first = cursor_;
        step.end = smaller(cursor_ + kWidth, end_);
        step.tile = tile_ < m.tile_count ? tile_ : -1;
        step.offset = cursor_ - origin_;
        cursor_ += kWidth;
        return true;
    }

  private:
    static EA_DEVICE int step_block(const MaskView& m) {
        return static_cast<int>(kSide == kByQuery ? m.block_k : m.block_q);
    }

    EA_DEVICE void read_ahead(const MaskView& m) {
        if (entry_ >= last_) return;
        next_block_ = load_global(list_indices<kSide>(m) + entry_);
        next_tile_ = load_global(list_tile_ids<kSide>(m) + entry_);
    }

    // The first entry that is not before `block`.
    EA_DEVICE int first_entry(const MaskView& m, int block) const {
        int begin = entry_, end = last_;
        while (begin < end) {
            const int middle = begin + (end - begin) / 2;
            if (load_global(list_indices<kSide>(m) + middle) < block) {
                begin = middle + 1;
            } else {
                end = middle;
            }
        }
        return begin;
    }

    int begin_, limit_, cursor_, end_, entry_, last_;
    int origin_ = 0, tile_ = -1, next_block_ = -1, next_tile_ = -1;
};

EA_DEVICE const uint8_t* bit_tile(const MaskView& m, int tile) {
    return m.tiles + tile * (m.block_q * (m.block_k / 8));
}

// How an axis is cut into tiles of at most kRows lines; a tile never crosses a block of the list.
struct Tiling {
    int block, tiles_per_block, tile;

    // Lines of tile number `index`; empty where a ragged last block ends before it.
    EA_DEVICE Span lines(int index, int count) const {
        const int begin = index / tiles_per_block * block + index % tiles_per_block * tile;
        const int end = smaller(begin + tile, smaller((index / tiles_per_block + 1) * block, count));
        return {begin, larger(begin, end)};
    }
};

template <int kRows>
EA_DEVICE Tiling tiling(bool listed, int block) {
    if (!listed) return {kRows, 1, kRows};
    return {block, (block + kRows - 1) / kRows, kRows};
}

}  // namespace
}  // namespace efficient_attn
