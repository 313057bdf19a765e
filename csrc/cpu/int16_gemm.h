// Rows of fp32 numbers as 16-bit integers for int16_gemm.cpp's product with a matrix of them.
//
// An element is half of a 32-bit word, beside the next one of its row of the left or its column of the right operand.
// The sums of a run of words stay in 31 bits by Cauchy and Schwarz: as integers, a run of a row of the left operand has
// a norm below 65,100, a column of the right one, or any part of it, one below 32,800. Each run of a row has a scale of
// its own, as its sums go into fp32 anyway.
//
// For AMX, which multiplies bytes, an element is 256 high + low, both from -128 to 127, and three products stand for
// one. That of the low bytes is left out: it is about twice what rounding to 16 bits left out. A tile of 16 rows and 64
// columns of the left operand, or of 64 rows and 16 columns of the right one, is one of high bytes and, behind it, one
// of low bytes. No run of products of bytes comes near 31 bits.
#pragma once
#include "cpu/amx.h"
#include "cpu/tile.h"

namespace {

#if defined(__AMX_INT8__)
constexpr int64_t kWide = 1, kRows = 2 * kTileRows, kGroup = kTileRows, kApart = 16, kBeside = 4, kDeep = 32,
                  kMacro = 384;
constexpr float kMost = 32639.0f;  // 256 * 127 + 127
#elif defined(__AVX512F__)
constexpr int64_t kWide = 3, kRows = kSteps;
#elif defined(__AVX2__)
constexpr int64_t kWide = 2, kRows = 6;
#else
constexpr int64_t kWide = 2, kRows = kSteps;
#endif
#if !defined(__AMX_INT8__)
constexpr int64_t kGroup = kRows, kApart = 1, kBeside = 2, kDeep = 1, kMacro = 192;
constexpr float kMost = 32767.0f;
#endif
// kWide vectors of kRows of V are summed in registers at a time, where products take some as well. kGroup rows of the
// left operand, kApart words from each other, stand side by side, and so do kBeside elements of a column of M, none
// above kMost. kMacro rows and columns of V, and their operands, stay in the second-level cache.
constexpr int64_t kRun = 192;               // words summed in registers, two columns each, at most; a multiple of kDeep
constexpr int64_t kPanel = kLanes * kWide;  // columns of M that stand side by side
constexpr int64_t kUnit = kPanel % kRows == 0 ? kPanel : kRows % kPanel == 0 ? kRows : 3 * kPanel;
static_assert(kUnit % kRows == 0 && kUnit % kPanel == 0 && kRows % kGroup == 0 && kRun % kDeep == 0,
              "a tile of V begins with a group of rows and a panel of columns");
constexpr float kOne = 32000.0f;     // 1 of M; above it is room for rounding
constexpr float kLength = 65000.0f;  // of a run

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: added, what is left of the mantissa is the integer

// The words of a row are summed in runs of equal length but for the last.
struct Runs {
    int64_t steps, count, length;
    explicit Runs(int64_t n)
        : steps(round_up(ceil_div(n, 2), kDeep)),
          count(ceil_div(steps, kRun)),
          length(round_up(ceil_div(steps, count), kDeep)) {}
    int64_t of(int64_t run) const { return min_of(length, steps - run * length); }
};

inline int32_t* packed_row(int32_t* packed, int64_t row, Runs runs) {
    return packed + row / kGroup * kGroup * runs.steps + row % kGroup * kApart;
}

#if defined(__AMX_INT8__)
struct Bytes { IntVec high, low; };

inline Bytes bytes_of(IntVec x) {
    const IntVec high = (x + 128) >> 8;
    return {high, x - (high << 8)};
}

// A row of `n` numbers is packed as bytes, from packed_row on, and a scale for each run.
inline void pack_row(const float* __restrict row, int32_t* __restrict to, float* scales, int64_t n, Runs runs) {
    for (int64_t first = 0; first < n; first += 2 * runs.length, to += runs.length * kGroup) {
        const float* const own = row + first;
        const int64_t length = min_of(2 * runs.length, n - first);
        Vec sizes = {};
        int64_t j = 0;
        for (; j + kLanes <= length; j += kLanes) {
            const Vec x = vec(own + j), size = x < 0 ? -x : x;
            sizes = sizes > size ? sizes : size;
        }
        float most = 0;
        for (int lane = 0; lane < kLanes; ++lane) most = max_of(most, sizes[lane]);
        for (; j < length; ++j) most = max_of(most, __builtin_fabsf(own[j]));
        const float unit = most > 1e-33f ? kMost / most : 0;
        *scales++ = unit > 0 ? most / (kMost * kOne) : 0;
        for (j = 0; j < length; j += kLanes) {
            const __mmask16 there = static_cast<__mmask16>((1u << min_of(kLanes, length - j)) - 1);
            const __m512i x = _mm512_cvtps_epi32(unit * _mm512_maskz_loadu_ps(there, own + j));
            const Bytes bytes = bytes_of((IntVec)x);
            int8_t* const at = reinterpret_cast<int8_t*>(to + j / 64 * 2 * kTileWords) + j % 64;
            _mm512_mask_cvtepi32_storeu_epi8(at, there, (__m512i)bytes.high);
            _mm512_mask_cvtepi32_storeu_epi8(at + kTileWords * sizeof *to, there, (__m512i)bytes.low);
        }
    }
}
#else
typedef uint64_t Pairs __attribute__((vector_size(kLanes * 4)));

// The nearest integer's lowest 16 bits; |x| < 2^15.
inline uint32_t rounded(float x) {
    x += kRounding;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0xffff;
}

// A row of `n` numbers is packed as words, kGroup apart from packed_row on, and a scale for each run.
inline void pack_row(const float* __restrict row, int32_t* __restrict to, float* scales, int64_t n, Runs runs) {
    for (int64_t first = 0; first < n; first += 2 * runs.length, to += runs.length * kGroup) {
        const float* const own = row + first;
        const int64_t length = min_of(2 * runs.length, n - first);
        Vec sizes = {}, squares = {};
        int64_t j = 0;
        for (; j + kLanes <= length; j += kLanes) {
            const Vec x = vec(own + j), size = x < 0 ? -x : x;
            sizes = sizes > size ? sizes : size;
            squares += x * x;
        }
        float most = 0, square = 0;
        for (int lane = 0; lane < kLanes; ++lane) most = max_of(most, sizes[lane]), square += squares[lane];
        for (; j < length; ++j) most = max_of(most, __builtin_fabsf(own[j])), square += own[j] * own[j];
        const float inverse = most > 1e-37f ? 1 / most : 0;
        if (most > 1e-15f && most < 1e15f) {
            square *= inverse * inverse;
        } else {  // squares that fp32 may not hold
            square = 0;
            for (j = 0; j < length; ++j) square += inverse * own[j] * (inverse * own[j]);
        }
        const float whole = square > 0 ? min_of(kLength / __builtin_sqrtf(square), kMost) : 0;  // of the largest
        const float unit = whole * inverse;
        *scales++ = whole > 0 ? most / (whole * kOne) : 0;
        int32_t* word = to;
        for (j = 0; j + kLanes <= length; j += kLanes) {
            // The lowest halves of two neighbours become the lower half of 64 bits.
            const Pairs both = (Pairs)(unit * vec(own + j) + kRounding);
            const Pairs joined = (both & 0xffff) | (both >> 16 & 0xffff0000);
#pragma GCC unroll 8
            for (int pair = 0; pair < kLanes / 2; ++pair, word += kGroup) *word = static_cast<int32_t>(joined[pair]);
        }
        for (; j < length; j += 2, word += kGroup)
            *word =
                static_cast<int32_t>(rounded(unit * own[j]) | (j + 1 < length ? rounded(unit * own[j + 1]) << 16 : 0));
    }
}
#endif

}  // namespace
