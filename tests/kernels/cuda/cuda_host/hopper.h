// Part of twin.cpp: barriers in shared memory, tensor copies and wgmma.
//
// Copies and multiplies lie in a queue until a random later time, at which they read what is in memory then. What they
// will read and write is marked from the start until the wait, so that an access too early is found in any order.

constexpr int kGroupWarps = 4, kGroupThreads = kGroupWarps * kLanes, kRegisterFile = 65536;
constexpr uint32_t kInFlight = 0x7FC0DEADu;  // what accumulators hold until the wait: a NaN

// --- barriers in shared memory ---

struct SharedBarrier {
    int arrivals, pending, phase;
    int64_t bytes;  // expected and not yet copied
    bool fenced;
    int maker, clock;                          // the thread that made it; its component of vector clocks
    uint32_t arrived[kClocks], done[kClocks];  // what those see who wait for this phase, and for the last one
    std::vector<int> waiting;
};

struct TensorCopy {
    uint32_t address, barrier;
    TensorMapFields map;
    int place[4], thread;
    uint32_t clock;  // one more than the barrier's phase
};

// Accumulators that multiplies under way add up in.
struct Accumulators {
    float* home[kGroupThreads];
    int count;  // a thread
    std::vector<float> values;
};

struct Multiply {
    GroupMultiply what;
    const uint32_t* a_home[kGroupThreads];
    uint32_t a[kGroupThreads][4];
    std::shared_ptr<Accumulators> c;
    std::vector<uint32_t> a_chunks[kGroupWarps], b_chunks;  // where 8 elements each lie
    int group[kGroupWarps];                                 // commits of each warp before
    bool executed, waited[kGroupWarps];
};

struct WarpGroup {
    std::deque<Multiply> multiplies;
};

struct BulkSum {
    float* target;
    uint32_t source;
    int bytes, thread;
    bool committed, executed;
};

struct Asynchronous {
    std::map<uint32_t, SharedBarrier> barriers;
    std::vector<BulkSum> sums;
    std::vector<TensorCopy> copies;
    std::vector<WarpGroup> groups;
};
Asynchronous hopper;

void join(uint32_t* into, int thread) {
    const Fiber& fiber = block.fibers[thread];
    for (int k = 0; k < kClocks; ++k) {
        into[k] = std::max(into[k], block.warp[thread / kLanes].clock[k]);
        if (fiber.acquired) into[k] = std::max(into[k], fiber.seen[k]);
    }
}

std::string shared_barrier_text(int address) {
    const SharedBarrier& b = hopper.barriers[static_cast<uint32_t>(address)];
    return "barrier at shared byte " + std::to_string(address) + " (phase " + std::to_string(b.phase) + " lacks " +
           std::to_string(b.pending) + " arrivals and " + std::to_string(b.bytes) + " bytes)";
}

SharedBarrier& shared_barrier(uint32_t address, bool asynchronous) {
    const auto found = hopper.barriers.find(address);
    if (found == hopper.barriers.end()) fail(here() + "no barrier was made at shared byte " + std::to_string(address));
    const int lane = block.current % kLanes, w = block.current / kLanes;
    const Word& word = block.words[address / 4];
    if (word.write_warp == w ? word.write_lane != lane && word.write_step == block.warp[w].step
                             : !has_seen(w, lane, word.write_warp, word.write_clock))
        fail(here() + "the barrier at shared byte " + std::to_string(address) + " may not have been made yet");
    if (asynchronous && !found->second.fenced)
        fail(here() + "no barrier_init_fence after the barrier at shared byte " + std::to_string(address) +
             " was made");
    return found->second;
}

void complete_phase(SharedBarrier& b) {
    if (b.pending || b.bytes) return;
    ++b.phase;
    b.pending = b.arrivals;
    std::copy(b.arrived, b.arrived + kClocks, b.done);
    for (int thread : b.waiting) {
        block.fibers[thread].state = kRunnable;
        block.warp[thread / kLanes].runnable |= 1u << thread % kLanes;
    }
    b.waiting.clear();
    ++totals.barriers;
}

// --- tensor copies ---

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

int64_t box_bytes(const TensorMapFields& map) { return int64_t{2} * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }

// What shared memory is to be read or written by the asynchronous proxy: ordinary writes before must have been fenced.
void check_proxy(uint32_t chunk, const char* what) {
    for (uint32_t k = chunk / 4; k < chunk / 4 + 4; ++k) {
        const Word& word = block.words[k];
        if (word.write_warp < 0 || !word.ordinary) continue;
        if (block.fibers[word.write_warp * kLanes + word.write_lane].fences == word.fences)
            fail(here() + what + " at shared byte " + std::to_string(chunk) + ", written by warp " +
                 std::to_string(word.write_warp) + " without an async_proxy_fence behind");
    }
}

