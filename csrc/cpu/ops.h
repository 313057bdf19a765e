// The native operations. No include guard on purpose: common.h and bindings.cpp include this inside the namespace of each
// instruction set, so that every one of them has the same entry points. Row-major; strides in elements; 64-bit everywhere.

// H[i, j] += sum over t of w[t] X[t, i] X[t, j] for i <= j; w may be null.
void hessian(float* H, int64_t h_stride, const void* X, DType dtype, int64_t tokens, int64_t n, int64_t row_stride,
             int64_t column_stride, const float* weights, int threads);

// s[j] += sum over t of w[t] X[t, j]^2; w may be null.
void column_norm(float* s, const void* X, DType dtype, int64_t tokens, int64_t n, int64_t row_stride,
                 int64_t column_stride, const float* weights, int threads);
