// Products of 16-bit integers, which any CPU multiplies faster than fp32: with a matrix that does not exceed 1 as an
// operator, nor therefore in the norm of a column (ADMM), or whose columns were scaled to a norm of 1 (refinement).
#include "cpu/int16_gemm.h"

#if !defined(__AVX2__) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

#if defined(__AMX_INT8__)
// Elements k .. k + kBeside, k a multiple of that, of kLanes columns of a panel of M from j on.
inline void put(int32_t* panel, int64_t k, int64_t j, const IntVec (&x)[kBeside]) {
    IntVec high = {}, low = {};
    for (int b = 0; b < kBeside; ++b) {
        const Bytes bytes = bytes_of(x[b]);
        high |= (bytes.high & 0xff) << 8 * b;
        low |= (bytes.low & 0xff) << 8 * b;
    }
    int32_t* const at = panel + k / 64 * 2 * kTileWords + k % 64 / kBeside * kPanel + j;
    int_vec(at) = high;
    int_vec(at + kTileWords) = low;
}

inline void get(const int32_t* panel, int64_t k, int64_t j, IntVec (&x)[kBeside]) {
    const int32_t* const at = panel + k / 64 * 2 * kTileWords + k % 64 / kBeside * kPanel + j;
    const IntVec high = int_vec(at), low = int_vec(at + kTileWords);
    for (int b = 0; b < kBeside; ++b) x[b] = (high << (24 - 8 * b) >> 24) * 256 + (low << (24 - 8 * b) >> 24);
}

// to = from (or 0) + scale a b columns (or 1) over `steps` words, kRows x kPanel, or the rows and columns of it that
// there are; the lower half of `a` is `apart` words behind the upper one.
void micro_tile(const int32_t* a, int64_t apart, const int32_t* b, int64_t steps, const float* from, float* to,
                int64_t stride, const float* scales, int64_t runs, const float* norms, int64_t rows, int64_t columns) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s += kDeep, a += 2 * kTileWords, b += 2 * kTileWords) {
        _tile_loadd(4, b, 64);
        _tile_loadd(6, a, 64);
        _tile_loadd(7, a + apart, 64);
        _tile_loadd(5, b + kTileWords, 64);
        _tile_dpbssd(0, 6, 4);
        _tile_dpbssd(2, 7, 4);
        _tile_dpbssd(1, 6, 5);
        _tile_dpbssd(3, 7, 5);
        _tile_loadd(6, a + kTileWords, 64);
        _tile_loadd(7, a + apart + kTileWords, 64);
        _tile_dpbssd(1, 6, 4);
        _tile_dpbssd(3, 7, 4);
    }
    alignas(kCacheLine) int32_t high[kRows][kPanel], mixed[kRows][kPanel];
    _tile_stored(0, high, 64);
    _tile_stored(1, mixed, 64);
    _tile_stored(2, high + kTileRows, 64);
    _tile_stored(3, mixed + kTileRows, 64);
    const __mmask16 there = static_cast<__mmask16>((1u << min_of(kPanel, columns)) - 1);
    const Vec factors = norms ? (Vec)_mm512_maskz_loadu_ps(there, norms) : Vec{} + 1.0f;
    for (int64_t i = 0; i < min_of(kRows, rows); ++i) {
        const Vec whole = 256.0f * __builtin_convertvector(int_vec(high[i]), Vec);
        Vec sum = 256.0f * scales[i * runs] * (whole + __builtin_convertvector(int_vec(mixed[i]), Vec)) * factors;
        if (from) sum += (Vec)_mm512_maskz_loadu_ps(there, from + i * stride);
        _mm512_mask_storeu_ps(to + i * stride, there, (__m512)sum);
    }
}
#else
// Elements k and k + 1, k even, of kLanes columns of a panel of M from j on.
inline void put(int32_t* panel, int64_t k, int64_t j, const IntVec (&x)[kBeside]) {
    int_vec(panel + k / 2 * kPanel + j) = (x[0] & 0xffff) | x[1] << 16;
}

inline void get(const int32_t* panel, int64_t k, int64_t j, IntVec (&x)[kBeside]) {
    const IntVec words = int_vec(panel + k / 2 * kPanel + j);
    x[0] = words << 16 >> 16;
    x[1] = words >> 16;
}

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
void micro_tile(const int32_t* a, int64_t, const int32_t* b, int64_t steps, const float* from, float* to,
                int64_t stride, const float* scales, int64_t runs, const float* norms, int64_t rows, int64_t columns) {
    // Fetch what is added to at the end: no loop runs far enough ahead of it to have it in time.
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
#endif

// The nearest integers; |x| < 2^15.
inline IntVec nearest(Vec x) { return (IntVec)(x + kRounding) << 16 >> 16; }

}  // namespace

rac::Int16Sizes rac::RAC_ISA::int16_sizes(int64_t rows, int64_t n) {
    const Runs runs(n);
    return {round_up(rows, kRows) * runs.steps, rows * runs.count, round_up(n, kPanel) * runs.steps};
}

