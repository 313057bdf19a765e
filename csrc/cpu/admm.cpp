// The steps of ADMM: the product with M = rho (H + rho I)^-1 in 16-bit integers, and what comes between two products,
// two passes over memory around the selection.
//
// M does not exceed 1 as an operator, so neither does the norm of a column of it, nor of a part of one. As integers
// these norms are kept below 32,800, and those of each run of a row that M is multiplied by below 65,100: by Cauchy and
// Schwarz no sum over a run exceeds 31 bits. Each run has a scale of its own, as its sums go into fp32 anyway. An
// element is half of a 32-bit word, beside the next one of its row of the left or its column of the right operand.
#include "cpu/select.h"
#include "cpu/tile.h"

#if !defined(__AVX2__) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kWide = 3, kRows = kSteps;
#elif defined(__AVX2__)
constexpr int64_t kWide = 2, kRows = 6;
#else
constexpr int64_t kWide = 2, kRows = kSteps;  // vectors; products take registers of their own
#endif
constexpr int64_t kPanel = kLanes * kWide;  // columns of M that stand side by side
constexpr int64_t kUnit = kPanel % kRows ? 3 * kPanel : kPanel;
static_assert(kUnit % kRows == 0, "a tile of V begins with a group of rows and a panel of columns");
constexpr int64_t kRun = 192;               // words summed in registers, two columns each, at most
constexpr int64_t kMacro = 192;             // rows and columns of V that stay in the second-level cache
constexpr float kOne = 32000.0f;            // 1 of M; above it is room for rounding
constexpr float kLength = 65000.0f;         // of a run

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

// The nearest integer's lowest 16 bits; |x| < 2^15.
inline uint32_t rounded(float x) {
    x += 12582912.0f;  // 1.5 * 2^23: what is left of the mantissa is the integer
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0xffff;
}

// The words of a row are summed in runs of equal length but for the last.
struct Runs {
    int64_t steps, count, length;
    explicit Runs(int64_t n) : steps(ceil_div(n, 2)), count(ceil_div(steps, kRun)), length(ceil_div(steps, count)) {}
    int64_t of(int64_t run) const { return min_of(length, steps - run * length); }
};

// A row of `n` numbers becomes words, kRows apart, and a scale for each run.
inline void to_words(const float* __restrict row, int32_t* __restrict to, float* scales, int64_t n, Runs runs) {
    for (int64_t first = 0; first < n; first += 2 * runs.length, to += runs.length * kRows) {
        const float* const own = row + first;
        const int64_t length = min_of(2 * runs.length, n - first);
        Vec sizes = {}, squares = {};
        int64_t j = 0;
        for (; j + kLanes <= length; j += kLanes) {
            const Vec x = vec(own + j), size = x < 0 ? -x : x;
            sizes = sizes > size ? sizes : size;
        }
        float most = 0, square = 0;
        for (int lane = 0; lane < kLanes; ++lane) most = max_of(most, sizes[lane]);
        for (; j < length; ++j) most = max_of(most, __builtin_fabsf(own[j]));
        const float inverse = most > 1e-37f ? 1 / most : 0;
        for (j = 0; j + kLanes <= length; j += kLanes) {
            const Vec x = inverse * vec(own + j);
            squares += x * x;
        }
        for (int lane = 0; lane < kLanes; ++lane) square += squares[lane];
        for (; j < length; ++j) square += inverse * own[j] * (inverse * own[j]);
        const float whole = square > 0 ? min_of(kLength / __builtin_sqrtf(square), 32767.0f) : 0;  // of the largest
        const float unit = whole * inverse;
        *scales++ = whole > 0 ? most / (whole * kOne) : 0;
        uint16_t halves[2 * kRun];
        halves[length % 2 ? length : 0] = 0;
        for (j = 0; j < length; ++j) halves[j] = static_cast<uint16_t>(rounded(unit * own[j]));
        for (int64_t s = 0; 2 * s < length; ++s) memcpy(to + s * kRows, halves + 2 * s, sizeof *to);
    }
}

// to = from + scale a^T b over `steps` words, kRows x kPanel, or the rows and columns of it that there are.
void micro_tile(const int32_t* a, const int32_t* b, int64_t steps, const float* from, float* to, int64_t stride,
                const float* scales, int64_t runs, int64_t rows, int64_t columns) {
    // What is added to at the end, which no loop runs far enough ahead of to have it in time.
    for (int64_t i = 0; i < min_of(kRows, rows); ++i) {
        __builtin_prefetch(from + i * stride, 0);
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
                vec(to + at) = vec(from + at) + scales[i * runs] * __builtin_convertvector(sums[i][v], Vec);
            }
        return;
    }
    int32_t values[kRows][kPanel];
    memcpy(values, sums, sizeof values);
    for (int64_t i = 0; i < min_of(kRows, rows); ++i)
        for (int64_t j = 0; j < min_of(kPanel, columns); ++j)
            to[i * stride + j] = from[i * stride + j] + scales[i * runs] * static_cast<float>(values[i][j]);
}

