// Block lists of tokens in the order of their buckets, where what a query sees is a run of columns: the same lists as
// efficient_attn/patterns/sorted_tokens.py makes, a row of a tile of 64 x 64 pairs a word.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace efficient_attn {

// Where the tokens of some rounds are put, int32: query (rounds, B, H, Nq), key (rounds, B, Hkv, Nk); of a key in no
// bucket -1, of a query never. round: the one whose pairs are listed, without those of the rounds before it; with the
// orders that sort its tokens stably, (B, H, Nq) and (B, Hkv, Nk).
struct BucketParams {
    const int32_t *query, *key, *query_order, *key_order;
    int64_t round, B, H, Hkv, Nq, Nk;
    bool causal;  // a query at position p sees keys up to p + offset
    int64_t offset;
    bool others;  // without oneself
};

// Stable, of numbers from -1 on.
inline void sort_buckets(const int32_t* bucket, int64_t lines, int64_t count, int32_t* order) {
    std::vector<int64_t> place;
    for (int64_t line = 0; line < lines; ++line, bucket += count, order += count) {
        const int32_t most = count ? *std::max_element(bucket, bucket + count) : 0;
        place.assign(static_cast<size_t>(most) + 3, 0);
        for (int64_t i = 0; i < count; ++i) ++place[static_cast<size_t>(bucket[i] + 2)];
        for (size_t b = 1; b < place.size(); ++b) place[b] += place[b - 1];
        for (int64_t i = 0; i < count; ++i)
            order[place[static_cast<size_t>(bucket[i] + 1)]++] = static_cast<int32_t>(i);
    }
}

class BucketLists {
  public:
    static constexpr int64_t kBlock = 64;
    static constexpr int32_t kFull = -1;

    std::vector<int64_t> indptr{0};
    std::vector<int32_t> indices, ids;
    std::vector<uint64_t> tiles;

    explicit BucketLists(const BucketParams& p) : p_(p) {
        for (int64_t b = 0; b < p.B; ++b)
            for (int64_t h = 0; h < p.H; ++h) {
                begin_line(b, h);
                for (int64_t first = 0; first < p.Nq; first += kBlock) add_row(first, std::min(kBlock, p.Nq - first));
            }
    }

    int64_t entries() const { return static_cast<int64_t>(indices.size()); }
    int64_t tile_count() const { return static_cast<int64_t>(tiles.size()) / kBlock; }

  private:
    const BucketParams p_;
    const int32_t *query_order_ = nullptr, *key_order_ = nullptr;
    std::vector<const int32_t*> query_, key_;  // of this line, by round
    std::vector<int64_t> starts_, own_;
    std::vector<uint64_t> word_, now_;  // of a round before: the keys of a block by bucket, and since when that holds
    uint64_t clock_ = 0;

    static uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

    void begin_line(int64_t b, int64_t h) {
        const int64_t line = b * p_.H + h, key_line = b * p_.Hkv + h / (p_.H / p_.Hkv);
        query_order_ = p_.query_order + line * p_.Nq;
        key_order_ = p_.key_order + key_line * p_.Nk;
        query_.clear(), key_.clear();
        int32_t most = 0;
        for (int64_t r = 0; r <= p_.round; ++r) {
            query_.push_back(p_.query + (r * p_.B * p_.H + line) * p_.Nq);
            key_.push_back(p_.key + (r * p_.B * p_.Hkv + key_line) * p_.Nk);
            if (p_.Nq) most = std::max(most, *std::max_element(query_.back(), query_.back() + p_.Nq));
            if (p_.Nk) most = std::max(most, *std::max_element(key_.back(), key_.back() + p_.Nk));
        }
        const size_t buckets = static_cast<size_t>(most) + 1;
        starts_.assign(buckets + 2, 0);  // at bucket + 1: where those before it end
        for (int64_t j = 0; j < p_.Nk; ++j) ++starts_[static_cast<size_t>(key_.back()[j] + 2)];
        for (size_t n = 1; n < starts_.size(); ++n) starts_[n] += starts_[n - 1];
        word_.assign(buckets, 0), now_.assign(buckets, 0), clock_ = 0;
        if (!p_.others) return;
        own_.assign(static_cast<size_t>(p_.Nk), 0);
        for (int64_t c = 0; c < p_.Nk; ++c) own_[static_cast<size_t>(key_order_[c])] = c;
    }

    void add_row(int64_t first, int64_t count) {
        int64_t low[kBlock], high[kBlock], start = p_.Nk, stop = 0;
        for (int64_t r = 0; r < count; ++r) {
            const int32_t token = query_order_[first + r];
            const size_t bucket = static_cast<size_t>(query_.back()[token]);
            low[r] = starts_[bucket + 1];
            high[r] = starts_[bucket + 2];
            if (p_.causal)  // within a bucket positions ascend
                high[r] = std::upper_bound(key_order_ + low[r], key_order_ + high[r], token + p_.offset) - key_order_;
            if (high[r] <= low[r]) continue;
            start = std::min(start, low[r]), stop = std::max(stop, high[r]);
        }
        for (int64_t left = start / kBlock * kBlock; left < stop; left += kBlock)
            add_block(first, count, left, low, high);
        indptr.push_back(entries());
    }

    void add_block(int64_t first, int64_t count, int64_t left, const int64_t* low, const int64_t* high) {
        const int64_t width = std::min(kBlock, p_.Nk - left);
        uint64_t words[kBlock] = {};
        for (int64_t r = 0; r < count; ++r) words[r] = below(high[r] - left) & ~below(low[r] - left);
        for (int64_t e = 0; e < p_.round; ++e) hide_round(e, first, count, left, width, words);
        for (int64_t r = 0; r < count && p_.others; ++r) {
            const int64_t token = query_order_[first + r];
            const int64_t column = token < p_.Nk ? own_[static_cast<size_t>(token)] - left : -1;
            if (column >= 0 && column < kBlock) words[r] &= ~(uint64_t{1} << column);
        }
        bool some = false, full = true;
        for (int64_t r = 0; r < count; ++r) some |= words[r] != 0, full &= words[r] == below(width);
        if (!some) return;
        indices.push_back(static_cast<int32_t>(left / kBlock));
        ids.push_back(full ? kFull : static_cast<int32_t>(tile_count()));
        if (!full) tiles.insert(tiles.end(), words, words + kBlock);
    }

    // Takes out what round e puts together.
    void hide_round(int64_t e, int64_t first, int64_t count, int64_t left, int64_t width, uint64_t* words) {
        const int32_t *query = query_[static_cast<size_t>(e)], *key = key_[static_cast<size_t>(e)];
        ++clock_;
        for (int64_t c = 0; c < width; ++c) {
            const int32_t bucket = key[key_order_[left + c]];
            if (bucket < 0) continue;
            const size_t place = static_cast<size_t>(bucket);
            word_[place] = (now_[place] == clock_ ? word_[place] : 0) | uint64_t{1} << c;
            now_[place] = clock_;
        }
        for (int64_t r = 0; r < count; ++r) {
            const size_t place = static_cast<size_t>(query[query_order_[first + r]]);
            if (now_[place] == clock_) words[r] &= ~word_[place];
        }
    }
};

}  // namespace efficient_attn
