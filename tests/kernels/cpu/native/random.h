// A small generator that a seed decides completely, on every platform.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace harness {

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 0x1234567) {}

    // SplitMix64 (Steele, Lea, Flood 2014).
    uint64_t next() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    double uniform(double low, double high) {
        return low + (high - low) * (static_cast<double>(next() >> 11) * 0x1p-53);
    }
    bool chance(double probability) { return uniform(0, 1) < probability; }
    // From low to high, both included.
    int64_t integer(int64_t low, int64_t high) {
        return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
    }
    template <class X>
    X choose(std::initializer_list<X> options) {
        return options.begin()[next() % options.size()];
    }

  private:
    uint64_t state_;
};

}  // namespace harness
