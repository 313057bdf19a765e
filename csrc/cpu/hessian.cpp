// The upper triangle of H += X^T diag(w) X, and all of C += X^T diag(w) Y: packed, cache-blocked rank-k updates.
//
// Tokens are taken in chunks. A chunk is packed into panels of columns, step after step, where a step is one token in
// fp32 or, with AVX512-BF16, a pair of tokens side by side as VDPBF16PS wants them; either way an element is four
// bytes. The Hessian's operands are the same panels, so one packing serves both; AMX wants its left operand transposed
// block by block, and gets a copy. The result is cut into macro tiles of 288 x 288; one stays in the second-level
// cache, beside the parts of panels it needs, while runs of steps are summed in registers, micro tile by micro tile.
// Short runs are no loss, and a gain in accuracy: fp32 sums of squares of 8-bit mantissas meet ties that all round one
// way, and the error grows with the length of the chain. Every element of H is summed in the same order whatever the
// number of threads.
//
// VDPBF16PS and TDPBF16PS take products of bf16 numbers exactly, round sums to nearest even and treat subnormal inputs
// and results as zero, so activations below 1.2e-38 count as nothing there.
#include "cpu/amx.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kVectors = 3;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8, kVectors = 3;
#else
constexpr int kLanes = 4, kRows = 4, kVectors = 2;
#endif
constexpr int kRun = 128;             // steps summed in registers
constexpr int kMacro = 288;           // columns along a macro tile's side
constexpr int64_t kPacked = 8 << 20;  // bytes of panels packed at a time, or one run's: a share of the last-level cache

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector load(const float* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline Vector broadcast(const float* p) {  // of the bits: a pair of bf16 is no float
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    return (Vector)(bits + Bits{});
}

// Which rows of X count, and by how much: all of them, or those in `kept` scaled by the root of their weights.
template <class T>
struct Tokens {
    const T* X;
    int64_t row_stride, column_stride, count;
    const int64_t* kept;
    const float* weights;

    const T* row(int64_t t) const { return X + (kept ? kept[t] : t) * row_stride; }
    float scale(int64_t t) const { return weights ? __builtin_sqrtf(weights[kept[t]]) : 1.0f; }
};

// One token a step, in fp32.
struct Singles {
    static constexpr int kTokens = 1, kSteps = 1;     // tokens in a step; steps come in multiples of this
    static constexpr int kPanel = kLanes * kVectors;  // columns in a panel; a multiple of kRows
    static constexpr bool kTurned = false;            // whether the left operand has a layout of its own

    static Vector multiply_add(Vector sum, Vector a, Vector b) { return sum + a * b; }

    template <class T, class Stride>
    static void pack(float* to, const Tokens<T>& tokens, int64_t step, int64_t column, int64_t width, Stride stride) {
        const T* row = tokens.row(step) + column * stride();
        const float scale = tokens.scale(step);
        for (int64_t j = 0; j < width; ++j) to[j] = scale * to_float(row[j * stride()]);
    }
};

#if defined(__AVX512BF16__)
// Two tokens a step, in bf16, the earlier one in the lower half. Weights must be 1.
struct Pairs : Singles {
    static constexpr int kTokens = 2;

    static Vector multiply_add(Vector sum, Vector a, Vector b) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }

    template <class Stride>
    static void pack(float* to, const Tokens<bf16>& tokens, int64_t step, int64_t column, int64_t width,
                     Stride stride) {
        const bf16* low = tokens.row(2 * step) + column * stride();
        const bool odd = 2 * step + 1 == tokens.count;  // the last step of an odd count: the low half times nothing
        const bf16* high = odd ? low : tokens.row(2 * step + 1) + column * stride();
        const uint32_t mask = odd ? 0 : 0xffff0000u;
        for (int64_t j = 0; j < width; ++j) {
            const uint32_t pair =
                low[j * stride()].bits | (static_cast<uint32_t>(high[j * stride()].bits) << 16 & mask);
            memcpy(to + j, &pair, sizeof pair);
        }
    }
};
#endif

