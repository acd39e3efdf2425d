#include "cuda/launch.h"

#include <cuda.h>  // types only: the driver is found through the runtime
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace efficient_attn {
namespace {

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr uint32_t kSharedWithoutAsking = 48 * 1024;

// Errors of a kernel that ran before, which any later call reports; the context is lost with them.
bool is_of_an_earlier_kernel(cudaError_t code) {
    switch (code) {
        case cudaErrorIllegalAddress:
        case cudaErrorMisalignedAddress:
        case cudaErrorIllegalInstruction:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorHardwareStackError:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorECCUncorrectable:
            return true;
        default:
            return false;
    }
}

[[noreturn]] void fail(cudaError_t code, const std::string& call) {
    std::string text = call + " failed: " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ")";
    if (is_of_an_earlier_kernel(code))
        text +=
            "; a kernel that was launched earlier in this process, of this package or of another, has met it: "
            "CUDA_LAUNCH_BLOCKING=1 shows which";
    if (code == cudaErrorInsufficientDriver || code == cudaErrorNoDevice)
        text += "; these kernels need an NVIDIA GPU and a driver for CUDA " + std::to_string(CUDART_VERSION / 1000);
    if (code == cudaErrorNoKernelImageForDevice)
        text += "; build efficient-attn with this GPU's architecture in EFFICIENT_ATTN_CUDA_ARCHS";
    throw CudaError(text);
}

// Throws where `code` is no success. The runtime is linked into this module alone, so that the error which it remembers
// is ours to clear.
void check(cudaError_t code, const std::string& call) {
    if (code == cudaSuccess) return;
    cudaGetLastError();
    fail(code, call);
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

// What is known of a device: read once and kept.
const Device& describe(int device) {
    static std::mutex mutex;
    static std::map<int, Device> known;  // its elements stay where they are
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    Device d;
    d.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                   attribute(cudaDevAttrComputeCapabilityMinor, device);
    d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    d.most_shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return known.emplace(device, d).first->second;
}

std::string name_of(const void* kernel) {
    const char* symbol = nullptr;
    if (cudaFuncGetName(&symbol, kernel) != cudaSuccess || !symbol) {
        cudaGetLastError();
        return "a kernel";
    }
    int status = 0;
    const std::unique_ptr<char, decltype(&std::free)> plain(abi::__cxa_demangle(symbol, nullptr, nullptr, &status),
                                                            &std::free);
    return status == 0 ? plain.get() : symbol;
}

// Lets a kernel have more than 48 KiB of shared memory: once for each kernel and device.
void allow_shared(const void* kernel, int device, uint32_t bytes) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, uint32_t> allowed;
    const std::lock_guard<std::mutex> lock(mutex);
    uint32_t& most = allowed[{kernel, device}];
    if (most >= bytes) return;
    const cudaError_t code =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (code != cudaSuccess)
        check(code,
              "cudaFuncSetAttribute for " + std::to_string(bytes) + " bytes of shared memory of " + name_of(kernel));
    most = bytes;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which no library is linked for.
EncodeTiled encode_tiled() {
    static const EncodeTiled found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status),
              "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
        if (status != cudaDriverEntryPointSuccess || !function)
            throw CudaError("this driver has no cuTensorMapEncodeTiled; tensor maps need one for CUDA 12 or newer");
        return reinterpret_cast<EncodeTiled>(function);
    }();
    return found;
}

}  // namespace

Launch::Launch(int device, uintptr_t stream)
    : device_(device), previous_(device), stream_(reinterpret_cast<void*>(stream)), found_(nullptr) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    found_ = &describe(device);
    check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
}

int Launch::capability() const { return EFFICIENT_ATTN_HOPPER && found_->capability == 90 ? 90 : 80; }

Launch::~Launch() {
    if (previous_ != device_) cudaSetDevice(previous_);  // was current before, hence exists
}

void Launch::start(const void* kernel, int64_t blocks, int threads, uint32_t shared_bytes, void** arguments) {
    if (blocks < 1 || blocks > kMostBlocks)
        throw CudaError(name_of(kernel) + " would need " + std::to_string(blocks) +
                        " blocks of threads; a grid has 1 to " + std::to_string(kMostBlocks) + ": split the batch");
    if (shared_bytes > kSharedWithoutAsking) allow_shared(kernel, device_, shared_bytes);
    const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
    const cudaError_t code =
        cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, static_cast<cudaStream_t>(stream_));
    if (code != cudaSuccess)
        check(code, "cudaLaunchKernel of " + name_of(kernel) + " with " + std::to_string(blocks) + " blocks of " +
                        std::to_string(threads) + " threads and " + std::to_string(shared_bytes) +
                        " bytes of shared memory");
}

TensorMap Launch::tensor_map(const TensorView& view, int64_t B, int64_t H, int64_t N, int64_t D, int rows) {
    constexpr int kRank = 4;
    constexpr uint64_t kElement = 2;
    const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
    // The stride of a dimension of one element is never taken, but has to look like one.
    const auto bytes = [](int64_t stride, int64_t n) {
        return n == 1 ? cuuint64_t{16} : static_cast<cuuint64_t>(stride) * kElement;
    };
    const cuuint64_t sizes[kRank] = {size(D), size(N), size(H), size(B)};
    const cuuint64_t strides[kRank - 1] = {bytes(view.row_stride, N), bytes(view.head_stride, H),
                                           bytes(view.batch_stride, B)};
    const cuuint32_t box[kRank] = {64, static_cast<cuuint32_t>(rows), 1, 1};
    const cuuint32_t steps[kRank] = {1, 1, 1, 1};
    CUtensorMap encoded;
    const CUresult code = encode_tiled()(&encoded, CU_TENSOR_MAP_DATA_TYPE_UINT16, kRank, view.data, sizes, strides,
                                         box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS)
        throw CudaError("cuTensorMapEncodeTiled of a tensor (" + std::to_string(B) + ", " + std::to_string(H) + ", " +
                        std::to_string(N) + ", " + std::to_string(D) + ") failed with CUresult " +
                        std::to_string(static_cast<int>(code)));
    TensorMap map;
    static_assert(sizeof map == sizeof encoded);
    std::memcpy(&map, &encoded, sizeof map);
    return map;
}

}  // namespace efficient_attn
