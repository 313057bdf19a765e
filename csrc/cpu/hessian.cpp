// The upper triangle of H += X^T diag(w) X.
#include "cpu/common.h"

namespace {

template <class T>
void accumulate(float* H, int64_t h_stride, const T* X, int64_t tokens, int64_t n, int64_t row_stride,
                int64_t column_stride, const float* weights, int threads) {
    for_each_dynamic(n, threads, [&](int64_t i) {
        for (int64_t t = 0; t < tokens; ++t) {
            const T* row = X + t * row_stride;
            const float scale = to_float(row[i * column_stride]) * (weights ? weights[t] : 1.0f);
            for (int64_t j = i; j < n; ++j) H[i * h_stride + j] += scale * to_float(row[j * column_stride]);
        }
    });
}

}  // namespace

void rac::RAC_ISA::hessian(float* H, int64_t h_stride, const void* X, DType dtype, int64_t tokens, int64_t n,
                           int64_t row_stride, int64_t column_stride, const float* weights, int threads) {
    with_dtype(dtype, [&](auto* type) {
        accumulate(H, h_stride, static_cast<decltype(type)>(X), tokens, n, row_stride, column_stride, weights, threads);
    });
}
