// The left-looking SparseGPT sweep; kernels/rac_kernels/sweep.py has the mathematics and a reference.
//
// Rows lie across the lanes of the vectors: W is cut into tiles of kTile rows, and a tile keeps its columns one after the
// other, kTile floats each. A tile starts as W and becomes D = W - Q block by block. Everything that costs rows * n^2, and
// most of what costs rows * n * block, is multiply_add on such tiles.
#include "cpu/select.h"
#include "cpu/tile.h"

namespace {

constexpr int64_t kDepth = 128;  // columns of D multiplied at a time: a tile's share (24 KiB) stays in the first-level cache
constexpr int32_t kNever = 0x7fffffff;  // above every score: what the rows that only fill up a tile have

struct Block {
    const float* U;       // its corner of U, row-major
    int64_t u_stride;
    const float* panel;   // U[0:hi, lo:hi] as strips of kSteps columns, [strip][row][kSteps], zero on and below the diagonal
    int64_t lo, hi;
    const float* scale;   // U's diagonal and its inverse
    const float* inverse;
    int64_t width() const { return hi - lo; }
    const float* strip(int64_t j, int64_t row) const { return panel + (j / kSteps * hi + row) * kSteps; }
};

inline int64_t padded(int64_t width) { return round_up(width, kSteps); }

// F[strips from j0 to j1] += D[first .. first + count] U[first .. first + count, those columns]
inline void accumulate(const Block& block, float* F, const float* D, int64_t first, int64_t count, int64_t j0, int64_t j1) {
    for (int64_t j = j0; j < j1; j += kSteps)
        multiply_add(F + j * kTile, kTile, D, kTile, block.strip(j, first), kSteps, 1, count);
}

// Walk the block's columns in order. F [width, kTile] holds D U of the columns before the block and is used up.
// rule.begin(j, F) is called before each column, rule(j, v, w) says what weight stays of w. W and D may be one.
template <class Rule>
void walk(const Block& block, const float* W, float* D, float* F, int64_t step, Rule& rule) {
    for (int64_t j0 = 0; j0 < block.width(); j0 += step) {
        const int64_t j1 = min_of(j0 + step, block.width());
        accumulate(block, F, D, block.lo, j0, j0, j1);
        for (int64_t j = j0; j < j1; ++j) {
            rule.begin(j, F);
            const float* u = block.U + j * block.u_stride;
            for (int64_t v = 0; v < kVectors; ++v) {
                const int64_t at = j * kTile + v * kLanes;
                const Vec before = vec(W + at);
                const Vec d = before - rule(j, v, before + vec(F + at) * block.inverse[j]);
                vec(D + at) = d;
                for (int64_t i = j + 1; i < j1; ++i) vec(F + i * kTile + v * kLanes) += d * u[i];
            }
        }
    }
}

inline Vec masked(IntVec keep, Vec w) { return (Vec)((IntVec)w & keep); }
inline Vec magnitude(Vec w) { return (Vec)((IntVec)w & 0x7fffffff); }

// Nothing goes; the scores are written down.
struct Score {
    int32_t* scores;
    const float* scale;
    void begin(int64_t, const float*) {}
    Vec operator()(int64_t j, int64_t v, Vec w) {
        int_vec(scores + j * kTile + v * kLanes) = (IntVec)(magnitude(w) * scale[j]);
        return w;
    }
};

// What scores below the bound goes, and of what equals it the first `budget` in each row.
struct Threshold {
    const int32_t* scores;
    int32_t bound;
    int32_t* budget;  // [kTile], used up
    float* Q;
    void begin(int64_t, const float*) {}
    Vec operator()(int64_t j, int64_t v, Vec w) {
        const IntVec score = int_vec(scores + j * kTile + v * kLanes);
        IntVec& left = int_vec(budget + v * kLanes);
        const IntVec equal = score == bound;
        const IntVec goes = (score < bound) | (equal & (left > 0));
        left += equal;  // true is -1
        return vec(Q + j * kTile + v * kLanes) = masked(~goes, w) + 0.0f;  // -0.0 becomes +0.0
    }
};

// In each group of `group` columns the `keep` highest scores stay; among equal ones the leftmost goes first.
struct Groups {
    const Block& block;
    const float* W;
    int64_t keep, group;
    float* ahead;   // [group, kTile] scratch: F within the group as if nothing went
    float* scores;  // [group, kTile] scratch
    float* Q;

