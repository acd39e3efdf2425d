// Floats of 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

extern float float16_table[65536];

inline float from_bfloat16(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline float from_float16(uint16_t bits) { return float16_table[bits]; }

inline uint16_t to_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (value != value) return 0x7FFF;
    return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

inline uint16_t to_float16(float value) {
    if (value != value) return 0x7FFF;
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

}  // namespace emulator