// What stays of each group of a row: all but the group - keep smallest; of equal ones the leftmost goes. Scores are not
// negative.
template <int64_t kGroup>
inline void choose_in_row(const float* __restrict scores, uint8_t* __restrict kept, int64_t n, int64_t keep,
                          int64_t any_group) {
    const int64_t group = kGroup ? kGroup : any_group;
    int64_t first = 0;
#if defined(__AVX2__)
    if (kGroup) {
        // Every lane against the next of its group, the one after that and so on, round the group. As the integers that
        // they are too, no score is negative: not above is below one more.
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), last = _mm256_set1_epi32(kGroup - 1);
        const __m256i own_group = _mm256_andnot_si256(last, lane), goes = _mm256_set1_epi32(group - keep - 1);
        for (; first + 8 <= n; first += 8) {
            const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores + first));
            __m256i before = _mm256_setzero_si256();  // how many of the group go before this one
            for (int round = 1; round < kGroup; ++round) {
                const __m256i next = _mm256_and_si256(_mm256_add_epi32(lane, _mm256_set1_epi32(round)), last);
                const __m256i from = _mm256_or_si256(own_group, next);
                const __m256i left = _mm256_cmpgt_epi32(lane, from);  // -1 where it stands before
                const __m256i other = _mm256_permutevar8x32_epi32(own, from);
                before = _mm256_sub_epi32(before, _mm256_cmpgt_epi32(_mm256_sub_epi32(own, left), other));
            }
            const __m256i stays = _mm256_cmpgt_epi32(before, goes);
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(stays), _mm256_extracti128_si256(stays, 1));
            const __m128i bytes = _mm_and_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(1));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(kept + first), bytes);
        }
    }
#endif
    for (; first < n; first += group)
        for (int64_t i = 0; i < group; ++i) {
            const float own = scores[first + i];
            int32_t before = 0;
            for (int64_t j = 0; j < i; ++j) before += scores[first + j] <= own;
            for (int64_t j = i + 1; j < group; ++j) before += scores[first + j] < own;
            kept[first + i] = before >= group - keep;
        }
}

}  // namespace

rac::AdmmSizes rac::RAC_ISA::admm_sizes(int64_t rows, int64_t n) {
    const int64_t steps = ceil_div(n, 2);
    return {round_up(rows, kRows) * steps, rows * Runs(n).count, round_up(n, kPanel) * steps};
}

void rac::RAC_ISA::admm_matrix(int32_t* M, const float* U, int64_t u_stride, const float* scale, int64_t n, float share,
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

void rac::RAC_ISA::admm_product(float* V, const float* goal, const int32_t* gap, const float* scales, const int32_t* M,
                                int64_t rows, int64_t n, int threads) {
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
                    micro_tile(gap + row * steps + begin * kRows, M + column * steps + begin * kPanel, runs.of(run),
                               (run ? V : goal) + row * n + column, V + row * n + column, n,
                               scales + row * runs.count + run, runs.count, rows - row, n - column);
        }
    });
}

bool rac::RAC_ISA::settle(float* T, float* V, uint8_t* kept, const float* goal, int32_t* gap, float* scales, int64_t rows,
                          int64_t n, int64_t zeros, int64_t keep, int64_t group, float relaxation, float shrink,
                          int threads) {
    const int64_t count = rows * n;
    const Runs runs(n);
    const bool selects = !group && zeros > 0;
    Scratch<int64_t> counts(selects ? select_scratch(threads) : 0);
    Scratch<int32_t> keys(selects ? collect_scratch(count, threads) : 0);
    if (!counts.data || !keys.data) return false;
    const auto relax = [&](int64_t row) {
        float* const __restrict t = T + row * n;
        float* const __restrict v = V + row * n;
        const uint8_t* const __restrict stays = kept + row * n;
        for (int64_t j = 0; j < n; ++j) {
            t[j] += relaxation * (v[j] - static_cast<float>(stays[j]) * t[j]);
            v[j] = __builtin_fabsf(t[j]);
        }
    };
    const auto finish = [&](int64_t row) {
        float* const __restrict t = T + row * n;
        float* const __restrict v = V + row * n;
        const float* const __restrict aim = goal + row * n;
        const uint8_t* const __restrict stays = kept + row * n;
        for (int64_t j = 0; j < n; ++j) {
            const float stay = stays[j], own = t[j] * stay, gone = t[j] * shrink * (1 - stay);
            t[j] = own + gone;
            v[j] = own - gone - aim[j];
        }
        to_words(v, gap + row / kRows * kRows * runs.steps + row % kRows, scales + row * runs.count, n, runs);
    };
    if (group) {  // all of a row while it is in the cache
        for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                relax(row);
                if (group == 4)
                    choose_in_row<4>(V + row * n, kept + row * n, n, keep, group);
                else if (group == 8)
                    choose_in_row<8>(V + row * n, kept + row * n, n, keep, group);
                else
                    choose_in_row<0>(V + row * n, kept + row * n, n, keep, group);
                finish(row);
            }
        });
        return true;
    }
    for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) relax(row);
    });
    float bound = -1;  // what is not above it goes, but for equal ones beyond the first `ties`
    int64_t ties = 0;
    bool tied = false;
    if (selects) {
        const int32_t* scores = reinterpret_cast<const int32_t*>(V);
        const Kth found = kth_smallest_score(scores, count, zeros, counts.data, keys.data, threads);
        bound = from_bits(found.key);
        ties = zeros - found.below;
        tied = ties < found.equal;
    }
    for_each_range(rows, 1, tied ? 1 : threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* const __restrict v = V + row * n;
            uint8_t* const __restrict stays = kept + row * n;
            const float most = bound;  // a byte that is written could be part of what is held by reference
            const int64_t columns = n;
            for (int64_t j = 0; j < columns; ++j) stays[j] = !(v[j] <= most);
            for (int64_t j = 0; tied && j < n; ++j)
                if (v[j] == bound && ties-- <= 0) stays[j] = 1;
            finish(row);
        }
    });
    return true;
}
