// The left-looking SparseGPT sweep; rac_kernels/ops/sweep.py has the mathematics and a reference.
//
// Rows lie across the lanes of the vectors: W is cut into tiles of kTile rows, and a tile keeps its columns one after
// the other, kTile floats each. A tile starts as W and becomes D = W - Q block by block. Everything that costs
// rows * n^2, and most of what costs rows * n * block, is multiply_add on such tiles.
//
// With AVX512-BF16 and no AMX the product that costs rows * n^2 takes both factors rounded to bf16 where that is known
// to be cheap. D is what was really done, so an error in a product moves later weights once and is seen by all that
// follows: it adds its own square to the objective |D U|^2 and nothing else. Rounded to nearest, element (i, j) has a
// variance of kRounding * sum_k D_ik^2 U_kj^2, of which D's squares summed down the columns and U's summed along the
// rows of the block give the total over rows and columns exactly. Of the finished columns, kPanel at a time, those with
// the smallest totals go through bf16, as many as keep all that was ever added below kShare of the objective so far;
// the rest is fp32. Each row group has its own account, so it is pruned as it would be alone.
#include "cpu/select.h"
#include "cpu/tile.h"

// Not on processors that have AMX: their vectors multiply pairs of bf16 at two thirds of the speed of fp32.
#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)
#define RAC_MIXED
#endif

namespace {

constexpr int64_t kDepth = 128;  // columns of D multiplied at a time: a tile's 24 KiB stay in the first-level cache
constexpr int64_t kPanel = 256;  // columns of D that go through bf16, or not, as one
#if defined(RAC_MIXED)
constexpr bool kMixed = true;
#else
constexpr bool kMixed = false;
#endif
// Rounded to nearest, a factor is off by at most 2^-8 of the power of two below it; the mean square of that is at most
// 2^-16 / 3 of its own square. Measured for both factors together: 1.1 to 1.5 * 2^-18 where this says 2.7.
constexpr double kRounding = 2.0 / 3 / (1 << 16);
constexpr double kShare = 1e-4;
// Below this many weights a row group is fp32 throughout: rounding also tips near-ties between scores, which changes
// the objective by chance, up or down, and only over many rows does that average out.
constexpr int64_t kMany = 1 << 19;
constexpr int64_t kAhead = 16;          // rows of U fetched ahead
constexpr int32_t kNever = 0x7fffffff;  // above every score: what the rows that only fill up a tile have

struct Block {
    const float* U;  // its corner of U, row-major
    int64_t u_stride;
    // U[0:hi, lo:hi] as strips of kSteps columns, [strip][row][kSteps], zero on and below the diagonal
    const float* panel;
    int64_t lo, hi;
    const float* scale;  // U's diagonal and its inverse
    const float* inverse;
    int64_t width() const { return hi - lo; }
    const float* strip(int64_t j, int64_t row) const { return panel + (j / kSteps * hi + row) * kSteps; }
};

inline int64_t padded(int64_t width) { return round_up(width, kSteps); }

// F[strips from j0 to j1] += D[first .. first + count] U[first .. first + count, those columns]
inline void accumulate(const Block& block, float* F, const float* D, int64_t first, int64_t count, int64_t j0,
                       int64_t j1) {
    for (int64_t j = j0; j < j1; j += kSteps)
        multiply_add(F + j * kTile, kTile, D, kTile, block.strip(j, first), kSteps, 1, count);
}

#if defined(RAC_MIXED)
typedef uint32_t Word __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// Each element: bf16 of `low` in the lower half, of `high` in the upper one; to nearest even. Finite numbers only.
inline Word pair(Word low, Word high) {
    low += 0x7fff + (low >> 16 & 1);
    high += 0x7fff + (high >> 16 & 1);
    return low >> 16 | (high & 0xffff0000u);
}

// multiply_add from pairs of steps: A [pairs, kTile], B [pairs, kSteps].
inline void multiply_add_pairs(float* C, const uint32_t* A, const uint32_t* B, int64_t pairs) {
    __m512 sum[kSteps][kVectors] = {};
    for (int64_t k = 0; k < pairs; ++k, A += kTile, B += kSteps) {
        __m512bh a[kVectors];
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) a[v] = (__m512bh)_mm512_loadu_si512(A + v * kLanes);
        __builtin_prefetch(B + kPanel / 2 * kSteps);  // the strip after this one
#pragma GCC unroll 8
        for (int64_t s = 0; s < kSteps; ++s) {
            const __m512bh b = (__m512bh)_mm512_set1_epi32(static_cast<int>(B[s]));
#pragma GCC unroll 3
            for (int64_t v = 0; v < kVectors; ++v) sum[s][v] = _mm512_dpbf16_ps(sum[s][v], a[v], b);
        }
    }
#pragma GCC unroll 8
    for (int64_t s = 0; s < kSteps; ++s)
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) vec(C + s * kTile + v * kLanes) += (Vec)sum[s][v];
}

