// csrc/cuda/launch.cpp on recorder.cpp: what is launched where, which device is current afterwards, what is said of an
// error.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "cuda/launch.h"
#include "recorder.h"

using namespace recorder;

namespace {

int checks = 0;

#define CHECK(condition)                                                      \
    do {                                                                      \
        ++checks;                                                             \
        if (!(condition)) {                                                   \
            std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
            std::exit(1);                                                     \
        }                                                                     \
    } while (0)

void kernel(int64_t, float) {}
void other_kernel(int64_t, float) {}

// What is thrown by `call`, as text.
template <class Call>
std::string thrown(Call call) {
    try {
        call();
    } catch (const efficient_attn::CudaError& error) {
        return error.what();
    }
    return "nothing was thrown";
}

bool holds(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

using efficient_attn::Launch;

void the_device_is_current_only_as_long_as_the_launch() {
    current = 2;
    {
        Launch launch(1, 0x55);
        CHECK(current == 1);
        CHECK(launch.capability() == 80 && launch.multiprocessors() == 132 && launch.most_shared_bytes() == 232448);
        Launch inner(1, 0);
        CHECK(current == 1 && attributes == 4);  // read once
    }
    CHECK(current == 2);
    CHECK(Launch(0, 0).capability() == 90);
    CHECK(current == 2 && attributes == 8);
}

void a_kernel_gets_its_grid_stream_and_arguments() {
    started.clear();
    Launch launch(1, 0x55);
    int64_t first = 0;
    float second = 0;
    on_arguments = [&](void** arguments) {
        first = *static_cast<int64_t*>(arguments[0]);
        second = *static_cast<float*>(arguments[1]);
    };
    launch(&kernel, 7, 128, 1024u, 3, 2);  // converted to the types of the parameters
    on_arguments = nullptr;
    CHECK(started.size() == 1);
    const Started& s = started[0];
    CHECK(s.kernel == reinterpret_cast<const void*>(&kernel) && s.device == 1);
    CHECK(s.grid.x == 7 && s.grid.y == 1 && s.grid.z == 1 && s.block.x == 128 && s.block.y == 1 && s.block.z == 1);
    CHECK(s.shared == 1024 && s.stream == reinterpret_cast<cudaStream_t>(0x55));
    CHECK(first == 3 && second == 2.0f);
}

void much_shared_memory_is_asked_for_once_a_kernel_and_device() {
    const auto run = [](int device, void (*k)(int64_t, float), uint32_t bytes) {
        Launch launch(device, 0);
        launch(k, 1, 32, bytes, 0, 0);
    };
    run(1, &kernel, 48 * 1024);
    CHECK(opted == 0);
    run(1, &kernel, 64 * 1024);
    run(1, &kernel, 64 * 1024);
    CHECK(opted == 1);
    run(0, &kernel, 64 * 1024);
    run(1, &other_kernel, 64 * 1024);
    CHECK(opted == 3);
    run(1, &kernel, 96 * 1024);
    run(1, &kernel, 64 * 1024);
    CHECK(opted == 4);
    std::vector<std::thread> threads;
    for (int k = 0; k < 8; ++k)
        threads.emplace_back([&, k] {
            for (int i = 0; i < 50; ++i) {
                Launch launch(3 + k % 2, 0);
                Launch(3, 0).capability();
            }
            run(3 + k % 2, &kernel, 65 * 1024);
        });
    for (std::thread& t : threads) t.join();
    CHECK(opted == 6 && attributes == 16);
    failing["cudaFuncSetAttribute"] = cudaErrorInvalidValue;
    CHECK(holds(thrown([&] { run(5, &kernel, 300 * 1024); }), "cudaFuncSetAttribute for 307200 bytes"));
    failing.clear();
    run(5, &kernel, 300 * 1024);  // what failed is tried again
    CHECK(opted == 7);
}

void a_grid_has_its_limits() {
    Launch launch(1, 0);
    for (const int64_t blocks : {int64_t{0}, int64_t{-1}, int64_t{1} << 31, int64_t{1} << 40}) {
        started.clear();
        const std::string said = thrown([&] { launch(&kernel, blocks, 32, 0u, 0, 0); });
        CHECK(holds(said, std::to_string(blocks).c_str()) && holds(said, "split the batch") && started.empty());
    }
    launch(&kernel, (int64_t{1} << 31) - 1, 32, 0u, 0, 0);
    CHECK(started.size() == 1 && started[0].grid.x == 0x7FFFFFFFu);
}

void errors_are_named_and_leave_nothing_behind() {
    current = 2;
    failing["cudaLaunchKernel"] = cudaErrorInvalidConfiguration;
    std::string said = thrown([] { Launch(1, 0)(&kernel, 9, 64, 16u, 0, 0); });
    CHECK(holds(said, "cudaLaunchKernel of the_kernel(long, float) with 9 blocks of 64 threads and 16 bytes"));
    CHECK(holds(said, "name 9 ") || holds(said, "failed: name 9"));
    CHECK(!holds(said, "earlier"));
    CHECK(current == 2 && last == cudaSuccess);
    failing["cudaLaunchKernel"] = cudaErrorIllegalAddress;
    failing["cudaFuncGetName"] = cudaErrorIllegalAddress;
    said = thrown([] { Launch(1, 0)(&kernel, 9, 64, 16u, 0, 0); });
    CHECK(holds(said, "cudaLaunchKernel of a kernel") && holds(said, "launched earlier in this process"));
    failing = {{"cudaLaunchKernel", cudaErrorNoKernelImageForDevice}};
    CHECK(holds(thrown([] { Launch(1, 0)(&kernel, 1, 64, 16u, 0, 0); }), "EFFICIENT_ATTN_CUDA_ARCHS"));
    failing = {{"cudaGetDevice", cudaErrorInsufficientDriver}};
    CHECK(holds(thrown([] { Launch(1, 0); }), "cudaGetDevice failed") &&
          holds(thrown([] { Launch(1, 0); }), "need an NVIDIA GPU"));
    failing = {{"cudaSetDevice", cudaErrorInvalidDevice}};
    CHECK(holds(thrown([] { Launch(1, 0); }), "cudaSetDevice(1) failed") && current == 2);
    failing = {{"cudaDeviceGetAttribute", cudaErrorInvalidDevice}};
    CHECK(holds(thrown([] { Launch(9, 0); }), "cudaDeviceGetAttribute") && current == 2);
    failing.clear();
    CHECK(Launch(9, 0).multiprocessors() == 132);  // what failed is not remembered
}

void a_tensor_map_describes_the_tensor() {
    uint64_t data[2] = {};
    Launch launch(1, 0);
    efficient_attn::TensorView view{data, 8000, 2000, 200};
    CHECK(holds(thrown([&] { launch.tensor_map(view, 3, 4, 10, 96, 64); }), "cuTensorMapEncodeTiled"));
    has_encoder = true;
    const efficient_attn::TensorMap map = launch.tensor_map(view, 3, 4, 10, 96, 128);
    CHECK(encoded.back().data == data && encoded.back().type == CU_TENSOR_MAP_DATA_TYPE_UINT16);
    CHECK((encoded.back().sizes == std::vector<uint64_t>{96, 10, 4, 3}));
    CHECK((encoded.back().strides == std::vector<uint64_t>{400, 4000, 16000}));  // in bytes
    CHECK((encoded.back().box == std::vector<uint32_t>{64, 128, 1, 1}) &&
          (encoded.back().steps == std::vector<uint32_t>(4, 1)));
    CHECK(encoded.back().swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
          encoded.back().fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    CHECK(map.opaque[15] == 0x0707070707070707u);
    view = {data, 1, 3, 5};  // strides of dimensions of one element may be anything
    launch.tensor_map(view, 1, 1, 1, 64, 64);
    CHECK((encoded.back().strides == std::vector<uint64_t>{16, 16, 16}));
    encoder_says = CUDA_ERROR_INVALID_VALUE;
    CHECK(holds(thrown([&] { launch.tensor_map(view, 1, 2, 3, 4, 64); }), "(1, 2, 3, 4) failed"));
}

}  // namespace

int main() {
    the_device_is_current_only_as_long_as_the_launch();
    a_kernel_gets_its_grid_stream_and_arguments();
    much_shared_memory_is_asked_for_once_a_kernel_and_device();
    a_grid_has_its_limits();
    errors_are_named_and_leave_nothing_behind();
    a_tensor_map_describes_the_tensor();
    std::printf("%d checks hold\n", checks);
}
