// The matrix kernel that factor and sweep are built on, in vectors as wide as the instruction set allows.
#pragma once
#include "cpu/common.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kSteps = 8;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kSteps = 4;
#else
constexpr int64_t kLanes = 4, kSteps = 4;
#endif
constexpr int64_t kVectors = 3;               // kVectors * kSteps sums, and what feeds them, fill the registers
constexpr int64_t kTile = kVectors * kLanes;  // 48, 24 or 12

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec& vec(float* p) { return *reinterpret_cast<Vec*>(p); }
inline const Vec& vec(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline IntVec& int_vec(int32_t* p) { return *reinterpret_cast<IntVec*>(p); }
inline const IntVec& int_vec(const int32_t* p) { return *reinterpret_cast<const IntVec*>(p); }

// C[s, :] += sum over k of B[k * b_depth + s * b_step] A[k, :] for s < kSteps; rows of A and C are kTile long.
inline void multiply_add(float* C, int64_t c_stride, const float* A, int64_t a_stride, const float* B, int64_t b_depth,
                         int64_t b_step, int64_t depth) {
    Vec sum[kSteps][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const float* a = A + k * a_stride;
        const float* b = B + k * b_depth;
#pragma GCC unroll 8
        for (int64_t s = 0; s < kSteps; ++s)
#pragma GCC unroll 3
            for (int64_t v = 0; v < kVectors; ++v) sum[s][v] += vec(a + v * kLanes) * b[s * b_step];
    }
#pragma GCC unroll 8
    for (int64_t s = 0; s < kSteps; ++s)
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) vec(C + s * c_stride + v * kLanes) += sum[s][v];
}

// memcpy of floats; the compiler's own choice for short runs of unknown length is slow.
inline void copy(float* to, const float* from, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) vec(to + i) = vec(from + i);
    for (; i < count; ++i) to[i] = from[i];
}

// for_each_dynamic with `own` floats of `scratch` for each thread: f(item, its thread's scratch).
template <class F>
inline void for_each_dynamic(int64_t count, int threads, float* scratch, int64_t own, const F& f) {
    int64_t next = 0;
    on_threads(static_cast<int>(min_of<int64_t>(threads, count)), [&](int thread, int) {
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) f(i, scratch + thread * own);
    });
}

}  // namespace