inline float sum(Vec v) {
    float total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += v[lane];
    return total;
}

// Rows first .. first + count of the block's columns of U as pairs of rows, in strips of kPanel / 2 pairs; squares
// [count, or one more]: each row's sum of squares.
void pack_pairs(uint32_t* to, float* squares, const float* U, int64_t u_stride, int64_t first, int64_t count,
                int64_t lo, int64_t width) {
    constexpr int64_t kStrip = kPanel / 2 * kSteps;
    for (int64_t k = 0; k < count; k += 2) {
        const float *row = U + (first + k) * u_stride + lo, *next = k + 1 < count ? row + u_stride : row;
        const __mmask16 both = k + 1 < count ? 0xffff : 0;
        // Rows lie on pages of their own, which no hardware foresees.
        for (int64_t j = 0; j < width; j += kCacheLine / 4) {
            __builtin_prefetch(row + kAhead * u_stride + j);
            __builtin_prefetch(next + kAhead * u_stride + j);
        }
        Vec low{}, high{};
        uint32_t* strip = to + k / 2 * kSteps;
        for (int64_t j = 0; j < width; j += kLanes, strip += kLanes / kSteps * kStrip) {
            const __mmask16 inside = width - j >= kLanes ? 0xffff : (1 << (width - j)) - 1;
            const Vec a = (Vec)_mm512_maskz_loadu_ps(inside, row + j);
            const Vec b = (Vec)_mm512_maskz_loadu_ps(inside & both, next + j);
            low += a * a;
            high += b * b;
            const __m512i words = (__m512i)pair((Word)a, (Word)b);
            _mm512_mask_storeu_epi32(strip, 0x00ff, words);
            if (width - j > kSteps) _mm512_mask_storeu_epi32(strip + kStrip - kSteps, 0xff00, words);
        }
        squares[k] = sum(low);
        squares[k + 1] = sum(high);
    }
}

// Columns lo .. hi of D as pairs; of a pair that only begins here the upper half is zero.
void round_pairs(uint32_t* pairs, const float* D, int64_t lo, int64_t hi) {
    for (int64_t k = lo / 2 * 2; k < hi; k += 2)
        for (int64_t v = 0; v < kTile; v += kLanes) {
            const Vec low = vec(D + k * kTile + v), high = k + 1 < hi ? vec(D + (k + 1) * kTile + v) : Vec{};
            *reinterpret_cast<Word*>(pairs + k / 2 * kTile + v) = pair((Word)low, (Word)high);
        }
}
#endif

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

// Weights that score below the bound go, and of those that equal it the first `budget` in each row.
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
        // -0.0 becomes +0.0.
        return vec(Q + j * kTile + v * kLanes) = masked(~goes, w) + 0.0f;
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

struct Tile { int64_t row, rows, group; };

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
                if (width == kLanes)
                    for (int64_t j = 0; j < kLanes; ++j) square[r * kLanes + j] = to_float(row[j]);
                else
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