#if defined(__AMX_BF16__)
// The same in tiles, two by two of them at once; the left operand is transposed tile by tile. Within a tile pairs are
// summed apart from what was there before, so sums are more exact than those of Pairs.
struct TilePairs : Pairs {
    static constexpr int kSteps = kTileRows;
    static constexpr int kPanel = 2 * kTileRows;
    static constexpr bool kTurned = true;

    static void turn(float* left, const float* right, int64_t steps) {
        for (int64_t s = 0; s < steps; s += kSteps, left += kSteps * kPanel, right += kSteps * kPanel) {
            float tiles[2 * kTileWords];  // left may be right
            transpose_tile(tiles, right, kPanel);
            transpose_tile(tiles + kTileWords, right + kTileRows, kPanel);
            memcpy(left, tiles, sizeof tiles);
        }
    }

    static void products(float (*sums)[kPanel], const float* left, const float* right, int64_t steps) {
        constexpr int kBytes = kPanel * sizeof(float);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t s = 0; s < steps; s += kSteps, left += kSteps * kPanel, right += kSteps * kPanel) {
            _tile_loadd(4, left, kBytes / 2);
            _tile_loadd(6, right, kBytes);
            _tile_loadd(7, right + kTileRows, kBytes);
            _tile_loadd(5, left + kTileWords, kBytes / 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, kBytes);
        _tile_stored(1, *sums + kTileRows, kBytes);
        _tile_stored(2, sums + kTileRows, kBytes);
        _tile_stored(3, sums[kTileRows] + kTileRows, kBytes);
    }
};
using BestPairs = TilePairs;
#elif defined(__AVX512BF16__)
using BestPairs = Pairs;
#endif

// Column strides; one known to be 1 lets the compiler vectorise.
struct UnitStride {
    int64_t operator()() const { return 1; }
};
struct AnyStride {
    int64_t value;
    int64_t operator()() const { return value; }
};

// Pack `steps` steps from `first_step` on of one panel's columns; columns past n and steps past the last token become
// zeros.
template <class Dot, class T, class Stride>
void pack_panel(float* to, const Tokens<T>& tokens, int64_t first_step, int64_t steps, int64_t column, int64_t n,
                Stride stride) {
    constexpr int64_t kPanel = Dot::kPanel;
    const int64_t width = min_of(kPanel, n - column);
    const int64_t end = max_of<int64_t>(0, min_of(steps, ceil_div(tokens.count, Dot::kTokens) - first_step));
    for (int64_t s = 0; s < end; ++s, to += kPanel) {
        Dot::pack(to, tokens, first_step + s, column, width, stride);
        if (width < kPanel) memset(to + width, 0, (kPanel - width) * sizeof(float));
    }
    if (end < steps) memset(to, 0, (steps - end) * kPanel * sizeof(float));
}

// Sums of kRows x (Count * kLanes) products over all steps: C += a^T b. `Whole` micro tiles are added as vectors; of
// the others only what lies on or above the diagonal, in `rows` rows and `columns` columns; C[0, 0] is `below` under
// it.
template <class Dot, int Count>
void micro_tile(const float* a, const float* b, int64_t steps, float* C, int64_t h_stride, bool whole, int64_t rows,
                int64_t columns, int64_t below) {
    Vector sums[kRows][Count] = {};
    for (int64_t i = 0; i < min_of<int64_t>(kRows, rows); ++i)
        for (int v = 0; v < Count; ++v) __builtin_prefetch(C + i * h_stride + v * kLanes, 1);
    for (int64_t s = 0; s < steps; ++s, a += Dot::kPanel, b += Dot::kPanel) {
        Vector right[Count];
        for (int v = 0; v < Count; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const Vector left = broadcast(a + i);
#pragma GCC unroll 3
            for (int v = 0; v < Count; ++v) sums[i][v] = Dot::multiply_add(sums[i][v], left, right[v]);
        }
    }
    if (whole) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < Count; ++v) {
                float* const to = C + i * h_stride + v * kLanes;
                const Vector sum = load(to) + sums[i][v];
                memcpy(to, &sum, sizeof sum);
            }
        return;
    }
    float values[kRows][Count * kLanes];
    memcpy(values, sums, sizeof values);
    for (int64_t i = 0; i < min_of<int64_t>(kRows, rows); ++i)
        for (int64_t j = max_of<int64_t>(0, i + below); j < columns; ++j) C[i * h_stride + j] += values[i][j];
}

