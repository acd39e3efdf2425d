// wgmma: group-wide products, whose operands and accumulators are watched until the wait.
#include "floats.h"
#include "hopper.h"

namespace emulator {
namespace {

constexpr uint32_t kInFlight = 0x7FC0DEADu;  // what accumulators hold until the wait: a NaN

// Where the 16-byte chunks of a matrix lie, as the descriptor says: `count` rows of 16 elements, or where transposed 16
// rows of `count` elements.
std::vector<uint32_t> matrix_chunks(uint64_t descriptor, int count, bool transposed) {
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
    const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    const uint32_t base = static_cast<uint32_t>(descriptor >> 49 & 7),
                   swizzle = static_cast<uint32_t>(descriptor >> 62);
    if (swizzle != 1) fail(here() + "wgmma: swizzle mode " + std::to_string(swizzle) + " is not the 128-byte one");
    if (base != (start >> 7 & 7) || base != 0)
        fail(here() + "wgmma: the matrix at shared byte " + std::to_string(start) + " does not begin with its pattern");
    const int across = transposed ? std::min(count, 64) : 16, rows = transposed ? 16 : count;
    if ((start & 127) + static_cast<uint32_t>(across) * 2 > 128)
        fail(here() + "wgmma: the matrix at shared byte " + std::to_string(start) + " crosses its rows of 128 bytes");
    std::vector<uint32_t> chunks;
    for (int row = 0; row < rows; ++row)
        for (int chunk = 0; chunk < (transposed ? count : 16) / 8; ++chunk) {
            const uint32_t at = start + static_cast<uint32_t>(chunk / 8) * leading +
                                static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8) * 128 +
                                static_cast<uint32_t>(chunk % 8) * 16;
            chunks.push_back(swizzled(at));
        }
    return chunks;
}

// A chunk that warp w is going to read.
void begin_reading(const std::vector<uint32_t>& chunks, int w) {
    block.current = w * kLanes;
    for (uint32_t chunk : chunks) {
        check_shared(chunk, 16, false, 0, "wgmma");
        check_proxy(chunk, "wgmma reads");
        for (uint32_t k = chunk / 4; k < chunk / 4 + 4; ++k) {
            ++block.words[k].readers;
            block.reads[k * static_cast<size_t>(block.warps) + static_cast<size_t>(w)] = UINT32_MAX;  // until the wait
        }
    }
}

void end_reading(const std::vector<uint32_t>& chunks, int w) {
    for (uint32_t chunk : chunks)
        for (uint32_t k = chunk / 4; k < chunk / 4 + 4; ++k) {
            --block.words[k].readers;
            block.reads[k * static_cast<size_t>(block.warps) + w] = block.warp[w].clock[w];
        }
}

float element(uint16_t bits, bool bfloat16) { return bfloat16 ? from_bfloat16(bits) : from_float16(bits); }

// Registers are known while they hold what a group_fence or a group_wait left there.
void learn(int thread, const void* data, size_t bytes) {
    auto& known = block.fibers[thread].known;
    const uint8_t* begin = static_cast<const uint8_t*>(data);
    for (auto it = known.begin(); it != known.end();)
        it = it->first < begin + bytes && begin < it->first + it->second.size() ? known.erase(it) : std::next(it);
    known[begin].assign(begin, begin + bytes);
}

void check_known(int thread, const void* data, size_t bytes, const char* what) {
    const auto& known = block.fibers[thread].known;
    const uint8_t* begin = static_cast<const uint8_t*>(data);
    auto it = known.upper_bound(begin);
    if (it != known.begin()) {
        --it;
        const size_t offset = static_cast<size_t>(begin - it->first);
        if (offset + bytes <= it->second.size() && std::memcmp(&it->second[offset], begin, bytes) == 0) return;
    }
    fail(here() + what + " of a wgmma were written and no group_fence names them");
}

void check_in_flight(const Accumulators& c, int lane_of_group) {
    for (int k = 0; k < c.count; ++k) {
        uint32_t bits;
        std::memcpy(&bits, c.home[lane_of_group] + k, 4);
        if (bits != kInFlight) fail(here() + "accumulators of a wgmma were touched before the wait");
    }
}

void check_a_untouched(const Multiply& m, int lane_of_group) {
    if (m.what.a_registers && std::memcmp(m.a_home[lane_of_group], m.a[lane_of_group], 16) != 0)
        fail(here() + "registers of A were touched before the wait for the wgmma that reads them");
}

std::shared_ptr<Accumulators> accumulators(int group, const GroupMultiply& first) {
    const int count = first.columns / 2, base = group * kGroupThreads;
    for (const Multiply& m : hopper.groups[group].multiplies) {
        const bool waited = std::all_of(m.waited, m.waited + kGroupWarps, [](bool x) { return x; });
        if (!waited && m.c->home[0] == first.c && m.c->count == count) {
            for (int t = 0; t < kGroupThreads; ++t) block.current = base + t, check_in_flight(*m.c, t);
            return m.c;
        }
    }
    auto c = std::make_shared<Accumulators>();
    c->count = count;
    c->values.assign(static_cast<size_t>(count) * kGroupThreads, 0.0f);
    const uint32_t poison = kInFlight;
    for (int t = 0; t < kGroupThreads; ++t) {
        block.current = base + t;
        c->home[t] = argument<GroupMultiply>(block.current / kLanes, block.current % kLanes).c;
        if (first.accumulate) {
            check_known(block.current, c->home[t], static_cast<size_t>(count) * 4, "accumulators");
            std::memcpy(&c->values[static_cast<size_t>(t * count)], c->home[t], static_cast<size_t>(count) * 4);
        }
        for (int k = 0; k < count; ++k) std::memcpy(c->home[t] + k, &poison, 4);
    }
    return c;
}

bool same_instruction(const GroupMultiply& a, const GroupMultiply& b) {
    return a.a == b.a && a.b == b.b && a.columns == b.columns && a.bfloat16 == b.bfloat16 &&
           a.transpose_a == b.transpose_a && a.transpose_b == b.transpose_b && a.accumulate == b.accumulate &&
           !a.a_registers == !b.a_registers;
}

// The sum runs over k in float32; products of 16-bit floats are exact.
void execute_multiply(Multiply& m, int group) {
    const bool bfloat16 = m.what.bfloat16;
    const int columns = m.what.columns;
    float a[64][16];
    std::vector<float> b(static_cast<size_t>(columns) * 16);  // [16, columns]
    for (int t = 0; t < kGroupThreads; ++t) {
        block.current = group * kGroupThreads + t;
        check_a_untouched(m, t);
        for (int e = 0; m.what.a_registers && e < 8; ++e) {
            const int row = t / kLanes * 16 + t % kLanes / 4 + e / 2 % 2 * 8, k = t % 4 * 2 + e / 4 * 8 + e % 2;
            a[row][k] = element(static_cast<uint16_t>(m.a[t][e / 2] >> (16 * (e % 2))), bfloat16);
        }
    }
    const auto value = [&](uint32_t chunk, int e) {
        uint16_t bits;
        std::memcpy(&bits, &block.shared[chunk + static_cast<uint32_t>(e) * 2], 2);
        return element(bits, bfloat16);
    };
    for (int row = 0; !m.what.a_registers && row < 64; ++row)
        for (int k = 0; k < 16; ++k)
            a[row][k] = m.what.transpose_a
                            ? value(m.a_chunks[row / 16][static_cast<size_t>(k * 2 + row % 16 / 8)], row % 8)
                            : value(m.a_chunks[row / 16][static_cast<size_t>(row % 16 * 2 + k / 8)], k % 8);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < columns; ++n)
            b[static_cast<size_t>(k * columns + n)] =
                m.what.transpose_b ? value(m.b_chunks[static_cast<size_t>(k * (columns / 8) + n / 8)], n % 8)
                                   : value(m.b_chunks[static_cast<size_t>(n * 2 + k / 8)], k % 8);
    std::vector<float> row(static_cast<size_t>(columns));
    const auto each = [&](int i, auto f) {  // the elements of row i: where they lie among the threads
        for (int n = 0; n < columns; ++n) {
            const int t = i / 16 * kLanes + i % 8 * 4 + n % 8 / 2;
            f(m.c->values[static_cast<size_t>(t * m.c->count + n / 8 * 4 + i % 16 / 8 * 2 + n % 2)], n);
        }
    };
    for (int i = 0; i < 64; ++i) {
        each(i, [&](float& c, int n) { row[static_cast<size_t>(n)] = m.what.accumulate ? c : 0.0f; });
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < columns; ++n)
                row[static_cast<size_t>(n)] += a[i][k] * b[static_cast<size_t>(k * columns + n)];
        each(i, [&](float& c, int n) { c = row[static_cast<size_t>(n)]; });
    }
    m.executed = true;
}

