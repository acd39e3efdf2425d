// One unit of the kernels, as it is shipped, on recorder.cpp: prints what the calls of a few requests launch.
//     unit_harness CAPABILITY ROW_STRIDE FLAGS    (forward, bfloat16, heads of up to 64; rows of 64 elements)
#include <cstdio>
#include <cstdlib>

#include "cuda/units.h"
#include "recorder.h"

using namespace efficient_attn;

int main(int, char** arguments) {
    const int capability = std::atoi(arguments[1]), row_stride = std::atoi(arguments[2]);
    recorder::has_encoder = true;
    AttentionParams p{};
    p.dtype = kBFloat16;
    p.B = 2, p.Hq = 4, p.Hkv = 2, p.Nq = 300, p.Nk = 500, p.D = 64, p.Dv = 64;
    p.scale = 0.125;
    uint64_t address = 4096;
    for (TensorView* view : {&p.query, &p.key, &p.value, &p.out}) {
        const int64_t heads = view == &p.key || view == &p.value ? p.Hkv : p.Hq;
        *view = {reinterpret_cast<void*>(address), row_stride * 500 * heads, row_stride * 500, row_stride};
        address += 1 << 20;
    }
    p.lse = reinterpret_cast<void*>(address);
    p.mask.window_left = p.mask.window_right = -1;
    KernelParams k = kernel_params(p, nullptr);
    k.flags = std::atoi(arguments[3]) ? reinterpret_cast<int32_t*>(address + (1 << 20)) : nullptr;
    Launch launch(capability == 90 ? 0 : 1, 0x55);  // the recorder's devices have 9.0, 9.1, ...
    attention_forward_unit<kBFloat16, 64, false>(k, launch);
    for (const recorder::Started& s : recorder::started)
        std::printf("%s %u %u %zu %d\n", recorder::name_of(s.kernel).c_str(), s.grid.x, s.block.x, s.shared, s.device);
    for (const recorder::Encoded& e : recorder::encoded)
        std::printf("map %llu %u\n", static_cast<unsigned long long>(e.sizes[1]), e.box[1]);
    std::printf("asked for shared memory %d times\n", recorder::opted.load());
}