// C [rows, columns], of which no more than a panel's count, += a^T b over all steps; of a `diagonal` one only what lies
// on or above its diagonal.
template <class Dot>
void panel_pair(float* C, int64_t c_stride, const float* a, const float* b, int64_t steps, int64_t rows,
                int64_t columns, bool diagonal) {
    constexpr int64_t kPanel = Dot::kPanel;
#if defined(__AMX_BF16__)
    if constexpr (Dot::kTurned) {
        alignas(kCacheLine) float sums[kPanel][kPanel];
        Dot::products(sums, a, b, steps);
        const int64_t height = min_of(rows, kPanel), width = min_of(columns, kPanel);
        if (!diagonal && width == kPanel) {
            for (int64_t i = 0; i < height; ++i, C += c_stride)
                for (int64_t j = 0; j < kPanel; ++j) C[j] += sums[i][j];
        } else {
            for (int64_t i = 0; i < height; ++i, C += c_stride)
                for (int64_t j = diagonal ? i : 0; j < width; ++j) C[j] += sums[i][j];
        }
        return;
    }
#endif
    for (int r = 0; r < min_of(rows, kPanel); r += kRows) {
        const int skipped = diagonal ? r / kLanes : 0;  // vectors wholly to the left of the diagonal
        const int64_t column = skipped * kLanes, width = min_of(columns, kPanel) - column;
        if (width <= 0) break;
        const bool whole = !diagonal && rows - r >= kRows && width == kPanel;
        const decltype(&micro_tile<Dot, kVectors>) run = skipped == 0   ? micro_tile<Dot, kVectors>
                                                         : skipped == 1 ? micro_tile<Dot, kVectors - 1>
                                                                        : micro_tile<Dot, max_of(kVectors - 2, 1)>;
        run(a + r, b + column, steps, C + r * c_stride + column, c_stride, whole, rows - r, width,
            diagonal ? r - column : -kRows);
    }
}

// Pack `steps` steps from `first` on of all the panels that n columns make, run by run; for left operands that differ,
// into `left`, which may be `to`, unless it is null.
template <class Dot, class T>
void pack(float* to, [[maybe_unused]] float* left, const Tokens<T>& tokens, int64_t first, int64_t steps, int64_t n,
          int threads) {
    constexpr int64_t kPanel = Dot::kPanel, kBlock = 16, kGroup = 16;  // steps, panels
    const int64_t panels = ceil_div(n, kPanel), groups = ceil_div(panels, kGroup);
    for_each_dynamic(ceil_div(steps, kRun) * groups, threads, [&](int64_t item) {
        const int64_t run = item / groups * kRun, length = min_of<int64_t>(kRun, steps - run);
        const int64_t begin = item % groups * kGroup, end = min_of(panels, begin + kGroup);
        for (int64_t s = 0; s < length; s += kBlock)
            for (int64_t p = begin; p < end; ++p) {
                const int64_t count = min_of(kBlock, length - s);
                float* const own = to + (run * panels + p * length + s) * kPanel;
                if (tokens.column_stride == 1)
                    pack_panel<Dot>(own, tokens, first + run + s, count, p * kPanel, n, UnitStride{});
                else
                    pack_panel<Dot>(own, tokens, first + run + s, count, p * kPanel, n,
                                    AnyStride{tokens.column_stride});
                if constexpr (Dot::kTurned)
                    if (left) Dot::turn(left + (own - to), own, count);
            }
    });
}

