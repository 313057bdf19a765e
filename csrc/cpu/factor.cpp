// H = U U^T in place; kernels/rac_kernels/factor.py has the mathematics and a reference.
//
// Left-looking, from the last block of columns to the first. A block's rows are taken kRows at a time into scratch, where
// the products of the columns to its right come off and the block's corner is solved for, both by multiply_add with the
// block's columns across the lanes.
#include "cpu/tile.h"

namespace {

constexpr int64_t kBlock = 144;  // columns a block
constexpr int64_t kRows = 96;    // rows a task
constexpr int64_t kDepth = 128;  // columns to the right multiplied at a time
static_assert(kBlock % kTile == 0 && kRows % kSteps == 0, "only whole tiles are multiplied");

// The upper triangle of C [size, size] (row stride kBlock) -> U with C = U U^T. False: not positive definite.
bool factor_corner(double* C, int64_t size) {
    double column[kBlock];
    for (int64_t j = size - 1; j >= 0; --j) {
        const double pivot = C[j * kBlock + j];
        if (!(pivot > 0)) return false;  // NaN too
        const double root = __builtin_sqrt(pivot);
        C[j * kBlock + j] = root;
        for (int64_t i = 0; i < j; ++i) column[i] = C[i * kBlock + j] /= root;
        for (int64_t i = 0; i < j; ++i)
            for (int64_t k = i; k < j; ++k) C[i * kBlock + k] -= column[i] * column[k];
    }
    return true;
}

// The upper triangle of U [size, size] (row stride kBlock) -> its inverse.
void invert(double* U, int64_t size) {
    for (int64_t j = 0; j < size; ++j) {
        const double pivot = U[j * kBlock + j] = 1 / U[j * kBlock + j];
        for (int64_t i = 0; i < j; ++i) {
            double sum = 0;
            for (int64_t k = i; k < j; ++k) sum += U[i * kBlock + k] * U[k * kBlock + j];
            U[i * kBlock + j] = -sum * pivot;
        }
    }
}

// What solve() multiplies by, S [kBlock, kBlock]: for the kTile columns of each tile, below their corner -U^T, at their
// corner the transposed inverse of U's. U is used up.
void prepare_solve(float* S, double* U, int64_t size) {
    memset(S, 0, kBlock * kBlock * sizeof *S);
    for (int64_t c = 0; c < size; c += kTile) {
        const int64_t end = min_of(size, c + kTile);
        for (int64_t j = c; j < end; ++j)
            for (int64_t k = end; k < size; ++k) S[k * kBlock + j] = static_cast<float>(-U[j * kBlock + k]);
        invert(U + c * kBlock + c, end - c);
        for (int64_t j = c; j < end; ++j)
            for (int64_t k = j; k < end; ++k) S[k * kBlock + j] = static_cast<float>(U[j * kBlock + k]);
    }
}

// X [kRows, kBlock] = X U^-T, back substitution by tiles.
void solve(float* X, const float* S) {
    for (int64_t c = kBlock - kTile; c >= 0; c -= kTile)
        for (int64_t r = 0; r < kRows; r += kSteps) {
            float* rows = X + r * kBlock;
            multiply_add(rows + c, kBlock, S + (c + kTile) * kBlock + c, kBlock, rows + c + kTile, 1, kBlock,
                         kBlock - c - kTile);
            float result[kSteps * kTile] = {};
            multiply_add(result, kTile, S + c * kBlock + c, kBlock, rows + c, 1, kBlock, kTile);
            for (int64_t s = 0; s < kSteps; ++s) memcpy(rows + s * kBlock + c, result + s * kTile, kTile * sizeof *rows);
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
            memset(C, 0, own * sizeof *C);
            for (int64_t k = 0; k < done; k += kDepth) {
                const int64_t depth = min_of(kDepth, done - k);
                for (int64_t i = first; i < last; ++i) {
                    const float* row = H + i * h_stride + hi + k;
                    copy(right + (i - first) * kDepth, row, depth);
                    for (int64_t ahead = kDepth; ahead < min_of(2 * kDepth, done - k); ahead += kCacheLine / sizeof *row)
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
            solve(C, S.data);
            for (int64_t i = first; i < last; ++i)
                copy(H + i * h_stride + lo, C + (i - first) * kBlock, width);
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
