// H = U U^T in place, and the inverse of U U^T; rac_kernels/ops has the mathematics and references, in factor.py and
// inverse.py.
//
// The factor is left-looking, from the last block of columns to the first. A block's rows are taken kRows at a time
// into scratch, where the products of the columns to its right come off and the block's corner is solved for, both by
// multiply_add with the block's columns across the lanes.
#include "cpu/tile.h"

namespace {

constexpr int64_t kBlock = 144;  // columns a block
constexpr int64_t kRows = 96;    // rows a task
constexpr int64_t kDepth = 128;  // columns to the right multiplied at a time
static_assert(kBlock % kTile == 0 && kRows % kSteps == 0, "only whole tiles are multiplied");

// The upper triangle of C [size, size] (row stride kBlock) -> U with C = U U^T. False: not positive definite. Some
// columns at a time, each an array of its own, so that what is left of C is read and written once for all of them.
bool factor_corner(double* C, int64_t size) {
    constexpr int64_t kSome = 8;
    double columns[kSome][kBlock];
    for (int64_t hi = size, lo; hi > 0; hi = lo) {
        lo = max_of<int64_t>(0, hi - kSome);
        for (int64_t i = 0; i < hi; ++i)
            for (int64_t j = lo; j < hi; ++j) columns[j - lo][i] = C[i * kBlock + j];
        for (int64_t j = hi - 1; j >= lo; --j) {
            double* const own = columns[j - lo];
            if (!(own[j] > 0)) return false;  // NaN too
            const double root = __builtin_sqrt(own[j]), inverse = 1 / root;
            own[j] = root;
            for (int64_t i = 0; i < j; ++i) own[i] *= inverse;
            for (int64_t k = lo; k < j; ++k) {
                const double by = own[k];
                for (int64_t i = 0; i <= k; ++i) columns[k - lo][i] -= by * own[i];
            }
        }
        for (int64_t i = 0; i < hi; ++i)
            for (int64_t j = max_of(i, lo); j < hi; ++j) C[i * kBlock + j] = columns[j - lo][i];
        if (lo == 0) break;
        for (int64_t i = 0; i < lo; ++i) {  // here there are kSome of them
            double* const row = C + i * kBlock;
            double by[kSome];
            for (int64_t j = 0; j < kSome; ++j) by[j] = columns[j][i];
            for (int64_t k = i; k < lo; ++k) {
                double even = 0, odd = 0;
#pragma GCC unroll 8
                for (int64_t j = 0; j < kSome; j += 2) {
                    even += by[j] * columns[j][k];
                    odd += by[j + 1] * columns[j + 1][k];
                }
                row[k] -= even + odd;
            }
        }
    }
    return true;
}

// The upper triangle of U [size, size] -> its inverse.
void invert(double* U, int64_t stride, int64_t size) {
    for (int64_t j = 0; j < size; ++j) {
        const double pivot = U[j * stride + j] = 1 / U[j * stride + j];
        for (int64_t i = 0; i < j; ++i) {
            double sum = 0;
            for (int64_t k = i; k < j; ++k) sum += U[i * stride + k] * U[k * stride + j];
            U[i * stride + j] = -sum * pivot;
        }
    }
}

// The factor S [kBlock, kBlock] that solve() multiplies by: for the kTile columns of each tile, below their corner
// -U^T, at their corner the transposed inverse of U's. U is used up.
void prepare_solve(float* S, double* U, int64_t size) {
    memset(S, 0, kBlock * kBlock * sizeof *S);
    for (int64_t c = 0; c < size; c += kTile) {
        const int64_t end = min_of(size, c + kTile);
        for (int64_t j = c; j < end; ++j)
            for (int64_t k = end; k < size; ++k) S[k * kBlock + j] = static_cast<float>(-U[j * kBlock + k]);
        invert(U + c * kBlock + c, kBlock, end - c);
        for (int64_t j = c; j < end; ++j)
            for (int64_t k = j; k < end; ++k) S[k * kBlock + j] = static_cast<float>(U[j * kBlock + k]);
    }
}

// X = left B, kSteps rows of kTile columns, row stride kBlock, over `depth` rows of B; left may hold X.
inline void replace_tile(float* X, const float* left, int64_t left_stride, const float* B, int64_t b_stride,
                         int64_t depth) {
    float result[kSteps * kTile] = {};
    multiply_add(result, kTile, B, b_stride, left, 1, left_stride, depth);
    for (int64_t s = 0; s < kSteps; ++s) memcpy(X + s * kBlock, result + s * kTile, kTile * sizeof *X);
}

// X [rows, size] (row stride kBlock) = X U^-T, back substitution by whole tiles.
void solve(float* X, const float* S, int64_t rows, int64_t size) {
    const int64_t end = round_up(size, kTile);
    for (int64_t c = end - kTile; c >= 0; c -= kTile)
        for (int64_t r = 0; r < rows; r += kSteps) {
            float* const own = X + r * kBlock + c;
            multiply_add(own, kBlock, S + (c + kTile) * kBlock + c, kBlock, own + kTile, 1, kBlock, end - c - kTile);
            replace_tile(own, own, kBlock, S + c * kBlock + c, kBlock, kTile);
        }
}

// `count` floats, zeros for those before `first`, which may lie outside: a row of an upper triangle.
inline void copy_from(float* to, const float* from, int64_t first, int64_t count) {
    const int64_t zeros = min_of(count, max_of<int64_t>(0, first));
    for (int64_t j = 0; j < zeros; ++j) to[j] = 0;
    copy(to + zeros, from + zeros, count - zeros);
}

// U [kBlock, kBlock], upper triangular in its first `size` rows and columns and zero elsewhere -> its inverse. A tile
// of columns after the other, from the first row down, those to its left being inverted.
void invert_corner(float* U, int64_t size) {
    double exact[kTile * kTile];
    for (int64_t c = 0; c < size; c += kTile) {
        const int64_t width = min_of(kTile, size - c);
        float minus[kTile * kTile] = {};
        for (int64_t i = 0; i < width; ++i)
            for (int64_t j = i; j < width; ++j) exact[i * kTile + j] = U[(c + i) * kBlock + c + j];
        invert(exact, kTile, width);
        for (int64_t i = 0; i < width; ++i)
            for (int64_t j = i; j < width; ++j)
                minus[i * kTile + j] = -(U[(c + i) * kBlock + c + j] = static_cast<float>(exact[i * kTile + j]));
        for (int64_t r = 0; r < c; r += kSteps) {
            float* const rows = U + r * kBlock;
            float sums[kSteps * kTile] = {};
            multiply_add(sums, kTile, rows + c, kBlock, rows + r, 1, kBlock, c - r);
            replace_tile(rows + c, sums, kTile, minus, kTile, width);
        }
    }
}

}  // namespace

