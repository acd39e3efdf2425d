// Which unit serves a call: dispatch.h decides, here as in the host twin.
#include <type_traits>

#include "cuda/dispatch.h"
#include "cuda/units.h"

namespace efficient_attn {
namespace {

template <int kPart>
struct InUnits {
    template <class T, int kHead, bool kExtras>
    static void serve(const KernelParams&, const Request& request) {
        constexpr int kDType = std::is_same_v<T, BFloat16> ? kBFloat16 : kFloat16;
        serve_unit<kPart, kDType, kHead, kExtras>(request);
    }
};

template <int kPart>
void serve_part(const Request& request) {
    const KernelParams k = kernel_params(request.call, request.seed);
    request.call.dtype == kBFloat16 ? serve<InUnits<kPart>, BFloat16>(k, request)
                                    : serve<InUnits<kPart>, Float16>(k, request);
}

template <int kHead>
constexpr uint32_t most_shared() {
    using Element = BFloat16;
    return std::max({sm80::Forward<Element, kHead, false>::kSharedBytes,
                     sm80::Forward<Element, kHead, true>::kSharedBytes,
                     sm80::KeyGradient<Element, kHead, true>::kSharedBytes,
                     sm80::QueryGradient<Element, kHead, true, 1>::kSharedBytes});
}

}  // namespace

void serve_call(Part part, const Request& request) {
    if (part == kDecode) {
        request.call.dtype == kBFloat16 ? serve_unit<kDecode, kBFloat16, 256, false>(request)
                                        : serve_unit<kDecode, kFloat16, 256, false>(request);
    } else {
        part == kForward ? serve_part<kForward>(request) : serve_part<kBackward>(request);
    }
}

uint32_t shared_bytes_wanted(int64_t widest) {
    return widest <= 64 ? most_shared<64>() : widest <= 128 ? most_shared<128>() : most_shared<256>();
}

int64_t decode_splits_wanted(const AttentionParams& p, int64_t processors) { return decode_splits(p, processors); }

int64_t query_sums_wanted(const AttentionParams& p, int capability) { return query_sum_count(p, capability); }

int64_t flags_wanted(const AttentionParams& p, bool backward) { return flag_count(p, backward); }

}  // namespace efficient_attn
