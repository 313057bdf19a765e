// Products of 16-bit integers, which any CPU multiplies faster than fp32: with a matrix that does not exceed 1 as an
// operator, nor therefore in the norm of a column (ADMM), or whose columns were scaled to a norm of 1 (refinement).
#include "cpu/words.h"

#if !defined(__AVX2__) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

// Sums of the two products of every lane's halves are added to the lane.
inline IntVec multiply_add(IntVec sum, IntVec a, IntVec b) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
    return sum + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// to = from (or 0) + scale a^T b columns (or 1) over `steps` words, kRows x kPanel, or the rows and columns of it that
// there are.
void micro_tile(const int32_t* a, const int32_t* b, int64_t steps, const float* from, float* to, int64_t stride,
                const float* scales, int64_t runs, const float* norms, int64_t rows, int64_t columns) {
    // What is added to at the end, which no loop runs far enough ahead of to have it in time.
    for (int64_t i = 0; i < min_of(kRows, rows); ++i) {
        if (from) __builtin_prefetch(from + i * stride, 0);
        __builtin_prefetch(to + i * stride, 1);
    }
    IntVec sums[kRows][kWide] = {};
#pragma GCC unroll 4
    for (int64_t s = 0; s < steps; ++s, a += kRows, b += kPanel) {
        IntVec right[kWide];
        for (int v = 0; v < kWide; ++v) right[v] = int_vec(b + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const IntVec left = a[i] + IntVec{};
#pragma GCC unroll 3
            for (int v = 0; v < kWide; ++v) sums[i][v] = multiply_add(sums[i][v], left, right[v]);
        }
    }
    if (rows >= kRows && columns >= kPanel) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < kWide; ++v) {
                const int64_t at = i * stride + v * kLanes;
                Vec sum = scales[i * runs] * __builtin_convertvector(sums[i][v], Vec);
                if (norms) sum *= vec(norms + v * kLanes);
                vec(to + at) = from ? vec(from + at) + sum : sum;
            }
        return;
    }
    int32_t values[kRows][kPanel];
    memcpy(values, sums, sizeof values);
    for (int64_t i = 0; i < min_of(kRows, rows); ++i)
        for (int64_t j = 0; j < min_of(kPanel, columns); ++j) {
            const float sum = scales[i * runs] * static_cast<float>(values[i][j]) * (norms ? norms[j] : 1.0f);
            to[i * stride + j] = from ? from[i * stride + j] + sum : sum;
        }
}

}  // namespace

rac::WordSizes rac::RAC_ISA::word_sizes(int64_t rows, int64_t n) {
    const int64_t steps = ceil_div(n, 2);
    return {round_up(rows, kRows) * steps, rows * Runs(n).count, round_up(n, kPanel) * steps};
}

void rac::RAC_ISA::word_matrix(int32_t* M, const float* U, int64_t u_stride, const float* scale, int64_t n, float share,
                               int threads) {
    constexpr int64_t kBlock = 64;  // rows of M, taken together so that U is read line by line
    const int64_t steps = ceil_div(n, 2);
    for_each_dynamic(ceil_div(n, kPanel), threads, [&](int64_t p) {
        const int64_t first = p * kPanel, width = min_of(kPanel, n - first);
        float block[kBlock][kPanel] = {};
        for (int64_t top = 0; top < n; top += kBlock) {
            const int64_t height = min_of(kBlock, n - top);
            const int64_t above = min_of(max_of<int64_t>(first - top, 0), height);  // of U and left of the diagonal
            for (int64_t i = 0; i < above; ++i) memcpy(block[i], U + (top + i) * u_stride + first, width * sizeof(float));
            for (int64_t j = 0; j < width; ++j)
                for (int64_t i = above; i < height; ++i) {
                    const int64_t k = top + i, column = first + j;
                    block[i][j] = k < column ? U[k * u_stride + column] : U[column * u_stride + k];
                }
            if (height % 2) memset(block[height], 0, sizeof block[height]);
            int32_t* to = M + (p * steps + top / 2) * kPanel;
            for (int64_t i = 0; i < height; i += 2, to += kPanel) {
                const float low = kOne * scale[top + i], high = kOne * scale[min_of(top + i + 1, n - 1)];
                for (int64_t j = 0; j < width; ++j) {
                    const auto mixed = [&](float goal, int32_t old) {
                        goal = min_of(max_of(goal * scale[first + j], -32767.0f), 32767.0f);
                        return rounded(share < 1 ? old + share * (goal - old) : goal);
                    };
                    const uint32_t had = static_cast<uint32_t>(to[j]);
                    const uint32_t lower = mixed(low * block[i][j], static_cast<int32_t>(had << 16) >> 16);
                    const uint32_t upper = mixed(high * block[i + 1][j], static_cast<int32_t>(had) >> 16);
                    to[j] = static_cast<int32_t>(lower | upper << 16);
                }
            }
        }
    });
}