// The values of accumulators that no multiply under way adds to any more.
void deliver(int w, Accumulators& c) {
    for (int lane = 0; lane < kLanes; ++lane) {
        block.current = w * kLanes + lane;
        const int t = block.current % kGroupThreads;
        check_in_flight(c, t);
        const Fence& wait = argument<Fence>(w, lane);
        const uint8_t* home = reinterpret_cast<const uint8_t*>(c.home[t]);
        bool named = false;
        for (int k = 0; k < wait.count; ++k) {
            const uint8_t* data = static_cast<const uint8_t*>(wait.named[k].data);
            named |= data <= home && home + c.count * 4 <= data + wait.named[k].bytes;
        }
        if (!named) fail(here() + "group_wait does not name the accumulators that it waits for");
        std::memcpy(c.home[t], &c.values[static_cast<size_t>(t * c.count)], static_cast<size_t>(c.count) * 4);
        learn(block.current, c.home[t], static_cast<size_t>(c.count) * 4);
    }
}

}  // namespace

// Whether all warps of w's group have come to the instruction; this one is marked as there.
bool group_is_here(int w) {
    const int first = w / kGroupWarps * kGroupWarps;
    if (first + kGroupWarps > block.warps) fail(here() + "wgmma by a warp that is in no whole warpgroup");
    block.warp[w].at_group = true;
    for (int k = first; k < first + kGroupWarps; ++k)
        if (!block.warp[k].at_group) return false;
    return true;
}

