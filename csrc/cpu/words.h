// Rows of fp32 numbers as 16-bit integers for words.cpp's product with a matrix of them.
//
// An element is half of a 32-bit word, beside the next one of its row of the left or its column of the right operand. The
// sums of a run of words stay in 31 bits by Cauchy and Schwarz: as integers, a run of a row of the left operand has a norm
// below 65,100, a column of the right one, or any part of it, one below 32,800. Each run of a row has a scale of its own,
// as its sums go into fp32 anyway.
#pragma once
#include "cpu/tile.h"

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

}  // namespace
