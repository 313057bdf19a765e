// Weighted squared column norms.
#include "cpu/common.h"

namespace {

constexpr int64_t kColumns = 256;  // a strip's fp64 sums stay in the first-level cache

template <class T>
void accumulate(float* s, const T* X, int64_t tokens, int64_t n, int64_t row_stride, int64_t column_stride,
                const float* weights, int threads) {
    // Sums in fp64: a plain fp32 chain over a million tokens would lose three digits, and memory bounds this anyway.
    for_each_range(n, kColumns, threads, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += kColumns) {
            const int64_t width = min_of(kColumns, end - first);
            double sums[kColumns] = {};
            for (int64_t t = 0; t < tokens; ++t) {
                const double w = weights ? weights[t] : 1.0;
                if (w == 0) continue;
                const T* row = X + t * row_stride + first * column_stride;
                if (column_stride == 1) {
                    for (int64_t j = 0; j < width; ++j) {
                        const double x = to_float(row[j]);
                        sums[j] += w * (x * x);
                    }
                } else {
                    for (int64_t j = 0; j < width; ++j) {
                        const double x = to_float(row[j * column_stride]);
                        sums[j] += w * (x * x);
                    }
                }
            }
            for (int64_t j = 0; j < width; ++j) s[first + j] = static_cast<float>(s[first + j] + sums[j]);
        }
    });
}

}  // namespace

void rac::RAC_ISA::column_norm(float* s, const void* X, DType dtype, int64_t tokens, int64_t n, int64_t row_stride,
                               int64_t column_stride, const float* weights, int threads) {
    with_dtype(dtype, [&](auto zero) {
        accumulate(s, static_cast<const decltype(zero)*>(X), tokens, n, row_stride, column_stride, weights, threads);
    });
}