    void begin(int64_t j0, const float* F) {
        if (j0 % group) return;
        memcpy(ahead, F + j0 * kTile, group * kTile * sizeof *ahead);
        for (int64_t v = 0; v < kVectors; ++v) {
            for (int64_t c = 0; c < group; ++c) {
                const int64_t at = c * kTile + v * kLanes, j = j0 + c;
                const Vec pull = vec(ahead + at) * block.inverse[j];
                const float* u = block.U + j * block.u_stride + j0;
                for (int64_t i = c + 1; i < group; ++i) vec(ahead + i * kTile + v * kLanes) -= pull * u[i];
                vec(scores + at) = magnitude(vec(W + j * kTile + v * kLanes) + pull) * block.scale[j];
            }
        }
    }
    Vec operator()(int64_t j, int64_t v, Vec w) {
        const int64_t c = j % group;
        const Vec mine = vec(scores + c * kTile + v * kLanes);
        IntVec beaten{};  // minus the number of columns that go before this one
        for (int64_t i = 0; i < c; ++i) beaten += vec(scores + i * kTile + v * kLanes) <= mine;
        for (int64_t i = c + 1; i < group; ++i) beaten += vec(scores + i * kTile + v * kLanes) < mine;
        const IntVec stays = beaten <= static_cast<int32_t>(keep - group);
        return vec(Q + j * kTile + v * kLanes) = masked(stays, w) + 0.0f;
    }
};

struct Tile {
    int64_t row, rows, group;
};

// Rows of W into a tile, dead columns as zeros. False: NaN or infinity.
template <class T>
bool load(float* D, const T* W, int64_t w_stride, int64_t n, const Tile& tile, const uint8_t* dead) {
    IntVec wrong{};
    for (int64_t j0 = 0; j0 < n; j0 += kLanes)
        for (int64_t r0 = 0; r0 < kTile; r0 += kLanes) {
            const int64_t width = min_of(kLanes, n - j0), rows = min_of(kLanes, tile.rows - r0);
            float square[kLanes * kLanes] = {};
            for (int64_t r = 0; r < rows; ++r) {
                const T* row = W + (tile.row + r0 + r) * w_stride + j0;
                for (int64_t j = 0; j < width; ++j) square[r * kLanes + j] = to_float(row[j]);
            }
            for (int64_t j = 0; j < width; ++j) {
                Vec column;
                for (int64_t r = 0; r < kLanes; ++r) column[r] = square[r * kLanes + j];
                wrong |= column - column != 0.0f;
                vec(D + (j0 + j) * kTile + r0) = dead && dead[j0 + j] ? Vec{} : column;
            }
        }
    for (int64_t lane = 0; lane < kLanes; ++lane)
        if (wrong[lane]) return false;
    return true;
}

// The tile's `width` columns into rows of Q.
void store(float* Q, int64_t n, const float* tile, int64_t width, int64_t rows) {
    for (int64_t j0 = 0; j0 < width; j0 += kLanes)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = j0; j < min_of(width, j0 + kLanes); ++j) Q[r * n + j] = tile[j * kTile + r];
}

// Rows 0 .. hi of the block's columns of U as strips.
void pack(float* panel, const float* U, int64_t u_stride, int64_t lo, int64_t hi, int64_t begin, int64_t end) {
    const int64_t width = hi - lo;
    for (int64_t k = begin; k < end; ++k) {
        const float* row = U + k * u_stride + lo;
        const int64_t first = max_of<int64_t>(0, k - lo + 1);  // on and below the diagonal: zeros
        for (int64_t j0 = 0; j0 < width; j0 += kSteps) {
            float* strip = panel + (j0 / kSteps * hi + k) * kSteps;
            if (first <= j0 && j0 + kSteps <= width)
                for (int64_t s = 0; s < kSteps; ++s) strip[s] = row[j0 + s];
            else
                for (int64_t s = 0; s < kSteps; ++s) strip[s] = j0 + s >= first && j0 + s < width ? row[j0 + s] : 0.0f;
        }
    }
}

// The first `ties` elements equal to `bound`, in row-major order, as a number for each row of the group's tiles.
void spread_ties(const int32_t* scores, const Tile* tiles, int64_t count, int64_t width, int32_t bound, int64_t ties,
                 int32_t* budget) {
    for (int64_t t = 0; t < count; ++t) {
        int32_t* equal = budget + t * kTile;
        memset(equal, 0, kTile * sizeof *equal);
        for (int64_t j = 0; j < width; ++j)
            for (int64_t r = 0; r < kTile; ++r) equal[r] += scores[(t * width + j) * kTile + r] == bound;
        for (int64_t r = 0; r < tiles[t].rows; ++r) {
            equal[r] = static_cast<int32_t>(min_of<int64_t>(equal[r], ties));
            ties -= equal[r];
        }
    }
}

}  // namespace