rac::Status rac::RAC_ISA::factor(float* H, int64_t n, int64_t h_stride, int threads) {
    constexpr int64_t own = kRows * (kBlock + kDepth);
    Scratch<float> panel(n * kBlock), S(kBlock * kBlock), scratch(threads * own);
    Scratch<double> corner(kBlock * kBlock);
    if (!panel.data || !S.data || !scratch.data || !corner.data) return Status::no_memory;

    for (int64_t hi = n, lo; hi > 0; hi = lo) {
        lo = (hi - 1) / kBlock * kBlock;
        const int64_t width = hi - lo;
        // The block's own rows to its right, transposed, a tile of columns after the other.
        const int64_t done = n - hi;
        for_each_range(done, kDepth, threads, [&](int64_t begin, int64_t end) {
            for (int64_t j = 0; j < round_up(width, kTile); ++j) {
                const float* row = H + (lo + j) * h_stride + hi;
                float* column = panel.data + j / kTile * done * kTile + j % kTile;
                for (int64_t k = begin; k < end; ++k) column[k * kTile] = j < width ? row[k] : 0.0f;
            }
        });
        // C [kRows, kBlock] = rows first .. last of the block less the products of the columns to its right.
        const auto update = [&](int64_t first, int64_t last, float* C) {
            float* right = C + kRows * kBlock;
            memset(C, 0, round_up(last - first, kSteps) * kBlock * sizeof *C);
            for (int64_t k = 0; k < done; k += kDepth) {
                const int64_t depth = min_of(kDepth, done - k);
                for (int64_t i = first; i < last; ++i) {
                    const float* row = H + i * h_stride + hi + k;
                    copy(right + (i - first) * kDepth, row, depth);
                    for (int64_t ahead = kDepth; ahead < min_of(2 * kDepth, done - k);
                         ahead += kCacheLine / sizeof *row)
                        __builtin_prefetch(row + ahead, 0, 2);
                }
                for (int64_t c = 0; c < width; c += kTile)
                    for (int64_t r = 0; r < last - first; r += kSteps)
                        multiply_add(C + r * kBlock + c, kBlock, panel.data + c * done + k * kTile, kTile,
                                     right + r * kDepth, 1, kDepth, depth);
            }
            for (int64_t i = first; i < last; ++i)
                for (int64_t j = 0; j < width; ++j) {
                    float& c = C[(i - first) * kBlock + j];
                    c = H[i * h_stride + lo + j] - c;
                }
        };

        for_each_dynamic(ceil_div(width, kRows), threads, scratch.data, own, [&](int64_t task, float* C) {
            const int64_t first = lo + task * kRows, last = min_of(hi, first + kRows);
            update(first, last, C);
            for (int64_t i = first; i < last; ++i)
                for (int64_t j = i - lo; j < width; ++j)
                    corner.data[(i - lo) * kBlock + j] = C[(i - first) * kBlock + j];
        });
        if (!factor_corner(corner.data, width)) return Status::not_positive_definite;
        for (int64_t i = 0; i < width; ++i)
            for (int64_t j = i; j < width; ++j)
                H[(lo + i) * h_stride + lo + j] = static_cast<float>(corner.data[i * kBlock + j]);
        prepare_solve(S.data, corner.data, width);

        for_each_dynamic(ceil_div(lo, kRows), threads, scratch.data, own, [&](int64_t task, float* C) {
            const int64_t first = task * kRows, last = min_of(lo, first + kRows);
            update(first, last, C);
            solve(C, S.data, last - first, width);
            for (int64_t i = first; i < last; ++i) copy(H + i * h_stride + lo, C + (i - first) * kBlock, width);
        });
    }
    return Status::done;
}