void rac::RAC_ISA::word_columns(int32_t* M, float* norms, const float* H, int64_t h_stride, const float* scale,
                                const float* diagonal, int64_t n, int threads) {
    const int64_t steps = ceil_div(n, 2);
    for_each_dynamic(ceil_div(n, kPanel), threads, [&](int64_t p) {
        const int64_t first = p * kPanel, width = min_of(kPanel, n - first);
        float squares[kPanel] = {}, units[kPanel];
        const auto element = [&](int64_t k, int64_t j) {
            return scale[k] * (k == first + j ? diagonal[k] : H[k * h_stride + first + j]) * scale[first + j];
        };
        for (int64_t k = 0; k < n; ++k)
            for (int64_t j = 0; j < width; ++j) squares[j] += element(k, j) * element(k, j);
        for (int64_t j = 0; j < width; ++j) {
            const float norm = __builtin_sqrtf(squares[j]);
            units[j] = norm > 0 ? kOne / norm : 0;
            norms[first + j] = norm * scale[first + j] * diagonal[first + j];
        }
        int32_t* to = M + p * steps * kPanel;
        for (int64_t k = 0; k < n; k += 2, to += kPanel)
            for (int64_t j = 0; j < width; ++j) {
                const uint32_t lower = rounded(units[j] * element(k, j));
                const uint32_t upper = k + 1 < n ? rounded(units[j] * element(k + 1, j)) : 0;
                to[j] = static_cast<int32_t>(lower | upper << 16);
            }
    });
}

bool rac::RAC_ISA::word_rows(int32_t* words, float* scales, const float* P, const float* scale, int64_t rows, int64_t n,
                             int threads) {
    const Runs runs(n);
    Scratch<float> scratch(threads * n);
    if (!scratch.data) return false;
    for_each_dynamic(ceil_div(rows, kRows), threads, scratch.data, n, [&](int64_t group, float* own) {
        for (int64_t row = group * kRows; row < min_of(rows, (group + 1) * kRows); ++row) {
            for (int64_t j = 0; j < n; ++j) own[j] = scale[j] * P[row * n + j];
            to_words(own, words + group * kRows * runs.steps + row % kRows, scales + row * runs.count, n, runs);
        }
    });
    return true;
}

void rac::RAC_ISA::word_product(float* V, const float* from, const int32_t* words, const float* scales, const int32_t* M,
                                const float* norms, int64_t rows, int64_t n, int threads) {
    const Runs runs(n);
    const int64_t steps = runs.steps;
    int64_t side = kMacro;
    const auto tiles = [&](int64_t length) { return ceil_div(rows, length) * ceil_div(n, length); };
    while (threads > 1 && side > kUnit && tiles(side) < 4 * threads) side = round_up(side / 2, kUnit);
    const int64_t down = ceil_div(rows, side);
    for_each_dynamic(tiles(side), threads, [&](int64_t tile) {
        const int64_t top = tile % down * side, left = tile / down * side;
        for (int64_t run = 0; run < runs.count; ++run) {
            const int64_t begin = run * runs.length;
            for (int64_t column = left; column < min_of(n, left + side); column += kPanel)
                for (int64_t row = top; row < min_of(rows, top + side); row += kRows)
                    micro_tile(words + row * steps + begin * kRows, M + column * steps + begin * kPanel, runs.of(run),
                               run ? V + row * n + column : from ? from + row * n + column : nullptr,
                               V + row * n + column, n, scales + row * runs.count + run, runs.count,
                               norms ? norms + column : nullptr, rows - row, n - column);
        }
    });
}
