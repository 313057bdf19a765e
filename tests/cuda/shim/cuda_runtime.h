// Enough of CUDA for a host compiler (C++20) to run csrc/cuda as it stands: a thread of a block is a std::thread,
// __syncthreads and the warp's operations are barriers, shared memory is one buffer a block, atomics are
// std::atomic_ref. Blocks run one after the other, those of a cooperative launch at once. So sanitizers see, as they
// would in any program, what the memory model of C++ (CUDA's is built on it) allows and what it does not.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <bit>
#include <memory>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define RAC_SHARED(type, name) type* const name = static_cast<type*>(shim::block->shared)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned x) : x(x) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace shim {

// As std::barrier, whose waiters in libstdc++ are also woken by what happens at other barriers.
class Barrier {
public:
    explicit Barrier(uint32_t threads) : here(kOne * threads) {}
    void wait() {
        const int mine = phase.load(std::memory_order_relaxed);
        if (!complete(here.fetch_add(1, std::memory_order_acq_rel) + 1)) phase.wait(mine, std::memory_order_acquire);
    }
    void leave() { complete(here.fetch_sub(kOne, std::memory_order_acq_rel) - kOne); }

private:
    bool complete(uint64_t now) {
        const auto arrived = static_cast<uint32_t>(now), expected = static_cast<uint32_t>(now >> 32);
        if (arrived < expected || !expected) return false;
        here.fetch_sub(arrived, std::memory_order_relaxed);
        phase.fetch_add(1, std::memory_order_release);
        phase.notify_all();
        return true;
    }
    static constexpr uint64_t kOne = uint64_t{1} << 32;
    std::atomic<uint64_t> here;  // how many are expected, and below, how many have arrived
    std::atomic<int> phase = 0;
};

struct Warp {
    explicit Warp(int lanes) : barrier(lanes) {}
    Barrier barrier;
    uint32_t slots[32];
};

struct Block {
    Block(int threads, size_t bytes) : barrier(threads), shared(aligned_alloc(128, (bytes + 127) / 128 * 128)) {
        memset(shared, 0xff, bytes);  // NaN, and not what another block left
        for (int first = 0; first < threads; first += 32) warps.push_back(std::make_unique<Warp>(32));
    }
    Block(const Block&) = delete;
    ~Block() { free(shared); }
    Barrier barrier;
    std::vector<std::unique_ptr<Warp>> warps;
    void* shared;
};

inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local unsigned lane;

// What a lane gives and what it takes from another, all lanes at once.
template <class T, class From>
T exchange(T mine, From from) {
    static_assert(sizeof(T) == 4);
    warp->slots[lane] = std::bit_cast<uint32_t>(mine);
    warp->barrier.wait();
    const T theirs = from(warp->slots);
    warp->barrier.wait();
    return theirs;
}

}  // namespace shim

inline thread_local dim3 threadIdx, blockIdx;

inline void __syncthreads() { shim::block->barrier.wait(); }
inline void __syncwarp() { shim::warp->barrier.wait(); }
inline void __nanosleep(unsigned) { std::this_thread::yield(); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return shim::exchange(value, [&](const uint32_t* slots) { return std::bit_cast<T>(slots[from]); });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
    return shim::exchange(value, [&](const uint32_t* slots) {
        return static_cast<int>(shim::lane) < by ? value : std::bit_cast<T>(slots[shim::lane - by]);
    });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    return shim::exchange(static_cast<uint32_t>(vote), [](const uint32_t* slots) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) votes |= slots[lane] << lane;
        return votes;
    });
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
    return std::atomic_ref(*to).fetch_add(value, std::memory_order_relaxed);
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid value" : "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidValue : cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    const char* set = getenv("SHIM_MULTIPROCESSORS");
    return *value = set ? atoi(set) : 2, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return bytes <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const int threads = static_cast<int>(config->blockDim.x);
    const bool together = config->numAttrs && config->attrs->val.cooperative;
    if (!config->gridDim.x || threads % 32 || config->stream) return cudaErrorInvalidValue;
    for (unsigned b = 0; b < config->gridDim.x;) {
        std::vector<std::unique_ptr<shim::Block>> blocks;
        std::vector<std::jthread> running;
        do {
            blocks.push_back(std::make_unique<shim::Block>(threads, config->dynamicSmemBytes));
            shim::Block* block = blocks.back().get();
            for (int t = 0; t < threads; ++t)
                running.emplace_back([=] {
                    shim::block = block;
                    shim::warp = block->warps[t / 32].get();
                    shim::lane = t % 32;
                    threadIdx.x = t;
                    blockIdx.x = b;
                    kernel(arguments...);
                    shim::warp->barrier.leave();  // the others do not wait for a thread that has returned
                    block->barrier.leave();
                });
        } while (++b < config->gridDim.x && together);
        running.clear();  // joins, before the blocks go
    }
    return cudaSuccess;
}