rac::Status rac::RAC_ISA::sweep(float* Q, const void* W, DType dtype, int64_t n, int64_t w_stride, const float* U, int64_t u_stride,
                        const uint8_t* dead, double sparsity, int64_t keep, int64_t group, int64_t block_size,
                        const int64_t* row_groups, int64_t row_group_count, int threads) {
    int64_t count = 0;
    for (int64_t g = 0; g < row_group_count; ++g) count += ceil_div(row_groups[g], kTile);
    const int64_t widest = padded(min_of(block_size, n));
    int64_t step = kSteps;  // whole groups and whole strips
    while (group && step % group) step += kSteps;

    // A thread's own: F or a copy of it, D as if nothing went or Q, and the group's two buffers.
    const int64_t own = (2 * widest + 2 * group) * kTile;
    Scratch<Tile> tiles(count);
    Scratch<float> D(count * n * kTile), panel(n * widest), diagonal(2 * widest), scratch(threads * own);
    Scratch<float> pulls(group ? 0 : count * widest * kTile);
    Scratch<int32_t> scores(group ? 0 : count * widest * kTile), bounds(row_group_count), budget(group ? 0 : count * kTile);
    Scratch<int64_t> counts(select_scratch(threads));
    if (!tiles.data || !D.data || !panel.data || !diagonal.data || !scratch.data || !pulls.data || !scores.data ||
        !bounds.data || !budget.data || !counts.data)
        return Status::no_memory;

    for (int64_t g = 0, t = 0, row = 0; g < row_group_count; row += row_groups[g++])
        for (int64_t r = 0; r < row_groups[g]; r += kTile)
            tiles.data[t++] = Tile{row + r, min_of(kTile, row_groups[g] - r), g};

    bool finite = true;
    for_each_dynamic(count, threads, [&](int64_t t) {
        with_dtype(dtype, [&](auto zero) {
            if (!load(D.data + t * n * kTile, static_cast<const decltype(zero)*>(W), w_stride, n, tiles.data[t], dead))
                __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
        });
    });
    if (!finite) return Status::not_finite;

    for (int64_t lo = 0; lo < n; lo += block_size) {
        const int64_t hi = min_of(n, lo + block_size), width = hi - lo, wide = padded(width);
        float *scale = diagonal.data, *inverse = diagonal.data + widest;
        for (int64_t j = 0; j < width; ++j) {
            scale[j] = U[(lo + j) * u_stride + lo + j];
            inverse[j] = 1 / scale[j];
        }
        const Block block{U + lo * u_stride + lo, u_stride, panel.data, lo, hi, scale, inverse};
        for_each_range(hi, kDepth, threads, [&](int64_t begin, int64_t end) {
            pack(panel.data, U, u_stride, lo, hi, begin, end);
        });

        // What is done so far pulls at this block; then each tile for itself, or the scores first.
        const auto pull = [&](int64_t t, float* F) {
            const float* done = D.data + t * n * kTile;
            memset(F, 0, wide * kTile * sizeof *F);
            for (int64_t k = 0; k < lo; k += kDepth)
                accumulate(block, F, done + k * kTile, k, min_of(kDepth, lo - k), 0, width);
        };
        if (group) {
            for_each_dynamic(count, threads, scratch.data, own, [&](int64_t t, float* F) {
                float *kept = F + widest * kTile, *ahead = kept + widest * kTile;
                float* W0 = D.data + (t * n + lo) * kTile;
                Groups rule{block, W0, keep, group, ahead, ahead + group * kTile, kept};
                pull(t, F);
                walk(block, W0, W0, F, step, rule);
                store(Q + tiles.data[t].row * n + lo, n, kept, width, tiles.data[t].rows);
            });
            continue;
        }
        for_each_dynamic(count, threads, scratch.data, own, [&](int64_t t, float* F) {
            float *pulled = pulls.data + t * widest * kTile, *ahead = F + widest * kTile;
            int32_t* mine = scores.data + t * width * kTile;
            Score rule{mine, scale};
            pull(t, pulled);
            memcpy(F, pulled, wide * kTile * sizeof *F);
            walk(block, D.data + (t * n + lo) * kTile, ahead, F, step, rule);
            for (int64_t r = tiles.data[t].rows; r < kTile; ++r)
                for (int64_t j = 0; j < width; ++j) mine[j * kTile + r] = kNever;
        });
        for (int64_t g = 0, t = 0; g < row_group_count; ++g) {
            const int64_t own_tiles = ceil_div(row_groups[g], kTile), weights = row_groups[g] * width;
            const int64_t k = static_cast<int64_t>(sparsity * static_cast<double>(weights));
            const int32_t* from = scores.data + t * width * kTile;
            int32_t* left = budget.data + t * kTile;
            bounds.data[g] = -1;
            memset(left, 0, own_tiles * kTile * sizeof *left);
            if (k) {
                const Kth found = kth_smallest_key(own_tiles * width * kTile, k, counts.data, threads,
                                                   [&](int64_t i) { return static_cast<uint32_t>(from[i]); });
                bounds.data[g] = static_cast<int32_t>(found.key);
                if (found.below + found.equal > k)
                    spread_ties(from, tiles.data + t, own_tiles, width, bounds.data[g], k - found.below, left);
                else
                    for (int64_t i = 0; i < own_tiles * kTile; ++i) left[i] = kNever;
            }
            t += own_tiles;
        }
        for_each_dynamic(count, threads, scratch.data, own, [&](int64_t t, float* kept) {
            float* W0 = D.data + (t * n + lo) * kTile;
            Threshold rule{scores.data + t * width * kTile, bounds.data[tiles.data[t].group], budget.data + t * kTile, kept};
            walk(block, W0, W0, pulls.data + t * widest * kTile, step, rule);
            store(Q + tiles.data[t].row * n + lo, n, kept, width, tiles.data[t].rows);
        });
    }
    return Status::done;
}
