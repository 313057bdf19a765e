// The CUDA operations: raw device pointers, sizes and strides in elements, a cudaStream_t as void*. What they are given
// has been checked by rac_kernels/backends/cuda.py. They return a cudaError_t as int, never wait for the device,
// allocate nothing, and can be captured in a CUDA graph (run each once before: the first call loads its code).
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The meaning of an error code.
const char* rac_cuda_error(int error);

// No error if the device (below 0: the current one) can run what was compiled here: the driver is new enough, and there
// is code for it.
int rac_cuda_usable(int device);

// For each of `batch` matrices H (matrix_stride apart, row stride h_stride): the corner of size <= 128 that starts at
// row and column `first`, less the sum of pulls[part][first + i][j] over the parts (part_stride apart, row stride
// pull_stride), -> U with this = U U^T, in the upper triangle alone, and inverse [size, size] = inv(U), zeros below the
// diagonal. status[matrix] becomes 1 + the column of H whose pivot is not a positive finite number; then, and if it was
// not 0 before, the matrix and its inverse are left as they are.
int rac_cuda_factor_corner(float* H, int64_t h_stride, int64_t matrix_stride, int64_t first, int size,
                           const float* pulls, int parts, int64_t part_stride, int64_t pull_stride,
                           int64_t pull_matrix_stride, float* inverse, int64_t inverse_stride,
                           int64_t inverse_matrix_stride, int32_t* status, int64_t batch, void* stream);

// How many groups one launch takes, and the bytes of device memory that each needs.
int rac_cuda_select_groups(void);
int64_t rac_cuda_select_state(void);

// scores: groups one after the other, `counts` elements each; NaN counts as largest. The k[g] smallest of group g, the
// earliest among equals, are those < thresholds[g] and those == thresholds[g] up to position last[g] within the group
// (k = 0: -infinity and -1). counts and k are host arrays, 0 <= k <= counts < 2^32. state:
// rac_cuda_select_state() bytes for each group, at most rac_cuda_select_groups() of them; zero before the first
// call, and then as each call leaves it.
int rac_cuda_select(const float* scores, int64_t groups, const int64_t* counts, const int64_t* k, void* state,
                    float* thresholds, int64_t* last, void* stream);

#ifdef __cplusplus
}
#endif
