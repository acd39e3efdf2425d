// Global memory: which elements a call may read, and write each exactly once.
#include <stdexcept>

#include "state.h"

namespace emulator {
namespace {

struct Region {
    const uint8_t* begin;
    int64_t bytes;
    bool written, whole;         // may be written, and must be
    std::vector<int64_t> owner;  // of each byte: kOutside, kFree, kEarlierLaunch, or the block that wrote it
    bool sums = false;           // float32 that every block may add to
};
constexpr int64_t kOutside = -2, kFree = -1, kEarlierLaunch = INT64_MAX;

std::vector<Region> regions;

// Tickets that are still to be drawn, and what the block that runs has drawn last.
struct TicketCounter {
    int64_t launch = -1, block = -1;
    std::vector<int> left;
    int last = -1, beyond = 0;  // beyond: how many were drawn when none was left
};
std::map<const int32_t*, TicketCounter> ticket_counters;

// What is wrong with an access that begins in `region`, or an empty text.
const char* judge(Region& region, int64_t first, int bytes, bool write) {
    if (first + bytes > region.bytes) return "across the end of a tensor";
    if (write && !region.written) return "that is an input";
    for (int64_t k = first; k < first + bytes; ++k) {
        const int64_t owner = region.owner[static_cast<size_t>(k)];
        const bool other = owner >= 0 && owner != block.index && owner != kEarlierLaunch;
        if (owner == kOutside) return "between the elements of a tensor";
        if (other) return "that another block of the launch has written";
        if (!write && region.written && owner == kFree) return "that no block has written";
    }
    for (int64_t k = first; write && k < first + bytes; ++k) region.owner[static_cast<size_t>(k)] = block.index;
    return "";
}

}  // namespace

// Tensors may lie in one another, as the parts of a packed projection do: some one must allow the access.
void check_elements(const void* address, int bytes, bool write) {
    const char* wrong = "outside of every tensor";
    const uint8_t* byte = static_cast<const uint8_t*>(address);
    for (Region& region : regions) {
        if (byte < region.begin || byte >= region.begin + region.bytes) continue;
        wrong = judge(region, byte - region.begin, bytes, write);
        if (!*wrong) return;
    }
    if (bytes > 0)
        fail(here() + (write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes of global memory " + wrong);
}

bool may_add_to(const float* target, int bytes) {
    const uint8_t* first = reinterpret_cast<const uint8_t*>(target);
    return std::any_of(regions.begin(), regions.end(), [&](const Region& region) {
        return region.sums && first >= region.begin && first + bytes <= region.begin + region.bytes;
    });
}

// What an earlier kernel of the call has written may be written again by one that follows it.
void begin_launch() {
    for (Region& region : regions)
        for (int64_t& owner : region.owner)
            if (owner >= 0) owner = kEarlierLaunch;
}

void allow(const void* data, const int64_t* sizes, const int64_t* strides, int dimensions, int element, bool written) {
    int64_t elements = 1, last = 0;
    for (int d = 0; d < dimensions; ++d) elements *= sizes[d], last += (sizes[d] - 1) * strides[d];
    if (elements == 0) return;
    Region region{static_cast<const uint8_t*>(data), (last + 1) * element, written, written, {}};
    region.owner.assign(static_cast<size_t>(region.bytes), kOutside);
    for (int64_t k = 0; k < elements; ++k) {
        int64_t rest = k, place = 0;
        for (int d = dimensions - 1; d >= 0; rest /= sizes[d--]) place += rest % sizes[d] * strides[d];
        for (int byte = 0; byte < element; ++byte) region.owner[static_cast<size_t>(place * element + byte)] = kFree;
    }
    if (written) std::memset(const_cast<void*>(data), 0xFF, static_cast<size_t>(region.bytes));
    regions.push_back(std::move(region));
}

void allow(const void* data, int64_t bytes, bool written) {
    const int64_t one = 1;
    if (data) allow(data, &bytes, &one, 1, 1, written);
}

void allow_workspace(void* data, int64_t bytes) {
    allow(data, bytes, true);
    regions.back().whole = false;
}

void allow_sums(void* data, int64_t bytes) {
    allow(data, bytes, false);
    regions.back().sums = true;
}

void allow_counters(int32_t* data, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
        if (data[k] != 0) throw std::runtime_error("emulator: a counter of tickets that is not zero");
        ticket_counters[data + k] = {};
    }
}

// Where blocks run one after another, one that draws leaves some tickets, as if others had been faster, to those behind
// it; now and then all that are left. The last one gets whatever is left.
int draw_ticket(const int32_t* counter, int end) {
    const auto found = ticket_counters.find(counter);
    if (found == ticket_counters.end()) fail(here() + "a ticket is drawn from what is no counter");
    TicketCounter& c = found->second;
    if (c.launch != totals.launches) {
        if (c.launch >= 0) fail(here() + "a ticket is drawn from a counter that an earlier launch has drawn from");
        c.launch = totals.launches;
        for (int k = 0; k < end; ++k) c.left.push_back(k);
    }
    if (c.block != block.index) c.block = block.index, c.last = -1;
    size_t place = 0;
    while (place < c.left.size() && c.left[place] <= c.last) ++place;
    if (!block.last && !block.together) place += draw() % 8 == 0 ? c.left.size() : draw() % 3;
    if (place >= c.left.size()) {
        c.last = INT32_MAX;
        return end + c.beyond++ + static_cast<int>(draw() % 3);
    }
    c.last = block.ticket = c.left[place];
    c.left.erase(c.left.begin() + static_cast<std::ptrdiff_t>(place));
    return c.last;
}

void forget() {
    regions.clear();
    ticket_counters.clear();
    forget_turns();
}

void check_all_written() {
    for (const Region& region : regions)
        for (int64_t k = 0; region.whole && k < region.bytes; ++k)
            if (region.owner[static_cast<size_t>(k)] == kFree)
                throw std::runtime_error("emulator: byte " + std::to_string(k) + " of " + std::to_string(region.bytes) +
                                         " of an output was never written");
}

void check_global(const void* address, int bytes, bool write) {
    if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes))
        fail(here() + "global memory at an address not aligned to " + std::to_string(bytes));
    check_elements(address, bytes, write);
}

}  // namespace emulator
