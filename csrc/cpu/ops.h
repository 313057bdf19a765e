// The native operations. No include guard on purpose: common.h and bindings.cpp include this inside the namespace of
// each instruction set, so that every one of them has the same entry points. Row-major; strides in elements; 64-bit
// everywhere. What returns bool is false when there is no memory for its scratch.

// H[i, j] += sum over t of w[t] X[t, i] X[t, j] for i <= j; w is null or at least 0; tokens of weight 0 are not read.
Status hessian(float* H, int64_t h_stride, const void* X, DType dtype, int64_t tokens, int64_t n, int64_t row_stride,
               int64_t column_stride, const float* weights, int threads);

// C[i, j] += sum over t of w[t] X[t, i] Y[t, j], C [n, m]; w as above.
Status cross(float* C, int64_t c_stride, const void* X, const void* Y, DType dtype, int64_t tokens, int64_t n,
             int64_t m, int64_t x_row_stride, int64_t x_column_stride, int64_t y_row_stride, int64_t y_column_stride,
             const float* weights, int threads);

// s[j] += sum over t of w[t] X[t, j]^2; w as above.
void column_norm(float* s, const void* X, DType dtype, int64_t tokens, int64_t n, int64_t row_stride,
                 int64_t column_stride, const float* weights, int threads);

// *result = the k-th smallest of scores[0] .. scores[count - 1], 1 <= k <= count; NaN counts as largest.
bool kth_smallest(const float* scores, int64_t count, int64_t k, float* result, int threads);

// Q [rows, n] (row stride n) = W pruned and corrected under U, of which the upper triangle is read. `dead` [n] is
// null or marks columns that become zero. group = 0: of each block and each row group floor(sparsity * weights) go;
// else `keep` of each `group` columns stay, n and block_size being multiples of it. row_groups add up to the rows.
Status sweep(float* Q, const void* W, DType dtype, int64_t n, int64_t w_stride, const float* U, int64_t u_stride,
             const uint8_t* dead, double sparsity, int64_t keep, int64_t group, int64_t block_size,
             const int64_t* row_groups, int64_t row_group_count, int threads);

// Upper triangle of H [n, n] -> U with H = U U^T; nothing else of H is touched. Not positive definite: H is half done.
Status factor(float* H, int64_t n, int64_t h_stride, int threads);

// Upper triangle of U [n, n], U upper triangular -> that of (U U^T)^-1; nothing else of U is touched.
Status inverse(float* U, int64_t n, int64_t u_stride, int threads);

// Copies the strictly upper triangle of H onto the lower one, or (`down` false) the lower one onto the upper.
// not_finite if what is copied, or the diagonal, holds NaN or infinity.
Status mirror(float* H, int64_t n, int64_t h_stride, bool down, int threads);

// One step of conjugate gradients on every row. Q, R, P, A [rows, n], A = P H; mask [rows, n], inverse [n] >= 0.
// sizes [rows] is <R, inverse R>, 0 for rows that are done; done_at [rows] when to stop; counts [rows] += steps made.
// Returns the rows that go on.
int64_t refine_step(float* Q, float* R, float* P, const float* A, const uint8_t* mask, const float* inverse,
                    double* sizes, const double* done_at, int32_t* counts, int64_t rows, int64_t n, int threads);

// Before the first step: R = A on the mask, P = inverse R; E [rows, n] is what is missed, A = E H. found [rows, 4] =
// <E, A>, <R, P>, what the mask keeps, <E, diagonal E>.
void refine_begin(const float* E, const float* A, const uint8_t* mask, const float* diagonal, const float* inverse,
                  float* R, float* P, double* found, int64_t rows, int64_t n, int threads);

// After the last: rows of Q that are no better than `start` become it. E and A as above, `first` is what R was, `begun`
// what was found. found [rows, 3] = <E, A> of the Q that came, <R, inverse R> of what it is now, whether it was better.
void refine_end(float* Q, const float* start, const float* E, const float* A, const uint8_t* mask, const float* first,
                const float* diagonal, const float* inverse, const double* begun, double* found, int64_t rows,
                int64_t n, int threads);