#if defined(RAC_MIXED)
// The bf16 copies of D and U, the account of each row group, and which panels go through bf16.
class Rounded {
    const bool on;
    const int64_t count, n, widest, groups, panels;
    Scratch<uint32_t> D;                               // [tile][pair of columns][kTile]
    Scratch<uint32_t> U;                               // [panel][strip][pair][kSteps] of the block's columns
    Scratch<float> u_squares;                          // [n] of U's rows within the block
    Scratch<float> d_squares;                          // [group, n] of D's columns
    Scratch<float> tile_squares;                       // [tile, widest] of D's columns, in the last block
    Scratch<double> tile_objective, objective, added;  // [tile] in the last block; [group] so far, what rounding added
    Scratch<double> costs;                             // [group, panels] what rounding would add
    Scratch<uint8_t> chosen;                           // [group, panels]
    int64_t accounted = 0;                             // columns whose squares are in d_squares

    int64_t panel_size() const { return widest * (kPanel / 2); }

    void account(int64_t lo, const Tile* tiles) {
        for (int64_t t = 0; accounted < lo && t < count; ++t) {
            const int64_t g = tiles[t].group;
            objective.data[g] += tile_objective.data[t];
            for (int64_t k = accounted; k < lo; ++k)
                d_squares.data[g * n + k] += tile_squares.data[t * widest + k - accounted];
        }
        accounted = lo;
    }

   public:
    Rounded(bool on_, int64_t count_, int64_t n_, int64_t widest_, int64_t groups_)
        : on(on_),
          count(count_),
          n(n_),
          widest(widest_),
          groups(groups_),
          panels(ceil_div(n_, kPanel)),
          D(on ? count * ceil_div(n, 2) * kTile : 0),
          U(on ? panels * widest * (kPanel / 2) : 0),
          u_squares(on ? panels * kPanel : 0),
          d_squares(on ? groups * n : 0),
          tile_squares(on ? count * widest : 0),
          tile_objective(on ? count : 0),
          objective(on ? groups : 0),
          added(on ? groups : 0),
          costs(on ? groups * panels : 0),
          chosen(on ? groups * panels : 0) {
        if (!on || !ready()) return;
        memset(d_squares.data, 0, groups * n * sizeof *d_squares.data);
        for (int64_t g = 0; g < groups; ++g) objective.data[g] = added.data[g] = 0;
    }

    bool ready() const {
        return D.data && U.data && u_squares.data && d_squares.data && tile_squares.data && tile_objective.data &&
               objective.data && added.data && costs.data && chosen.data;
    }

