// One unit of the kernels: -DEFFICIENT_ATTN_PART=kForward -DEFFICIENT_ATTN_DTYPE=kBFloat16 -DEFFICIENT_ATTN_HEAD=64
// -DEFFICIENT_ATTN_EXTRAS=false
#include <type_traits>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/units.h"

namespace efficient_attn {
namespace {

struct UnitLaunch : Launch {
    using Launch::Launch;
    template <class Map = TensorMap>  // a template, for only some units use it
    Map tensor_map(const TensorView& view, int64_t B, int64_t H, int64_t N, int64_t D, int rows) {
        Map map;
        encode_tensor_map(&map, view, B, H, N, D, rows);
        return map;
    }
};

}  // namespace

template <>
void serve_unit<EFFICIENT_ATTN_PART, EFFICIENT_ATTN_DTYPE, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>(
    const Request& request) {
    using Element = std::conditional_t<EFFICIENT_ATTN_DTYPE == kBFloat16, BFloat16, Float16>;
    KernelParams k = kernel_params(request.call, request.seed);
    k.flags = request.flags;
    k.delta = request.delta;
    k.query_sums = request.query_sums;
    UnitLaunch launch(request.device, request.stream);
    if constexpr (EFFICIENT_ATTN_PART == kDecode) {
        serve_decode<Element>(decode_params(k, request.part_out, request.part_lse, request.splits), launch);
    } else {
        using Serve = std::conditional_t<EFFICIENT_ATTN_PART == kForward, ServeForward, ServeBackward>;
        Serve::template serve<Element, EFFICIENT_ATTN_HEAD, EFFICIENT_ATTN_EXTRAS>(k, launch);
    }
}

}  // namespace efficient_attn
