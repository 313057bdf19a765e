// The step of conjugate gradients between two products with H, fused: a row's vectors stay in the second-level cache
// from the first dot to the next direction, so memory is read and written once.
#include "cpu/tile.h"

namespace {

constexpr int64_t kChunk = 512;        // products summed in lanes before they go to fp64
constexpr double kRounding = 0x1p-23;  // of fp32

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

// Sum of weights[j] f(j)^2 in fp64.
template <class F>
inline double size_of(int64_t n, const float* weights, const F& f) {
    return sum_of<double>(n, [&](int64_t j) {
        const double x = f(j);
        return weights[j] * x * x;
    });
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

void rac::RAC_ISA::refine_begin(const float* E, const float* A, const uint8_t* mask, const float* diagonal,
                                const float* inverse, float* R, float* P, double* found, int64_t rows, int64_t n,
                                int threads) {
    for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* const __restrict e = E + row * n;
            const float* const __restrict a = A + row * n;
            const uint8_t* const __restrict kept = mask + row * n;
            float* const __restrict r = R + row * n;
            float* const __restrict p = P + row * n;
            double* const own = found + row * 4;
            int64_t support = 0;
            for (int64_t j = 0; j < n; ++j) {
                r[j] = static_cast<float>(kept[j]) * a[j];
                p[j] = inverse[j] * r[j];
                support += kept[j];
            }
            own[0] = sum_of<double>(n, [&](int64_t j) { return static_cast<double>(e[j]) * a[j]; });
            own[1] = size_of(n, inverse, [&](int64_t j) { return r[j]; });
            own[2] = static_cast<double>(support);
            own[3] = size_of(n, diagonal, [&](int64_t j) { return e[j]; });
        }
    });
}

void rac::RAC_ISA::refine_end(float* Q, const float* start, const float* E, const float* A, const uint8_t* mask,
                              const float* first, const float* diagonal, const float* inverse, const double* begun,
                              double* found, int64_t rows, int64_t n, int threads) {
    for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float* const __restrict q = Q + row * n;
            const float* const __restrict s = start + row * n;
            const float* const __restrict e = E + row * n;
            const float* const __restrict a = A + row * n;
            const float* const __restrict f = first + row * n;
            const uint8_t* const __restrict kept = mask + row * n;
            double* const own = found + row * 3;
            const auto residual = [&](int64_t j) { return static_cast<float>(kept[j]) * a[j]; };
            own[0] = sum_of<double>(n, [&](int64_t j) { return static_cast<double>(e[j]) * a[j]; });
            const double fall =
                sum_of<double>(n, [&](int64_t j) { return static_cast<double>(q[j] - s[j]) * (f[j] + residual(j)); });
            const double moved = size_of(n, diagonal, [&](int64_t j) { return q[j] - s[j]; });
            const double left = size_of(n, diagonal, [&](int64_t j) { return e[j]; });
            const double far = __builtin_sqrt(begun[row * 4 + 3]) + __builtin_sqrt(left);
            const double rounding = kRounding * __builtin_sqrt(moved) * far;
            const bool better = fall > rounding;  // not if either is NaN
            if (!better) copy(q, s, n);
            own[1] = better ? size_of(n, inverse, residual) : size_of(n, inverse, [&](int64_t j) { return f[j]; });
            own[2] = better;
        }
    });
}
