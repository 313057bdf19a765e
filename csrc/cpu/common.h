// Shared by the files of csrc/cpu, each of which is compiled once for every instruction set, with RAC_ISA naming it.
//
// These files must not use the C++ standard library: an inline function of it compiled with AVX flags would be merged
// by the linker with the baseline's copy, and the baseline would then run AVX code on a machine without it. C
// headers, compiler builtins and what is in anonymous namespaces or in the RAC_ISA namespace are safe.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "cpu/types.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#ifndef RAC_ISA
#error "RAC_ISA names the instruction set this file is compiled for"
#endif

namespace rac {
namespace RAC_ISA {
#include "cpu/ops.h"
}
}  // namespace rac

namespace {

using rac::DType;
using rac::Status;

constexpr int64_t kCacheLine = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class T>
constexpr T min_of(T a, T b) {
    return a < b ? a : b;
}
template <class T>
constexpr T max_of(T a, T b) {
    return a > b ? a : b;
}

// Scratch memory on cache lines, or on huge pages where it is large; null data after a failed allocation of more than
// nothing.
template <class T>
struct Scratch {
    T* data;
    explicit Scratch(int64_t count) {
        constexpr int64_t kHugePage = 1 << 21;
        const int64_t bytes = max_of<int64_t>(count, 1) * sizeof(T), unit = bytes < kHugePage ? kCacheLine : kHugePage;
        data = static_cast<T*>(aligned_alloc(unit, round_up(bytes, unit)));
#if defined(MADV_HUGEPAGE)
        if (data && unit == kHugePage) madvise(data, round_up(bytes, unit), MADV_HUGEPAGE);
#endif
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// Whoever touches this memory first may be given huge pages: fewer faults, and rows far apart share a translation.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHugePage = 1 << 21;
    const uintptr_t start = reinterpret_cast<uintptr_t>(data), first = (start + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    // Shift exponent and mantissa into place and rebias by a multiplication, which also mends subnormals.
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    const float magnitude = rest >= 0x7c00 ? from_bits(0x7f800000u | (rest & 0x3ff) << 13)
                                           : from_bits(rest << 13) * from_bits(0x77800000u);  // 2^112
    return sign ? -magnitude : magnitude;
#endif
}

// Call f(thread, threads) on every thread of a team of at most `threads`.
template <class F>
inline void on_threads(int threads, const F& f) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        f(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    f(0, 1);
}

// Call f(item) for the items 0..count, taken by whichever thread is free.
template <class F>
inline void for_each_dynamic(int64_t count, int threads, const F& f) {
    int64_t next = 0;
    on_threads(static_cast<int>(min_of<int64_t>(threads, count)), [&](int, int) {
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) f(i);
    });
}

// Call f(begin, end) for one contiguous share of 0..count a thread, in multiples of `grain`: the same split every time.
template <class F>
inline void for_each_range(int64_t count, int64_t grain, int threads, const F& f) {
    on_threads(static_cast<int>(min_of<int64_t>(threads, ceil_div(count, grain))), [&](int thread, int team) {
        const int64_t share = round_up(ceil_div(count, team), grain);
        const int64_t begin = min_of(count, thread * share), end = min_of(count, begin + share);
        if (begin < end) f(begin, end);
    });
}

// Call f with a zero of the element type that `dtype` stands for.
template <class F>
inline void with_dtype(DType dtype, const F& f) {
    switch (dtype) {
        case DType::float32: f(0.0f); break;
        case DType::bfloat16: f(bf16{}); break;
        case DType::float16: f(fp16{}); break;
    }
}

}  // namespace