// One row of the box, 128 bytes: zeros where it leaves the tensor.
void copy_row(const TensorCopy& copy, uint32_t to, const int64_t (&place)[4]) {
    const TensorMapFields& map = copy.map;
    bool inside = true;
    int64_t offset = place[0] * 2;
    for (int d = 1; d < 4; ++d) {
        inside &= place[d] >= 0 && place[d] < map.sizes[d];
        offset += place[d] * map.strides[d - 1];
    }
    const int64_t begin = std::max<int64_t>(0, -place[0]);
    const int64_t end = inside ? std::min<int64_t>(map.box[0], map.sizes[0] - place[0]) : 0;
    const uint8_t* from = map.base + offset;
    std::vector<uint8_t> row(static_cast<size_t>(map.box[0]) * 2, 0);
    if (begin < end) {
        check_elements(from + begin * 2, static_cast<int>(end - begin) * 2, false);
        std::memcpy(&row[static_cast<size_t>(begin) * 2], from + begin * 2, static_cast<size_t>(end - begin) * 2);
    }
    for (uint32_t byte = 0; byte < row.size(); byte += 16)
        std::memcpy(&block.shared[swizzled(to + byte)], &row[byte], 16);
}

void execute_copy(const TensorCopy& copy) {
    const int self = block.current;
    block.current = copy.thread;
    uint32_t to = copy.address;
    for (int b = 0; b < copy.map.box[3]; ++b)
        for (int h = 0; h < copy.map.box[2]; ++h)
            for (int n = 0; n < copy.map.box[1]; ++n, to += static_cast<uint32_t>(copy.map.box[0]) * 2)
                copy_row(copy, to, {copy.place[0], copy.place[1] + n, copy.place[2] + h, copy.place[3] + b});
    for (uint32_t k = copy.address / 4; k < to / 4; ++k) block.words[k].under_way = false;
    SharedBarrier& barrier = hopper.barriers[copy.barrier];
    barrier.arrived[barrier.clock] = std::max(barrier.arrived[barrier.clock], copy.clock);
    barrier.bytes -= box_bytes(copy.map);
    complete_phase(barrier);
    block.current = self;
}

// --- wgmma ---

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

// --- sums in global memory ---

void execute_sum(BulkSum& sum) {
    for (int k = 0; k < sum.bytes / 4; ++k) {
        float x;
        std::memcpy(&x, &block.shared[sum.source + static_cast<uint32_t>(k) * 4], 4);
        sum.target[k] += x;
    }
    sum.executed = true;
}

bool execute_some_sum() {
    for (BulkSum& sum : hopper.sums)
        if (!sum.executed) return execute_sum(sum), true;
    return false;
}

void check_no_sums() {
    for (const BulkSum& sum : hopper.sums)
        if (sum.thread == block.current) fail(here() + "ended with a bulk_add under way");
}

// --- registers ---

void change_registers(int w) {
    const RegisterCount& change = argument<RegisterCount>(w, 0);
    block.current = w * kLanes;
    int& registers = block.warp[w].registers;
    if (change.count % 8 || change.count < 24 || change.count > 256)
        fail(here() + "setmaxnreg to " + std::to_string(change.count));
    if (change.take ? change.count < registers : change.count > registers)
        fail(here() + "setmaxnreg from " + std::to_string(registers) + " to " + std::to_string(change.count));
    registers = change.count;
}

void check_block_ended() {
    int registers = 0;
    for (int w = 0; w < block.warps; ++w) {
        registers += block.warp[w].registers * kLanes;
        if (block.warp[w].registers != block.warp[w / kGroupWarps * kGroupWarps].registers)
            block.report = "the warps of a warpgroup have changed their registers differently";
    }
    const std::string where = "block " + std::to_string(block.index) + " ended with ";
    if (registers > kRegisterFile) block.report = where + std::to_string(registers) + " registers taken by setmaxnreg";
    if (!hopper.copies.empty()) block.report = where + "a tensor copy under way";
    for (int id = 0; id < kBarriers; ++id)
        if (block.barrier[id].arrivals) block.report = where + "arrivals at barrier " + std::to_string(id);
}

// --- the passing of time ---

bool work_under_way() {
    if (!hopper.copies.empty()) return true;
    if (std::any_of(hopper.sums.begin(), hopper.sums.end(), [](const BulkSum& sum) { return !sum.executed; }))
        return true;
    return std::any_of(hopper.groups.begin(), hopper.groups.end(),
                       [](const WarpGroup& g) { return !g.multiplies.empty(); });
}

// Does some of the work under way; false where there is none.
bool advance() {
    const int self = block.current;
    if (!hopper.copies.empty() && draw() % 2) {
        const size_t k = draw() % hopper.copies.size();
        const TensorCopy copy = hopper.copies[k];
        hopper.copies.erase(hopper.copies.begin() + static_cast<std::ptrdiff_t>(k));
        execute_copy(copy);
        return true;
    }
    if (draw() % 2 && execute_some_sum()) return true;
    const uint32_t first = draw();
    for (size_t k = 0; k < hopper.groups.size(); ++k)
        if (execute_next(static_cast<int>((first + k) % hopper.groups.size()))) return true;
    block.current = self;
    return hopper.copies.empty() ? execute_some_sum() : advance();
}