void release_group(int group) {
    for (int w = group * kGroupWarps; w < (group + 1) * kGroupWarps; ++w) {
        block.warp[w].at_group = false;
        block.warp[w].arrived = 0;
        block.warp[w].runnable = kAll;
        for (int k = 0; k < kLanes; ++k) block.fibers[w * kLanes + k].state = kRunnable;
    }
}

void issue_multiply(int group) {
    const int base = group * kGroupThreads, first_warp = group * kGroupWarps;
    Multiply m{};
    m.what = argument<GroupMultiply>(first_warp, 0);
    for (int t = 0; t < kGroupThreads; ++t) {
        block.current = base + t;
        const GroupMultiply& own = argument<GroupMultiply>((base + t) / kLanes, t % kLanes);
        if (!same_instruction(own, m.what))
            fail(here() + "wgmma with other operands than thread " + std::to_string(base));
        if (!block.warp[block.current / kLanes].fenced)
            fail(here() + "wgmma without a group_fence since the last wait");
        if (!own.a_registers) continue;
        check_known(block.current, own.a_registers, 16, "registers of A");
        m.a_home[t] = own.a_registers;
        std::memcpy(m.a[t], own.a_registers, 16);
    }
    m.c = accumulators(group, m.what);
    m.b_chunks = matrix_chunks(m.what.b, m.what.columns, m.what.transpose_b);
    std::vector<uint32_t> a_chunks;
    if (!m.what.a_registers) a_chunks = matrix_chunks(m.what.a, 64, m.what.transpose_a);
    for (int k = 0; k < kGroupWarps; ++k) {
        m.group[k] = block.warp[first_warp + k].commits;
        for (int chunk = 0; !m.what.a_registers && chunk < 32; ++chunk)  // of 16 rows, or where transposed columns
            m.a_chunks[k].push_back(a_chunks[m.what.transpose_a ? chunk / 2 * 8 + k * 2 + chunk % 2 : k * 32 + chunk]);
        begin_reading(m.a_chunks[k], first_warp + k);
        begin_reading(m.b_chunks, first_warp + k);
    }
    hopper.groups[group].multiplies.push_back(std::move(m));
}

// Executes the oldest multiply of the group that is still to be done.
bool execute_next(int group) {
    const int self = block.current;
    for (Multiply& m : hopper.groups[group].multiplies) {
        if (m.executed) continue;
        execute_multiply(m, group);
        block.current = self;
        return true;
    }
    return false;
}

void group_fence(int w) {
    block.warp[w].fenced = true;
    for (int lane = 0; lane < kLanes; ++lane) {
        block.current = w * kLanes + lane;
        const Fence& fence = argument<Fence>(w, lane);
        for (int k = 0; k < fence.count; ++k) {
            for (const Multiply& m : hopper.groups[w / kGroupWarps].multiplies)
                if (!m.waited[w % kGroupWarps] && m.c->home[block.current % kGroupThreads] == fence.named[k].data)
                    check_in_flight(*m.c, block.current % kGroupThreads);
            learn(block.current, fence.named[k].data, fence.named[k].bytes);
        }
    }
}

void group_wait(int w) {
    const int group = w / kGroupWarps, place = w % kGroupWarps, pending = argument<Fence>(w, 0).pending;
    std::deque<Multiply>& queue = hopper.groups[group].multiplies;
    block.warp[w].fenced = false;
    const auto covered = [&](const Multiply& m) { return m.group[place] < block.warp[w].commits - pending; };
    for (Multiply& m : queue) {
        if (m.waited[place] || !covered(m)) continue;
        if (!m.executed) execute_multiply(m, group);
        m.waited[place] = true;
        for (int lane = 0; lane < kLanes; ++lane)
            block.current = w * kLanes + lane, check_a_untouched(m, block.current % kGroupThreads);
        end_reading(m.a_chunks[place], w);
        end_reading(m.b_chunks, w);
        const bool last = std::none_of(queue.begin(), queue.end(),
                                       [&](const Multiply& other) { return other.c == m.c && !other.waited[place]; });
        if (last) deliver(w, *m.c);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        block.current = w * kLanes + lane;
        const Fence& wait = argument<Fence>(w, lane);
        for (const Multiply& m : queue)
            for (int k = 0; k < wait.count; ++k)
                if (!m.waited[place] && m.c->home[block.current % kGroupThreads] == wait.named[k].data)
                    fail(here() + "group_wait names accumulators that are still under way");
    }
    while (!queue.empty() &&
           std::all_of(queue.front().waited, queue.front().waited + kGroupWarps, [](bool x) { return x; }))
        queue.pop_front();
}

void check_group_idle() {
    if (block.current / kLanes / kGroupWarps >= static_cast<int>(hopper.groups.size())) return;
    for (const Multiply& m : hopper.groups[block.current / kLanes / kGroupWarps].multiplies)
        if (!m.waited[block.current / kLanes % kGroupWarps]) fail(here() + "ended with a wgmma under way");
}

}  // namespace emulator
