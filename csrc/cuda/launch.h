// Launches kernels on a stream of one GPU through the CUDA runtime. Nothing here waits for the GPU or allocates on it,
// so that a call can be captured in a CUDA graph; every code that the runtime returns is checked.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "cuda/params.h"

namespace efficient_attn {

// A CUDA call that failed; what() names it and says what it was for.
struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a GPU is and offers, read once.
struct Device {
    int capability = 0;  // 80 for compute capability 8.0
    int multiprocessors = 0;
    int most_shared_bytes = 0;  // that a block may ask for
};

class Launch {
  public:
    // Makes `device` current for this thread until the end of the object.
    Launch(int device, uintptr_t stream);
    ~Launch();
    Launch(const Launch&) = delete;
    Launch& operator=(const Launch&) = delete;

    // The newest kernels of this build that the GPU runs: 90, code for 9.0 and nothing newer, or 80.
    int capability() const;
    int most_shared_bytes() const { return found_->most_shared_bytes; }
    int multiprocessors() const { return found_->multiprocessors; }

    template <class... Parameters>
    void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, uint32_t shared_bytes,
                    const std::common_type_t<Parameters>&... arguments) {
        void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
        start(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, addresses);
    }

    // How TMA finds tiles of `rows` x 64 elements of 16 bits in a tensor (B, H, N, D): coordinates (element, row, head,
    // batch), the 128-byte swizzle, zeros beyond the end.
    TensorMap tensor_map(const TensorView& view, int64_t B, int64_t H, int64_t N, int64_t D, int rows);

  private:
    void start(const void* kernel, int64_t blocks, int threads, uint32_t shared_bytes, void** arguments);

    int device_, previous_;
    void* stream_;
    const Device* found_;
};

}  // namespace efficient_attn
