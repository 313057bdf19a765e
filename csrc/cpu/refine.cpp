// What conjugate gradients do between two products with H, fused: a row's vectors stay in the second-level cache from
// the first dot to the next direction, so memory is read and written once.
#include "cpu/common.h"

namespace {

constexpr int64_t kChunk = 512;  // products summed in lanes before they go to fp64

// Sum of what f(j) gives for j < n, in lanes of that type.
template <class Lane = float, class F>
inline double sum_of(int64_t n, const F& f) {
    double total = 0;
    for (int64_t first = 0; first < n; first += kChunk) {
        const int64_t width = min_of(kChunk, n - first);
        Lane lanes[16] = {};
        int64_t j = 0;
        for (; j + 16 <= width; j += 16)
            for (int64_t k = 0; k < 16; ++k) lanes[k] += f(first + j + k);
        for (; j < width; ++j) lanes[0] += f(first + j);
        for (int64_t k = 0; k < 16; ++k) total += lanes[k];
    }
    return total;
}

}  // namespace

int64_t rac::RAC_ISA::refine_step(float* Q, float* R, float* P, const float* A, const uint8_t* mask,
                                  const float* inverse, double* sizes, const double* done_at, int32_t* counts,
                                  int64_t rows, int64_t n, int threads) {
    int64_t going = 0;
    for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
        int64_t own = 0;
        for (int64_t row = begin; row < end; ++row) {
            if (!(sizes[row] > 0)) continue;
            float* const __restrict q = Q + row * n;
            float* const __restrict r = R + row * n;
            float* const __restrict p = P + row * n;
            const float* const __restrict a = A + row * n;
            const uint8_t* const __restrict kept = mask + row * n;
            const double curvature = sum_of(n, [&](int64_t j) { return p[j] * a[j]; });
            const float step = static_cast<float>(sizes[row] / curvature);
            double size = 0;
            // Without curvature (or with NaN) there is no step to make: the row is done.
            if (curvature > 0 && step < __builtin_inff()) {
                for (int64_t j = 0; j < n; ++j) {  // no control flow, which would keep it from vectors
                    q[j] += step * p[j];
                    r[j] -= static_cast<float>(kept[j]) * (step * a[j]);
                }
                size = sum_of(n, [&](int64_t j) { return r[j] * inverse[j] * r[j]; });
                const float turn = static_cast<float>(size / sizes[row]);
                ++counts[row];
                if (size > done_at[row]) {
                    ++own;
                    for (int64_t j = 0; j < n; ++j) p[j] = inverse[j] * r[j] + turn * p[j];
                }
            }
            sizes[row] = size > done_at[row] ? size : 0;
        }
        __atomic_fetch_add(&going, own, __ATOMIC_RELAXED);
    });
    return going;
}

void rac::RAC_ISA::row_dots(const float* A, const float* B, const float* weights, double* dots, int64_t rows, int64_t n,
                            int threads) {
    for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* const __restrict a = A + row * n;
            const float* const __restrict b = B + row * n;
            dots[row] = sum_of<double>(n, [&](int64_t j) {
                const double plain = static_cast<double>(a[j]) * b[j];
                return weights ? plain * weights[j] : plain;
            });
        }
    });
}
