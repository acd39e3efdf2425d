// Sizes and tensors that every family draws alike.
#pragma once

#include <algorithm>

#include "image.h"

namespace harness {

// From 1 to `most`, often beside a multiple of 16, where tiles begin and end.
inline int64_t length(Random& random, int64_t most) {
    int64_t n = random.integer(1, std::max<int64_t>(1, most));
    if (random.chance(0.5)) n = n / 16 * 16 + random.integer(-1, 1);
    return std::max<int64_t>(1, std::min(n, most));
}

inline int64_t head_dim(Random& random) {
    switch (random.integer(0, 3)) {
        case 0:
            return random.choose<int64_t>({1, 2, 3, 16, 32, 40, 48, 80, 96, 256});
        case 1:
            return random.choose<int64_t>({64, 64, 128});
        case 2:
            return random.integer(1, 48);
        default:
            return random.integer(1, 256);
    }
}

// Of what a definition may compute for one case, in pairs times head dimensions: most cases are small, a few are long.
// Where very many are run (--once 1), they are shorter.
inline bool short_cases = false;
inline double budget(Random& random) {
    if (random.chance(0.02)) return short_cases ? 8e5 : 8e6;
    if (random.chance(0.1)) return short_cases ? 2e5 : 1e6;
    return short_cases ? 5e4 : 1.2e5;
}

inline void fill(Random& random, Image& image, double low, double high) {
    image.for_each(
        [&](int64_t a, int64_t b, int64_t n, int64_t d) { image.set(a, b, n, d, random.uniform(low, high)); });
}

// An input, sometimes one that was expanded along the batch, the heads or the rows.
inline Image input(Random& random, int dtype, int64_t B, int64_t H, int64_t N, int64_t D, double low, double high) {
    Image image = random_layout(random, dtype, B, H, N, D);
    if (random.chance(0.1)) image.stride[random.integer(0, 2)] = 0;
    fill(random, image, low, high);
    return image;
}

}  // namespace harness
