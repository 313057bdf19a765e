// Helpers that the kernels share. tests/cuda/shim stands in for CUDA's headers and lets a host compiler run them.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#ifndef RAC_SHARED
// A block's shared memory, sized at launch; one array a file.
#define RAC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// Cooperative: the blocks wait for each other, so all of them must be resident at once, or the launch is refused.
enum class Blocks { independent, cooperative };

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Blocks blocks, int64_t grid, int threads, size_t shared, void* stream,
                   Arguments... arguments) {
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cooperative;
    config.numAttrs = blocks == Blocks::cooperative;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
