// Floats of 16 bits.
#include "floats.h"

#include <cmath>

namespace emulator {

float float16_table[65536];

namespace {

const bool float16_ready = [] {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
        float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                    : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
        if (exponent == 31) value = fraction ? NAN : INFINITY;
        float16_table[bits] = bits >> 15 ? -value : value;
    }
    return true;
}();

}  // namespace
}  // namespace emulator
