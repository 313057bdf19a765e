#pragma once
#include <stdint.h>

namespace rac {

// Element types as python names them by number; keep in step with rac_kernels/backends/native.py.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// How an operation that can fail in more than one way ended; in step with rac_kernels/backends/native.py.
enum class Status : int { done = 0, no_memory = 1, not_finite = 2, not_positive_definite = 3 };

// The memory that int16_gemm.cpp works in, for rows of n columns: counts of int32 for the packed rows, of float for
// their scales, and of int32 for the matrix [n, n].
struct Int16Sizes { int64_t packed, scales, matrix; };

// Of attention: q [heads, tokens, d], k [key_heads, tokens, d], v [key_heads, tokens, e], each with the strides of its
// heads and tokens, elements of a token side by side; a share is made of scale <q, k>.
struct AttentionSizes {
    int64_t heads, key_heads, d, e, q_head, q_row, k_head, k_row, v_head, v_row;
    float scale;
};

// Rows of a packed matrix (rac_kernels/ops/packed.py), beside one another: where each one's values begin, in units of 4
// bytes from `values`; the mask, ceil(columns / 64) words a row; the scales in bf16, ceil(columns / group) a row, null
// for values that are numbers of `dtype` themselves. At least 64 bytes may be read beyond the last value.
enum class Values : int { same = 0, int8 = 1, int4 = 2 };
struct PackedRows {
    const uint32_t* index;
    const uint64_t* mask;
    const uint16_t* scales;
    const uint8_t* values;
    DType dtype;
    Values kind;
    int64_t rows, columns, group;
};

}  // namespace rac