template <class Dot>
int64_t steps_of(int64_t tokens) {
    return round_up(ceil_div(tokens, Dot::kTokens), Dot::kSteps);
}

// How many steps to pack at a time when that many columns are packed: whole runs, in equal shares.
inline int64_t chunk_steps(int64_t all_steps, int64_t columns) {
    const int64_t runs = ceil_div(all_steps, kRun), run_bytes = columns * kRun * sizeof(float);
    return min_of(all_steps, ceil_div(runs, ceil_div(runs * run_bytes, kPacked)) * kRun);
}

template <class Dot, class T>
Status accumulate(float* H, int64_t h_stride, int64_t n, const Tokens<T>& tokens, int threads) {
    if (n == 0 || tokens.count == 0) return Status::done;
    constexpr int64_t kPanel = Dot::kPanel;
    const int64_t all_steps = steps_of<Dot>(tokens.count), panels = ceil_div(n, kPanel);
    const int64_t chunk = chunk_steps(all_steps, panels * kPanel * (Dot::kTurned ? 2 : 1));
    const Scratch<float> packed(panels * chunk * kPanel), turned(Dot::kTurned ? panels * chunk * kPanel : 0);
    if (!packed.data || !turned.data) return Status::no_memory;
    const float* const left = Dot::kTurned ? turned.data : packed.data;
    // Macro tiles as large as the cache likes, yet enough of them that no thread waits long for the last.
    const auto triangle = [&](int64_t side) { return ceil_div(panels, side) * (ceil_div(panels, side) + 1) / 2; };
    int64_t side = min_of<int64_t>(kMacro / kPanel, panels);
    while (side > 1 && triangle(side) < 4 * threads) side = ceil_div(side, 2);

    for (int64_t first = 0; first < all_steps; first += chunk) {
        const int64_t steps = min_of(chunk, all_steps - first);
        pack<Dot>(packed.data, turned.data, tokens, first, steps, n, threads);
        for_each_dynamic(triangle(side), threads, [&](int64_t tile) {
            const Tiles registers;
            int64_t right = 0;  // tile counts down the columns of the triangle: (0, 0), (0, 1), (1, 1), (0, 2), ...
            while (tile > right) tile -= ++right;
            for (int64_t run = 0; run < steps; run += kRun) {
                const int64_t length = min_of<int64_t>(kRun, steps - run);
                for (int64_t q = right * side; q < min_of(panels, (right + 1) * side); ++q)
                    for (int64_t p = tile * side; p < min_of(q + 1, (tile + 1) * side); ++p)
                        panel_pair<Dot>(H + p * kPanel * h_stride + q * kPanel, h_stride,
                                        left + (run * panels + p * length) * kPanel,
                                        packed.data + (run * panels + q * length) * kPanel, length, n - p * kPanel,
                                        n - q * kPanel, p == q);
            }
        });
    }
    return Status::done;
}

template <class Dot, class T>
Status accumulate_cross(float* C, int64_t c_stride, int64_t n, int64_t m, const Tokens<T>& X, const Tokens<T>& Y,
                        int threads) {
    if (n == 0 || m == 0 || X.count == 0) return Status::done;
    constexpr int64_t kPanel = Dot::kPanel;
    const int64_t all_steps = steps_of<Dot>(X.count), down = ceil_div(n, kPanel), across = ceil_div(m, kPanel);
    const int64_t chunk = chunk_steps(all_steps, (down + across) * kPanel);
    const Scratch<float> left(down * chunk * kPanel), right(across * chunk * kPanel);
    if (!left.data || !right.data) return Status::no_memory;
    const auto tiles = [&](int64_t side) { return ceil_div(down, side) * ceil_div(across, side); };
    int64_t side = min_of<int64_t>(kMacro / kPanel, max_of(down, across));
    while (side > 1 && tiles(side) < 4 * threads) side = ceil_div(side, 2);

    for (int64_t first = 0; first < all_steps; first += chunk) {
        const int64_t steps = min_of(chunk, all_steps - first);
        pack<Dot>(left.data, left.data, X, first, steps, n, threads);
        pack<Dot>(right.data, nullptr, Y, first, steps, m, threads);
        for_each_dynamic(tiles(side), threads, [&](int64_t tile) {
            const Tiles registers;
            const int64_t bands = ceil_div(down, side), band = tile % bands, column = tile / bands;
            for (int64_t run = 0; run < steps; run += kRun) {
                const int64_t length = min_of<int64_t>(kRun, steps - run);
                for (int64_t q = column * side; q < min_of(across, (column + 1) * side); ++q)
                    for (int64_t p = band * side; p < min_of(down, (band + 1) * side); ++p)
                        panel_pair<Dot>(C + p * kPanel * c_stride + q * kPanel, c_stride,
                                        left.data + (run * down + p * length) * kPanel,
                                        right.data + (run * across + q * length) * kPanel, length, n - p * kPanel,
                                        m - q * kPanel, false);
            }
        });
    }
    return Status::done;
}