    // Which panels of the columns before lo go through bf16 for the block lo .. hi, and the block's U for them.
    void choose(const float* from, int64_t u_stride, int64_t lo, int64_t hi, const Tile* tiles,
                const int64_t* row_groups, int threads) {
        if (!on) return;
        account(lo, tiles);
        const int64_t done = ceil_div(lo, kPanel);
        for_each_range(done, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                const int64_t first = p * kPanel, depth = min_of(kPanel, lo - first);
                pack_pairs(U.data + p * panel_size(), u_squares.data + first, from, u_stride, first, depth, lo,
                           hi - lo);
                for (int64_t g = 0; g < groups; ++g) {
                    double cost = 0;
                    for (int64_t k = first; k < first + depth; ++k)
                        cost += static_cast<double>(d_squares.data[g * n + k]) * u_squares.data[k];
                    costs.data[g * panels + p] = cost * kRounding;
                    chosen.data[g * panels + p] = false;
                }
            }
        });
        for (int64_t g = 0; g < groups; ++g) {
            const double* cost = costs.data + g * panels;
            uint8_t* is_chosen = chosen.data + g * panels;
            for (bool more = row_groups[g] * n >= kMany; more;) {
                int64_t least = -1;
                for (int64_t p = 0; p < done; ++p)  // a cost of 0 is one that fp32 cannot hold
                    if (!is_chosen[p] && cost[p] > 0 && (least < 0 || cost[p] < cost[least])) least = p;
                more = least >= 0 && added.data[g] + cost[least] <= kShare * objective.data[g];
                if (!more) break;
                added.data[g] += cost[least];
                is_chosen[least] = true;
            }
        }
    }

    // Whether some row group needs the panel in fp32.
    bool exact_for_some(int64_t p) const {
        for (int64_t g = 0; g < groups; ++g)
            if (!on || !chosen.data[g * panels + p]) return true;
        return false;
    }

    // F += D U over the first `depth` columns of a panel through bf16, if that was chosen for the tile's group.
    bool accumulate(float* F, int64_t t, int64_t g, int64_t p, int64_t depth, int64_t width) const {
        if (!on || !chosen.data[g * panels + p]) return false;
        const uint32_t* left = D.data + (t * ceil_div(n, 2) + p * (kPanel / 2)) * kTile;
        for (int64_t j = 0; j < width; j += kSteps)
            multiply_add_pairs(F + j * kTile, left, U.data + p * panel_size() + j * (kPanel / 2), ceil_div(depth, 2));
        return true;
    }

    // Takes note of a tile whose columns lo .. hi are done; F as walk left it, done: the tile's D.
    void add(int64_t t, const float* done, const float* F, const float* scale, int64_t lo, int64_t hi) {
        if (!on) return;
        round_pairs(D.data + t * ceil_div(n, 2) * kTile, done, lo, hi);
        Vec residual{};
        for (int64_t j = 0; j < hi - lo; ++j) {
            Vec square{};
            for (int64_t v = 0; v < kTile; v += kLanes) {
                const Vec d = vec(done + (lo + j) * kTile + v), r = vec(F + j * kTile + v) + d * scale[j];
                square += d * d;
                residual += r * r;
            }
            tile_squares.data[t * widest + j] = sum(square);
        }
        tile_objective.data[t] = sum(residual);
    }
};
#else
struct Rounded {
    Rounded(bool, int64_t, int64_t, int64_t, int64_t) {}
    bool ready() const { return true; }
    void choose(const float*, int64_t, int64_t, int64_t, const Tile*, const int64_t*, int) {}
    bool exact_for_some(int64_t) const { return true; }
    bool accumulate(float*, int64_t, int64_t, int64_t, int64_t, int64_t) const { return false; }
    void add(int64_t, const float*, const float*, const float*, int64_t, int64_t) {}
};
#endif

// How many of `count` weights go: the largest whole number whose share of them, as a double, is within the sparsity
// (rac_kernels.ops.pattern.zeros_of has the same rule).
inline int64_t zeros_of(double sparsity, int64_t count) {
    const double all = static_cast<double>(count);
    const int64_t k = min_of(max_of<int64_t>(static_cast<int64_t>(sparsity * all), 0), count);
    if (k < count && static_cast<double>(k + 1) / all <= sparsity) return k + 1;
    return k && static_cast<double>(k) / all > sparsity ? k - 1 : k;
}

}  // namespace

