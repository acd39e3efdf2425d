// What a strided tensor holds, as bytes that can be placed between guard pages.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/params.h"
#include "memory.h"
#include "random.h"

namespace harness {

using efficient_attn::kBFloat16;
using efficient_attn::kFloat16;
using efficient_attn::kFloat32;
using efficient_attn::kFloat64;

inline int64_t element_bytes(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// The distance from 1 to the next number, and the smallest positive normal number (for float16 the smallest of all).
inline double epsilon(int dtype) {
    return dtype == kFloat64 ? 0x1p-52 : dtype == kFloat32 ? 0x1p-23 : dtype == kBFloat16 ? 0x1p-7 : 0x1p-10;
}
inline double smallest(int dtype) { return dtype == kFloat64 ? 0x1p-1022 : dtype == kFloat16 ? 0x1p-24 : 0x1p-126; }

inline double largest(int dtype) { return dtype == kFloat64 ? 1e308 : dtype == kFloat16 ? 65504 : 3.3e38; }

inline double read_element(const char* place, int dtype) {
    if (dtype == kFloat64) {
        double x;
        std::memcpy(&x, place, 8);
        return x;
    }
    float x;
    if (dtype == kFloat32) {
        std::memcpy(&x, place, 4);
        return x;
    }
    uint16_t half;
    std::memcpy(&half, place, 2);
    if (dtype == kBFloat16) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(mantissa, -24)
                                        : std::ldexp(1024 + mantissa, exponent - 25);
    return half >> 15 ? -size : size;
}

// Stores x, cut to the type's precision (towards zero: inputs need no rounding to nearest).
inline void write_element(char* place, int dtype, double x) {
    const float single = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    if (dtype == kFloat64) {
        std::memcpy(place, &x, 8);
    } else if (dtype == kFloat32) {
        std::memcpy(place, &single, 4);
    } else if (dtype == kBFloat16) {
        const uint16_t half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(place, &half, 2);
    } else {
        const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
        uint16_t half = static_cast<uint16_t>(bits >> 16 & 0x8000);
        if (std::isnan(x))
            half = 0x7E00;
        else if (exponent >= 31)
            half |= 0x7C00;
        else if (exponent > 0)
            half |= static_cast<uint16_t>(exponent << 10 | (bits >> 13 & 1023));
        else
            half |= static_cast<uint16_t>(std::ldexp(std::fabs(x), 24));
        std::memcpy(place, &half, 2);
    }
}

// A tensor of four dimensions; bytes between its elements stay kUnwritten.
struct Image {
    int dtype = kFloat32;
    int64_t size[4] = {0, 0, 0, 0}, stride[4] = {0, 0, 0, 0};
    std::vector<char> bytes;

    int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
    char* place(int64_t a, int64_t b, int64_t c, int64_t d) {
        return bytes.data() + (a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]) * element_bytes(dtype);
    }
    void set(int64_t a, int64_t b, int64_t c, int64_t d, double x) { write_element(place(a, b, c, d), dtype, x); }

    template <class Visit>
    void for_each(Visit visit) {
        for (int64_t a = 0; a < size[0]; ++a)
            for (int64_t b = 0; b < size[1]; ++b)
                for (int64_t c = 0; c < size[2]; ++c)
                    for (int64_t d = 0; d < size[3]; ++d) visit(a, b, c, d);
    }
    // Contiguous, as doubles.
    std::vector<double> values() {
        std::vector<double> all;
        all.reserve(static_cast<size_t>(count()));
        for_each(
            [&](int64_t a, int64_t b, int64_t c, int64_t d) { all.push_back(read_element(place(a, b, c, d), dtype)); });
        return all;
    }
    // Whether nothing but elements was written. Overwrites the elements.
    bool gaps_are_unwritten() {
        for_each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
            std::memset(place(a, b, c, d), kUnwritten, static_cast<size_t>(element_bytes(dtype)));
        });
        for (const char byte : bytes)
            if (static_cast<unsigned char>(byte) != kUnwritten) return false;
        return true;
    }
};

// Dimensions nested in the given order, outermost first, with random room between them if `random` is given.
inline Image make_image(int dtype, const int64_t (&size)[4], const int (&order)[4], Random* random) {
    Image image;
    image.dtype = dtype;
    int64_t step = 1;
    for (int n = 3; n >= 0; --n) {
        const int dim = order[n];
        image.size[dim] = size[dim];
        image.stride[dim] = step;
        step *= size[dim] > 0 ? size[dim] : 1;
        if (random && random->chance(0.3)) step += random->integer(1, 9);
    }
    int64_t last = 0;
    for (int dim = 0; dim < 4; ++dim) last += (size[dim] - 1) * image.stride[dim];
    const int64_t elements = image.count() > 0 ? last + 1 : 0;
    image.bytes.assign(static_cast<size_t>(elements * element_bytes(dtype)), static_cast<char>(kUnwritten));
    return image;
}

inline Image contiguous(int dtype, int64_t a, int64_t b, int64_t c, int64_t d) {
    return make_image(dtype, {a, b, c, d}, {0, 1, 2, 3}, nullptr);
}

// (B, H, N, D) with unit last stride: batch, heads and rows nested in any order, rows padded or not.
inline Image random_layout(Random& random, int dtype, int64_t B, int64_t H, int64_t N, int64_t D) {
    Random* pad = random.chance(0.6) ? &random : nullptr;
    switch (random.integer(0, 3)) {
        case 0:
            return make_image(dtype, {B, H, N, D}, {0, 2, 1, 3}, pad);  // (B, N, H, D)
        case 1:
            return make_image(dtype, {B, H, N, D}, {2, 0, 1, 3}, pad);  // (N, B, H, D)
        default:
            return make_image(dtype, {B, H, N, D}, {0, 1, 2, 3}, pad);
    }
}

// An image's bytes between guard pages, and a look at them afterwards.
class Placed {
  public:
    Placed(const Image& image, Flush flush) : image_(&image), memory_(image.bytes.size(), flush) {
        if (!image.bytes.empty()) std::memcpy(memory_.data(), image.bytes.data(), image.bytes.size());
    }
    void* data() const { return memory_.data(); }
    efficient_attn::TensorView view() const {
        return {memory_.data(), image_->stride[0], image_->stride[1], image_->stride[2]};
    }
    // What the memory holds now.
    Image now() const {
        Image result = *image_;
        if (!result.bytes.empty()) std::memcpy(result.bytes.data(), memory_.data(), result.bytes.size());
        return result;
    }
    bool unchanged() const { return slack_is_unwritten() && now().bytes == image_->bytes; }
    bool slack_is_unwritten() const { return memory_.slack_is_unwritten(); }

  private:
    const Image* image_;
    Guarded memory_;
};

}  // namespace harness
