// Which unit serves a call: dispatch.h decides, here as in the host twin.
#include <type_traits>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/units.h"

namespace efficient_attn {
namespace {

struct RequestLaunch {
    const Request& request;
    Launch& launch;
};

template <int kPart>
struct InUnits {
    template <class T, int kHead, bool kExtras>
    static void serve(const KernelParams&, RequestLaunch& to) {
        constexpr int kDType = std::is_same_v<T, BFloat16> ? kBFloat16 : kFloat16;
        serve_unit<kPart, kDType, kHead, kExtras>(to.request, to.launch);
    }
};

template <int kPart>
void serve_part(const Request& request, Launch& launch) {
    const KernelParams k = kernel_params(request.call, request.seed);
    RequestLaunch to{request, launch};
    request.call.dtype == kBFloat16 ? serve<InUnits<kPart>, BFloat16>(k, to) : serve<InUnits<kPart>, Float16>(k, to);
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

void serve_call(Part part, const Request& request, Launch& launch) {
    part == kForward ? serve_part<kForward>(request, launch) : serve_part<kBackward>(request, launch);
}

uint32_t shared_bytes_wanted(int64_t widest) {
    return widest <= 64 ? most_shared<64>() : widest <= 128 ? most_shared<128>() : most_shared<256>();
}

int64_t flags_wanted(const AttentionParams& p, bool backward) { return flag_count(p, backward); }

}  // namespace efficient_attn