rac::Status rac::RAC_ISA::sweep(float* Q, const void* W, DType dtype, int64_t n, int64_t w_stride, const float* U,
                                int64_t u_stride, const uint8_t* dead, double sparsity, int64_t keep, int64_t group,
                                int64_t block_size, const int64_t* row_groups, int64_t row_group_count, int threads) {
    int64_t count = 0;
    bool mixed = false;  // whether any row group may use bf16
    for (int64_t g = 0; g < row_group_count; ++g) {
        count += ceil_div(row_groups[g], kTile);
        mixed = mixed || (kMixed && row_groups[g] * n >= kMany);
    }
    const int64_t widest = padded(min_of(block_size, n));
    int64_t step = kSteps;  // whole groups and whole strips
    while (group && step % group) step += kSteps;

    // A thread's own: F or a copy of it, D as if nothing went or Q, and the group's two buffers.
    const int64_t own = (2 * widest + 2 * group) * kTile;
    Scratch<Tile> tiles(count);
    Scratch<float> D(count * n * kTile), panel(n * widest), diagonal(2 * widest), scratch(threads * own);
    Scratch<float> pulls(group ? 0 : count * widest * kTile);
    Scratch<int32_t> scores(group ? 0 : count * widest * kTile), bounds(row_group_count),
        budget(group ? 0 : count * kTile);
    Scratch<int64_t> counts(select_scratch(threads));
    Scratch<int32_t> keys(group ? 0 : collect_scratch(count * widest * kTile, threads));
    if (!tiles.data || !D.data || !panel.data || !diagonal.data || !scratch.data || !pulls.data || !scores.data ||
        !bounds.data || !budget.data || !counts.data || !keys.data)
        return Status::no_memory;
    Rounded rounded(mixed, count, n, widest, row_group_count);
    if (!rounded.ready()) return Status::no_memory;

    for (int64_t g = 0, t = 0, row = 0; g < row_group_count; row += row_groups[g++])
        for (int64_t r = 0; r < row_groups[g]; r += kTile)
            tiles.data[t++] = Tile{row + r, min_of(kTile, row_groups[g] - r), g};

    int64_t rows = 0;
    for (int64_t g = 0; g < row_group_count; ++g) rows += row_groups[g];
    prefer_huge_pages(Q, rows * n * static_cast<int64_t>(sizeof *Q));

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
        rounded.choose(U, u_stride, lo, hi, tiles.data, row_groups, threads);
        for_each_range(ceil_div(lo, kPanel) + 1, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p)
                if (p * kPanel >= lo)
                    pack(panel.data, U, u_stride, lo, hi, lo, hi);
                else if (rounded.exact_for_some(p))
                    pack(panel.data, U, u_stride, lo, hi, p * kPanel, min_of(lo, (p + 1) * kPanel));
        });

        // What is done so far pulls at this block; then each tile for itself, or the scores first.
        const auto pull = [&](int64_t t, float* F) {
            const float* done = D.data + t * n * kTile;
            memset(F, 0, wide * kTile * sizeof *F);
            for (int64_t k = 0; k < lo; k += kDepth) {
                if (k % kPanel == 0 &&
                    rounded.accumulate(F, t, tiles.data[t].group, k / kPanel, min_of(kPanel, lo - k), width))
                    k += kPanel - kDepth;
                else
                    accumulate(block, F, done + k * kTile, k, min_of(kDepth, lo - k), 0, width);
            }
        };
        const auto finish = [&](int64_t t, const float* kept, const float* F) {
            store(Q + tiles.data[t].row * n + lo, n, kept, width, tiles.data[t].rows);
            rounded.add(t, D.data + t * n * kTile, F, scale, lo, hi);
        };
        if (group) {
            for_each_dynamic(count, threads, scratch.data, own, [&](int64_t t, float* F) {
                float *kept = F + widest * kTile, *ahead = kept + widest * kTile;
                float* W0 = D.data + (t * n + lo) * kTile;
                Groups rule{block, W0, keep, group, ahead, ahead + group * kTile, kept};
                pull(t, F);
                walk(block, W0, W0, F, step, rule);
                finish(t, kept, F);
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
            const int64_t k = zeros_of(sparsity, weights);
            const int32_t* from = scores.data + t * width * kTile;
            int32_t* left = budget.data + t * kTile;
            bounds.data[g] = -1;
            memset(left, 0, own_tiles * kTile * sizeof *left);
            if (k) {
                const Kth found =
                    kth_smallest_score(from, own_tiles * width * kTile, k, counts.data, keys.data, threads);
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
            Threshold rule{scores.data + t * width * kTile, bounds.data[tiles.data[t].group], budget.data + t * kTile,
                           kept};
            float* F = pulls.data + t * widest * kTile;
            walk(block, W0, W0, F, step, rule);
            finish(t, kept, F);
        });
    }
    return Status::done;
}
