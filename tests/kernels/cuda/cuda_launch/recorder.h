// A CUDA runtime without a GPU, for tests of csrc/cuda/launch.cpp and of units linked with it: it remembers what it was
// asked for. What is not here (an allocation, a wait for the GPU) does not link.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace recorder {

struct Started {
    const void* kernel;
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
    int device;
};

struct Encoded {
    CUtensorMapDataType type;
    void* data;
    std::vector<uint64_t> sizes, strides;
    std::vector<uint32_t> box, steps;
    CUtensorMapSwizzle swizzle;
    CUtensorMapFloatOOBfill fill;
};

extern thread_local int current;                    // device
extern std::map<std::string, cudaError_t> failing;  // what calls return, where it is no success
extern cudaError_t last;                            // what cudaGetLastError would return
extern std::vector<Started> started;
extern std::function<void(void**)> on_arguments;  // sees those of each launch
extern std::atomic<int> attributes, opted;        // calls of cudaDeviceGetAttribute, cudaFuncSetAttribute
extern bool has_encoder;                          // whether the driver knows cuTensorMapEncodeTiled
extern CUresult encoder_says;
extern std::vector<Encoded> encoded;

std::string name_of(const void* kernel);  // mangled; of kernels that nvcc compiled

}  // namespace recorder