constexpr bool is_bf16(bf16) { return true; }
template <class T>
constexpr bool is_bf16(T) {
    return false;
}

// Which tokens count. Those of weight 0 are left out, which makes masks exact; other weights need fp32 products.
struct Kept {
    const Scratch<int64_t> indices;
    const float* weights;
    int64_t count;

    Kept(const float* given, int64_t tokens) : indices(given ? tokens : 0), weights(given), count(tokens) {
        if (!given || !indices.data) return;
        bool only_ones = true;
        count = 0;
        for (int64_t t = 0; t < tokens; ++t) {
            if (given[t] == 0) continue;
            indices.data[count++] = t;
            only_ones = only_ones && given[t] == 1;
        }
        selected = indices.data;
        if (only_ones) weights = nullptr;
    }

    template <class T>
    Tokens<T> of(const void* X, int64_t row_stride, int64_t column_stride) const {
        return {static_cast<const T*>(X), row_stride, column_stride, count, selected, weights};
    }

   private:
    const int64_t* selected = nullptr;
};

// Calls run(zero, products) with a zero of the tokens' type and the products that suit them: pairs of bf16 where the
// CPU multiplies those and every token counts 1, else fp32.
template <class Run>
Status with_products(DType dtype, [[maybe_unused]] const Kept& kept, Run run) {
    Status ended = Status::done;
    with_dtype(dtype, [&](auto zero) {
#if defined(__AVX512BF16__)
        if constexpr (is_bf16(decltype(zero){}))
            if (!kept.weights) {
                ended = run(zero, BestPairs{});
                return;
            }
#endif
        ended = run(zero, Singles{});
    });
    return ended;
}

}  // namespace

rac::Status rac::RAC_ISA::hessian(float* H, int64_t h_stride, const void* X, DType dtype, int64_t tokens, int64_t n,
                                  int64_t row_stride, int64_t column_stride, const float* weights, int threads) {
    const Kept kept(weights, tokens);
    if (!kept.indices.data) return Status::no_memory;
    return with_products(dtype, kept, [&](auto zero, auto dot) {
        const auto all = kept.of<decltype(zero)>(X, row_stride, column_stride);
        return accumulate<decltype(dot)>(H, h_stride, n, all, threads);
    });
}

rac::Status rac::RAC_ISA::cross(float* C, int64_t c_stride, const void* X, const void* Y, DType dtype, int64_t tokens,
                                int64_t n, int64_t m, int64_t x_row_stride, int64_t x_column_stride,
                                int64_t y_row_stride, int64_t y_column_stride, const float* weights, int threads) {
    const Kept kept(weights, tokens);
    if (!kept.indices.data) return Status::no_memory;
    return with_products(dtype, kept, [&](auto zero, auto dot) {
        const auto left = kept.of<decltype(zero)>(X, x_row_stride, x_column_stride);
        const auto right = kept.of<decltype(zero)>(Y, y_row_stride, y_column_stride);
        return accumulate_cross<decltype(dot)>(C, c_stride, n, m, left, right, threads);
    });
}