void rac::RAC_ISA::int16_matrix(int32_t* M, const float* U, int64_t u_stride, const float* scale, int64_t n,
                                float share, int threads) {
    constexpr int64_t kBlock = 64;  // rows of M, taken together so that U is read line by line
    const int64_t steps = Runs(n).steps;
    for_each_dynamic(ceil_div(n, kPanel), threads, [&](int64_t p) {
        const int64_t first = p * kPanel, width = min_of(kPanel, n - first);
        float block[kBlock][kPanel] = {}, scales[kPanel] = {};
        memcpy(scales, scale + first, width * sizeof(float));
        for (int64_t top = 0; top < n; top += kBlock) {
            const int64_t height = min_of(kBlock, n - top);
            const int64_t above = min_of(max_of<int64_t>(first - top, 0), height);  // of U and left of the diagonal
            for (int64_t i = 0; i < above; ++i)
                memcpy(block[i], U + (top + i) * u_stride + first, width * sizeof(float));
            for (int64_t j = 0; j < width; ++j)
                for (int64_t i = above; i < height; ++i) {
                    const int64_t k = top + i, column = first + j;
                    block[i][j] = k < column ? U[k * u_stride + column] : U[column * u_stride + k];
                }
            const int64_t end = round_up(height, kBeside);
            if (end > height) memset(block[height], 0, (end - height) * sizeof block[0]);
            int32_t* const panel = M + p * steps * kPanel;
            for (int64_t i = 0; i < end; i += kBeside)
                for (int64_t j = 0; j < kPanel; j += kLanes) {
                    IntVec x[kBeside];
                    get(panel, top + i, j, x);
                    for (int64_t b = 0; b < kBeside; ++b) {
                        Vec goal = kOne * scale[min_of(top + i + b, n - 1)] * vec(block[i + b] + j) * vec(scales + j);
                        goal = goal < -kMost ? Vec{} - kMost : goal > kMost ? Vec{} + kMost : goal;
                        const Vec old = __builtin_convertvector(x[b], Vec);
                        x[b] = nearest(share < 1 ? old + share * (goal - old) : goal);
                    }
                    put(panel, top + i, j, x);
                }
        }
    });
}

void rac::RAC_ISA::int16_columns(int32_t* M, float* norms, const float* H, int64_t h_stride, const float* scale,
                                 const float* diagonal, int64_t n, int threads) {
    const int64_t steps = Runs(n).steps;
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
        int32_t* const panel = M + p * steps * kPanel;
        float rows[kBeside][kPanel] = {};
        for (int64_t k = 0; k < n; k += kBeside) {
            for (int64_t b = 0; b < kBeside; ++b)
                for (int64_t j = 0; j < width; ++j) rows[b][j] = k + b < n ? units[j] * element(k + b, j) : 0;
            for (int64_t j = 0; j < kPanel; j += kLanes) {
                IntVec x[kBeside];
                for (int64_t b = 0; b < kBeside; ++b) x[b] = nearest(vec(rows[b] + j));
                put(panel, k, j, x);
            }
        }
    });
}

bool rac::RAC_ISA::int16_rows(int32_t* packed, float* scales, const float* P, const float* scale, int64_t rows,
                              int64_t n, int threads) {
    const Runs runs(n);
    Scratch<float> scratch(threads * n);
    if (!scratch.data) return false;
    for_each_dynamic(ceil_div(rows, kRows), threads, scratch.data, n, [&](int64_t group, float* own) {
        for (int64_t row = group * kRows; row < min_of(rows, (group + 1) * kRows); ++row) {
            for (int64_t j = 0; j < n; ++j) own[j] = scale[j] * P[row * n + j];
            pack_row(own, packed_row(packed, row, runs), scales + row * runs.count, n, runs);
        }
    });
    return true;
}

void rac::RAC_ISA::int16_gemm(float* V, const float* from, const int32_t* packed, const float* scales, const int32_t* M,
                              const float* norms, int64_t rows, int64_t n, int threads) {
    const Runs runs(n);
    const int64_t steps = runs.steps;
    int64_t side = kMacro;
    const auto tiles = [&](int64_t length) { return ceil_div(rows, length) * ceil_div(n, length); };
    while (threads > 1 && side > kUnit && tiles(side) < 4 * threads) side = round_up(side / 2, kUnit);
    const int64_t down = ceil_div(rows, side);
    for_each_dynamic(tiles(side), threads, [&](int64_t tile) {
        const Tiles registers;
        const int64_t top = tile % down * side, left = tile / down * side;
        const int64_t height = ceil_div(min_of(rows - top, side), kRows);
        const int64_t width = ceil_div(min_of(n - left, side), kPanel);
        for (int64_t run = 0; run < runs.count; ++run) {
            const int64_t begin = run * runs.length;
            for (int64_t i = 0; i < height * width; ++i) {
                // The larger of two operands stays in the first-level cache, where the smaller ones pass by.
                const int64_t row = top + (kRows > kPanel ? i / width : i % height) * kRows;
                const int64_t column = left + (kRows > kPanel ? i % width : i / height) * kPanel, at = row * n + column;
                const float* const before = run ? V + at : from ? from + at : nullptr;
                micro_tile(packed + row * steps + begin * kGroup, kGroup * steps, M + column * steps + begin * kPanel,
                           runs.of(run), before, V + at, n, scales + row * runs.count + run, runs.count,
                           norms ? norms + column : nullptr, rows - row, n - column);
            }
        }
    });
}