// Each row of Q [rows, columns] to scale * code, |code| <= largest, where the mask keeps: column by column to what is
// nearest to q + pull inverse, a step d taking d H from the row's pull. Weights are rounded to dtype. scales [rows] at
// its stride, 0 for rows of which nothing is kept.
void grid_walk(float* Q, int64_t q_stride, float* pull, int64_t pull_stride, const uint8_t* mask, int64_t mask_stride,
               const float* scales, int64_t scale_stride, const float* H, const float* inverse, int64_t largest,
               DType dtype, int64_t rows, int64_t columns, int threads);

// Products of 16-bit integers, two to a word, laid out by int16_gemm.cpp: the memory they take. Words that stand for no
// element must be 0 from the start.
Int16Sizes int16_sizes(int64_t rows, int64_t n);

// M goes by `share` towards diag(scale) S diag(scale), S the symmetric matrix [n, n] in the upper triangle of U; with 1
// it need not hold anything. No eigenvalue of it may exceed 1 in size.
void int16_matrix(int32_t* M, const float* U, int64_t u_stride, const float* scale, int64_t n, float share,
                  int threads);

// M = diag(scale) H diag(1 / norms), H [n, n] with `diagonal` [n] in place of its own, scale [n] being diagonal^-1/2 or
// 0; norms [n] are those of the columns of diag(scale) H.
void int16_columns(int32_t* M, float* norms, const float* H, int64_t h_stride, const float* scale,
                   const float* diagonal, int64_t n, int threads);

// packed, scales = P diag(scale), P [rows, n].
bool int16_rows(int32_t* packed, float* scales, const float* P, const float* scale, int64_t rows, int64_t n,
                int threads);

// V [rows, n] = from + packed M diag(norms); from is V's like or null, as 0, norms [n] or null, as 1.
void int16_gemm(float* V, const float* from, const int32_t* packed, const float* scales, const int32_t* M,
                const float* norms, int64_t rows, int64_t n, int threads);

// ADMM's step between two products: T = relaxation V + T, where a weight stays relaxation V + (1 - relaxation) T;
// then the `zeros` smallest |T| go, or of each `group` columns all but the `keep` largest stay; T of those that go is
// multiplied by `shrink`; packed, scales = T - goal, of those that go -T - goal. V is overwritten.
bool admm_step(float* T, float* V, uint8_t* kept, const float* goal, int32_t* packed, float* scales, int64_t rows,
               int64_t n, int64_t zeros, int64_t keep, int64_t group, float relaxation, float shrink, int threads);

// out [tokens, heads, e] = causal attention of sequences behind one another, number i being starts[i] .. starts[i + 1];
// heads / key_heads heads share a key. All of them are bf16.
bool attention(void* out, const void* q, const void* k, const void* v, const AttentionSizes& sizes,
               const int64_t* starts, int64_t sequences, int threads);

// Y [tokens, rows] = X W^T + bias, X [tokens, columns] with columns side by side, both of x_dtype; bias [rows] or null.
// For a few tokens: W is expanded in registers once for each eight of them.
bool packed_matmul(void* Y, int64_t y_stride, const void* X, DType x_dtype, int64_t tokens, int64_t x_stride,
                   const PackedRows& W, const float* bias, int threads);

// The same for many tokens, a tile of W being expanded for all of them; int8 and int4 values are rounded to W's dtype.
bool packed_tiles(void* Y, int64_t y_stride, const void* X, DType x_dtype, int64_t tokens, int64_t x_stride,
                  const PackedRows& W, const float* bias, int threads);

// out [rows, columns] of `dtype`, which is W's own or fp32, = W in full, rounded to W's own.
bool packed_expand(void* out, DType dtype, const PackedRows& W, int threads);