rac::Status rac::RAC_ISA::inverse(float* U, int64_t n, int64_t u_stride, int threads) {
    constexpr int64_t own = (kBlock + kDepth) * kBlock;
    Scratch<float> panel(n * kBlock), corner(kBlock * kBlock), scratch(threads * own);
    if (!panel.data || !corner.data || !scratch.data) return Status::no_memory;

    // Rows begin .. end of `width` columns of U from `lo` on, zero below the diagonal and up to the next whole tile, a
    // tile of columns after the other, each `rows` long.
    const auto tiles = [&](float* to, int64_t rows, int64_t begin, int64_t end, int64_t lo, int64_t width) {
        for (int64_t c = 0; c < width; c += kTile, to += rows * kTile)
            for (int64_t k = begin; k < end; ++k) {
                const int64_t last = min_of(kTile, width - c);
                float* const row = to + (k - begin) * kTile;
                copy_from(row, U + k * u_stride + lo + c, k - lo - c, last);
                for (int64_t j = last; j < kTile; ++j) row[j] = 0;
            }
    };
    const auto pack = [&](int64_t rows, int64_t lo, int64_t width) {
        for_each_range(rows, kDepth, threads, [&](int64_t begin, int64_t end) {
            tiles(panel.data + begin * kTile, rows, begin, end, lo, width);
        });
    };

    // X = U^-1, from the first block of columns on: what is above the corner becomes -X U times the corner's inverse.
    for (int64_t lo = 0; lo < n; lo += kBlock) {
        const int64_t width = min_of(kBlock, n - lo);
        pack(lo, lo, width);
        memset(corner.data, 0, kBlock * kBlock * sizeof *corner.data);
        for (int64_t i = 0; i < width; ++i)
            copy(corner.data + i * kBlock + i, U + (lo + i) * u_stride + lo + i, width - i);
        invert_corner(corner.data, width);
        for (int64_t i = 0; i < width; ++i)
            copy(U + (lo + i) * u_stride + lo + i, corner.data + i * kBlock + i, width - i);
        for (int64_t i = 0; i < width * kBlock; ++i) corner.data[i] = -corner.data[i];
        for_each_dynamic(ceil_div(lo, kRows), threads, scratch.data, own, [&](int64_t task, float* C) {
            const int64_t first = task * kRows, last = min_of(lo, first + kRows);
            float* const left = C + kRows * kBlock;
            memset(C, 0, round_up(last - first, kSteps) * kBlock * sizeof *C);
            for (int64_t k = first; k < lo; k += kDepth) {
                const int64_t depth = min_of(kDepth, lo - k);
                for (int64_t i = first; i < last; ++i) {
                    copy_from(left + (i - first) * kDepth, U + i * u_stride + k, i - k, depth);
                }
                for (int64_t c = 0; c < width; c += kTile)
                    for (int64_t r = 0; r < last - first; r += kSteps)
                        multiply_add(C + r * kBlock + c, kBlock, panel.data + c * lo + k * kTile, kTile,
                                     left + r * kDepth, 1, kDepth, depth);
            }
            for (int64_t c = (width - 1) / kTile * kTile; c >= 0; c -= kTile)  // each takes what is left of it
                for (int64_t r = 0; r < last - first; r += kSteps)
                    replace_tile(C + r * kBlock + c, C + r * kBlock, kBlock, corner.data + c, kBlock, c + kTile);
            for (int64_t i = first; i < last; ++i) copy(U + i * u_stride + lo, C + (i - first) * kBlock, width);
        });
    }

    // X^T X, from the last block of rows up: each needs those above it.
    for (int64_t hi = n, lo; hi > 0; hi = lo) {
        lo = (hi - 1) / kBlock * kBlock;
        const int64_t height = hi - lo;
        pack(hi, lo, height);
        for_each_dynamic(ceil_div(n - lo, kBlock), threads, scratch.data, own, [&](int64_t task, float* C) {
            const int64_t first = lo + task * kBlock, width = min_of(kBlock, n - first);
            float* const right = C + kBlock * kBlock;
            memset(C, 0, round_up(height, kSteps) * kBlock * sizeof *C);
            for (int64_t k = 0; k < hi; k += kDepth) {
                const int64_t depth = min_of(kDepth, hi - k);
                tiles(right, depth, k, k + depth, first, width);
                for (int64_t c = 0; c < width; c += kTile)
                    for (int64_t r = 0; r < (task ? height : min_of(height, c + kTile)); r += kSteps)
                        multiply_add(C + r * kBlock + c, kBlock, right + c * depth, kTile,
                                     panel.data + r / kTile * hi * kTile + k * kTile + r % kTile, kTile, 1, depth);
            }
            for (int64_t i = 0; i < height; ++i) {
                const int64_t below = task ? 0 : i;
                copy(U + (lo + i) * u_stride + first + below, C + i * kBlock + below, width - below);
            }
        });
    }
    return Status::done;
}

rac::Status rac::RAC_ISA::mirror(float* H, int64_t n, int64_t h_stride, bool down, int threads) {
    constexpr int64_t kSide = 64;
    const int64_t side = ceil_div(n, kSide);
    bool finite = true;
    // Row by row of squares in the upper triangle.
    for_each_dynamic(side, threads, [&](int64_t a) {
        bool fine = true;
        for (int64_t b = a; b < side; ++b)
            for (int64_t i = a * kSide; i < min_of(n, (a + 1) * kSide); ++i)
                for (int64_t j = max_of(i, b * kSide); j < min_of(n, (b + 1) * kSide); ++j) {
                    float &upper = H[i * h_stride + j], &lower = H[j * h_stride + i];
                    const float x = down ? lower = upper : upper = lower;
                    fine &= x - x == 0;
                }
        if (!fine) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    return finite ? Status::done : Status::not_finite;
}
