// Products with packed matrices (rac_kernels/ops/packed.py): a mask of a bit a weight, and the kept values alone.
//
// For a few tokens the product is bound by what it reads, so W is never written out: a row's values are expanded in
// registers, a word of the mask (64 columns) at a time, and multiplied at once. A prepared copy of X, in the order in
// which it is used, stays in the cache. Three ways:
// - bf16 weights and bf16 tokens with AVX-512: VPEXPANDW, then VDPBF16PS; with AVX2 by a table of byte shuffles, in fp32.
// - int8 and int4 values: each run of columns of X becomes 16-bit integers with a scale of its own, which keeps all of a
//   bf16's bits next to the run's largest and is exact to 2^-16 of it. With AVX-512 they are two bytes, high and low,
//   each multiplied by VPDPBUSD, which wants its left operand unsigned: weights get a bias, and the sums begin with the
//   negative of what it adds up to, a constant of X. With AVX2 weights are widened for VPMADDWD. int4 values become
//   bytes a row at a time.
// - else in fp32.
#include "cpu/packed.h"

namespace {

constexpr int64_t kRunWords = 4;  // words of X, at most, that share a scale where X becomes integers

// A few tokens, prepared: words one after the other, in each the tokens' parts; where they are integers, the scales of
// runs, and what the sums of a run begin with.
template <class X>
struct Tokens {
    const X* x;
    const float* scales;
    const int32_t* begin;
};

// Sizes that all rows of a product share.
struct Sizes {
    int64_t words;
    int64_t run_words, runs;  // of X
    int64_t group_runs;       // runs to a group of W's scales
};

// The scale that takes a run's largest to 32639 = 127 * 256 + 127, beyond which no high byte is left; NaN for a run
// that is not finite.
inline float run_scale(const float* x, int64_t count) {
    IntVec most = {};
    for (int64_t j = 0; j < count; j += kLanes) {
        const IntVec size = (IntVec)vec(x + j) & 0x7fffffff;  // ordered as the numbers are, what is not finite last
        most = size > most ? size : most;
    }
    int32_t largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = max_of(largest, static_cast<int32_t>(most[i]));
    if (largest >= 0x7f800000) return __builtin_nanf("");
    const float scale = from_bits(largest) / 32639.0f;
    return scale < 1.2e-38f ? 0 : scale;  // of less there is no reciprocal
}

// To integers of less than 2^22, ties to even; of NaN any.
inline IntVec nearest(Vec x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    return (IntVec)(x + kRound) - 0x4b400000;
}

// Ways to multiply. A way has: X, the element of prepared tokens, kWords of them a token and word; kTokens, how many
// tokens it takes at once; `prepare`, which writes one token's part of a word (of a run, where kRuns); and `product`,
// sums[t] = a row times each of T tokens.

// Everything in fp32.
template <class V>
struct Floats {
    using X = float;
    static constexpr int kTokens = 4, kRows = 1;
    static constexpr bool kScaled = false, kRuns = false, kBiased = false;
    static constexpr int64_t kSize = kWord;

    static void prepare(X* to, const float* x) { memcpy(to, x, kWord * sizeof(float)); }

    template <int R, int T>
    [[gnu::noinline]] static void product(float (*sums)[T], const Row* row, const Tokens<X>& tokens, const Sizes& sizes,
                                          const float*) {
        const V* values = reinterpret_cast<const V*>(row->values);
        const float* x = tokens.x;
        Vec sum[T] = {};
        for (int64_t w = 0; w < sizes.words; ++w, x += T * kSize) {
            const uint64_t mask = row->mask[w];
            alignas(kCacheLine) float wide[kWord];
            expand_word(wide, mask, values);
            values += count_of(mask);
            for (int64_t j = 0; j < kWord; j += kLanes)
                for (int t = 0; t < T; ++t) sum[t] += vec(wide + j) * vec(x + t * kSize + j);
        }
        for (int t = 0; t < T; ++t) sums[0][t] = sum_of(sum[t]);
    }
};

// int8 values and tokens in fp32, with a scale for each group.
struct FloatCodes : Floats<int8> {
    static constexpr bool kScaled = true;

    template <int R, int T>
    [[gnu::noinline]] static void product(float (*sums)[T], const Row* row, const Tokens<X>& tokens, const Sizes& sizes,
                                          const float* factors) {
        const int8* values = reinterpret_cast<const int8*>(row->values);
        const float* x = tokens.x;
        Vec total[T] = {};
        for (int64_t run = 0, w = 0; run < sizes.runs; ++run) {
            Vec sum[T] = {};
            for (const int64_t end = min_of(sizes.words, w + sizes.run_words); w < end; ++w, x += T * kSize) {
                const uint64_t mask = row->mask[w];
                alignas(kCacheLine) float wide[kWord];
                expand_word(wide, mask, values);
                values += count_of(mask);
                for (int64_t j = 0; j < kWord; j += kLanes)
                    for (int t = 0; t < T; ++t) sum[t] += vec(wide + j) * vec(x + t * kSize + j);
            }
            for (int t = 0; t < T; ++t) total[t] += sum[t] * factors[run * T + t];
        }
        for (int t = 0; t < T; ++t) sums[0][t] = sum_of(total[t]);
    }
};

#if RAC_EXPAND
struct Pairs {
    using X = bf16;
    static constexpr int kTokens = 8, kRows = 2;
    static constexpr bool kScaled = false, kRuns = false, kBiased = false;
    static constexpr int64_t kSize = kWord;

    static void prepare(X* to, const float* x) {
        for (int64_t j = 0; j < kWord; ++j) put(to + j, x[j]);  // exact: it was bf16 before
    }

    template <int R, int T>
    [[gnu::noinline]] static void product(float (*sums)[T], const Row* rows, const Tokens<X>& tokens,
                                          const Sizes& sizes, const float*) {
        constexpr int kSums = R * T <= 4 ? 2 : 1;
        const uint8_t* values[R];
        for (int r = 0; r < R; ++r) values[r] = rows[r].values;
        __m512 sum[R][T][kSums] = {};
        const bf16* x = tokens.x;
        for (int64_t w = 0; w < sizes.words; ++w, x += T * kSize) {
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
                const uint64_t mask = rows[r].mask[w];
                const uint32_t low = static_cast<uint32_t>(mask), high = static_cast<uint32_t>(mask >> 32);
                _mm_prefetch(values[r] + kAhead, _MM_HINT_T0);
                _mm_prefetch(rows[r].mask + w + kMasksAhead, _MM_HINT_T0);
                const __m512i a = expand_16(low, load(values[r]));
                const __m512i b = expand_16(high, load(values[r] + 2 * count_of(low)));
                values[r] += 2 * count_of(mask);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    const __m512i left = _mm512_load_si512(x + t * kSize),
                                  right = _mm512_load_si512(x + t * kSize + 32);
                    sum[r][t][0] = _mm512_dpbf16_ps(sum[r][t][0], (__m512bh)a, (__m512bh)left);
                    sum[r][t][kSums - 1] = _mm512_dpbf16_ps(sum[r][t][kSums - 1], (__m512bh)b, (__m512bh)right);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t)
                sums[r][t] = sum_of((kSums > 1 ? sum[r][t][0] + sum[r][t][kSums - 1] : sum[r][t][0]));
    }
};

// Values in int8, or of int4 in bytes, to which their bias has been added.
template <bool Int4>
struct Codes {
    using X = int8_t;
    static constexpr int kTokens = 8, kRows = 1;
    static constexpr bool kScaled = true, kRuns = true, kBiased = Int4;
    static constexpr int64_t kSize = 2 * kWord;  // high bytes, then low ones
    static constexpr char kBias = Int4 ? 8 : static_cast<char>(0x80);

    // `begin`: minus the bias times what goes to each of 16 sums.
    static float prepare(X* to, int64_t step, int32_t* begin, const float* x, int64_t words) {
        const float scale = run_scale(x, words * kWord), inverse = scale > 0 ? 1 / scale : 0;
        const __m512i bias = _mm512_set1_epi8(kBias);
        __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
        for (int64_t w = 0; w < words; ++w, to += step, x += kWord) {
            for (int64_t j = 0; j < kWord; j += 16) {
                const __m512i q = (__m512i)nearest(vec(x + j) * inverse);
                const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm512_cvtepi32_epi8(high));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kWord + j), _mm512_cvtepi32_epi8(q));
            }
            high_sum = _mm512_dpbusd_epi32(high_sum, bias, _mm512_loadu_si512(to));
            low_sum = _mm512_dpbusd_epi32(low_sum, bias, _mm512_loadu_si512(to + kWord));
        }
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high_sum, 8), low_sum);
        _mm512_storeu_si512(begin, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
        return scale;
    }

    // A run of `words` words.
    template <int T>
    [[gnu::always_inline]] static const uint8_t* run(__m512* total, const uint64_t* mask, const uint8_t* values,
                                                     int64_t words, const X* x, const int32_t* begin,
                                                     const float* factors) {
        const __m512i bias = _mm512_set1_epi8(kBias);
        __m512i high[T], low[T];
        _mm_prefetch(mask + kMasksAhead, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            high[t] = _mm512_setzero_si512();
            low[t] = _mm512_load_si512(begin + 16 * t);
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < words; ++i) {
            if (!Int4) _mm_prefetch(values + kAhead, _MM_HINT_T0);
            const __m512i codes = Int4 ? load(values) : _mm512_xor_si512(load(values), bias);
            const __m512i weights = _mm512_mask_expand_epi8(bias, mask_64(mask + i), codes);
            values += count_of(mask[i]);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const X* const own = x + (i * T + t) * kSize;
                high[t] = _mm512_dpbusd_epi32(high[t], weights, _mm512_load_si512(own));
                low[t] = _mm512_dpbusd_epi32(low[t], weights, _mm512_load_si512(own + kWord));
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[t], 8), low[t]);
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(factors[t]), total[t]);
        }
        return values;
    }

    template <int T, int W>
    [[gnu::noinline]] static void runs(float* sums, const Row& row, const Tokens<X>& tokens, const Sizes& sizes,
                                       const float* factors) {
        __m512 total[T] = {};
        const int64_t full = sizes.words / W;
        const X* x = tokens.x;
        const int32_t* begin = tokens.begin;
        const uint64_t* mask = row.mask;
        const uint8_t* values = row.values;
        for (int64_t i = 0; i < full; ++i, x += W * T * kSize, begin += 16 * T, mask += W, factors += T)
            values = run<T>(total, mask, values, W, x, begin, factors);
        if (full < sizes.runs) run<T>(total, mask, values, sizes.words - full * W, x, begin, factors);
        for (int t = 0; t < T; ++t) sums[t] = sum_of(total[t]);
    }

    template <int R, int T>
    static void product(float (*sums)[T], const Row* row, const Tokens<X>& tokens, const Sizes& sizes,
                        const float* factors) {
        if (sizes.run_words == 1)
            runs<T, 1>(*sums, *row, tokens, sizes, factors);
        else if (sizes.run_words == 2)
            runs<T, 2>(*sums, *row, tokens, sizes, factors);
        else
            runs<T, 4>(*sums, *row, tokens, sizes, factors);
    }
};
#elif defined(__AVX2__)
// bf16 values widened to fp32: those of even columns apart from those of odd ones.
struct Pairs {
    using X = float;
    static constexpr int kTokens = 2, kRows = 2;
    static constexpr bool kScaled = false, kRuns = false, kBiased = false;
    static constexpr int64_t kSize = kWord;

    static void prepare(X* to, const float* x) {
        for (int64_t j = 0; j < kWord; ++j) to[j / 16 * 16 + j % 2 * 8 + j % 16 / 2] = x[j];
    }

    template <int R, int T>
    [[gnu::noinline]] static void product(float (*sums)[T], const Row* rows, const Tokens<X>& tokens,
                                          const Sizes& sizes, const float*) {
        const uint8_t* values[R];
        for (int r = 0; r < R; ++r) values[r] = rows[r].values;
        const float* x = tokens.x;
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        __m256 even[R][T] = {}, odd[R][T] = {};
        for (int64_t w = 0; w < sizes.words; ++w, x += T * kSize) {
            uint64_t masks[R];
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
                masks[r] = rows[r].mask[w];
                _mm_prefetch(values[r] + kAhead, _MM_HINT_T0);
                _mm_prefetch(rows[r].mask + w + kMasksAhead, _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                __m256 x_even[T], x_odd[T];
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t) {
                    x_even[t] = _mm256_load_ps(x + t * kSize + 16 * i);
                    x_odd[t] = _mm256_load_ps(x + t * kSize + 16 * i + 8);
                }
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) {
                    // Eight bits times 16: where their line of the table begins.
                    const uint64_t left = (i ? masks[r] >> (16 * i - 4) : masks[r] << 4) & 0xff0;
                    const uint64_t right = masks[r] >> (16 * i + 4) & 0xff0;
                    const uint8_t* const second = values[r] + 2 * count_of(left);
                    const __m256i wide = _mm256_set_m128i(expand_at(right, second), expand_at(left, values[r]));
                    values[r] = second + 2 * count_of(right);
                    const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
                    const __m256 high = _mm256_castsi256_ps(_mm256_and_si256(wide, upper));
#pragma GCC unroll 2
                    for (int t = 0; t < T; ++t) {
                        even[r][t] = _mm256_fmadd_ps(low, x_even[t], even[r][t]);
                        odd[r][t] = _mm256_fmadd_ps(high, x_odd[t], odd[r][t]);
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) sums[r][t] = sum_of(even[r][t] + odd[r][t]);
    }
};

// int8 values and 16-bit integers.
template <bool Nibbles>
struct Codes {
    using X = int16_t;
    static constexpr int kTokens = 4, kRows = 1;
    static constexpr bool kScaled = true, kRuns = true, kBiased = false;
    static constexpr int64_t kSize = kWord;

    static float prepare(X* to, int64_t step, int32_t*, const float* x, int64_t words) {
        const float scale = run_scale(x, words * kWord), inverse = scale > 0 ? 1 / scale : 0;
        for (int64_t w = 0; w < words; ++w, to += step, x += kWord)
            for (int64_t j = 0; j < kWord; j += kLanes) {
                const IntVec q = nearest(vec(x + j) * inverse);
                for (int64_t i = 0; i < kLanes; ++i) to[j + i] = static_cast<int16_t>(q[i]);
            }
        return scale;
    }

    template <int R, int T>
    [[gnu::noinline]] static void product(float (*sums)[T], const Row* row, const Tokens<X>& tokens, const Sizes& sizes,
                                          const float* factors) {
        const uint8_t* values = row->values;
        const int16_t* x = tokens.x;
        __m256 total[T] = {};
        const __m128i shifted = _mm_set_epi32(0x08080808, 0x08080808, 0, 0);
        for (int64_t run = 0, w = 0; run < sizes.runs; ++run) {
            __m256i sum[T] = {};
            for (const int64_t end = min_of(sizes.words, w + sizes.run_words); w < end; ++w, x += T * kSize) {
                uint64_t mask = row->mask[w];
                _mm_prefetch(values + kAhead, _MM_HINT_T0);
                _mm_prefetch(row->mask + w + kMasksAhead, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i, mask >>= 16) {
                    const uint8_t left = static_cast<uint8_t>(mask), right = static_cast<uint8_t>(mask >> 8);
                    const auto eight = [](const void* at) { return _mm_loadl_epi64(static_cast<const __m128i*>(at)); };
                    const __m128i place =
                        _mm_or_si128(_mm_unpacklo_epi64(eight(kBytes.of[left]), eight(kBytes.of[right])), shifted);
                    const __m128i both = _mm_unpacklo_epi64(eight(values), eight(values + count_of(left)));
                    values += count_of(mask & 0xffff);
                    const __m256i wide = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(both, place));
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t) {
                        const __m256i own = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + t * kSize + 16 * i));
                        sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(wide, own));
                    }
                }
            }
            for (int t = 0; t < T; ++t)
                total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t]), _mm256_set1_ps(factors[run * T + t]), total[t]);
        }
        for (int t = 0; t < T; ++t) sums[0][t] = sum_of(total[t]);
    }
};
#endif

template <class Way, class T>
struct Product {
    using X = typename Way::X;
    static constexpr int64_t kOnce = Way::kTokens;

    const PackedRows& W;
    const T* x;
    const int64_t tokens, x_stride;
    T* const y;
    const int64_t y_stride;
    const float* const bias;
    const int threads;
    const bool unpacks;  // int4 codes to bytes, a row at a time

    const Shape shape{W};
    const int64_t group_words = shape.groups ? W.group / kWord : shape.words;
    const int64_t run_words = Way::kRuns ? min_of(kRunWords, group_words) : max_of<int64_t>(1, group_words);
    const Sizes sizes{shape.words, run_words, ceil_div(shape.words, run_words),
                      max_of<int64_t>(1, group_words / run_words)};
    const int64_t slices = max_of<int64_t>(1, ceil_div(tokens, kOnce));  // of tokens, which are taken together

    int64_t slice(int64_t i) const { return tokens * i / slices; }

    bool run() const {
        Scratch<X> prepared(tokens * shape.words * Way::kSize);
        Scratch<float> scales(Way::kRuns ? tokens * sizes.runs + kLanes : 0);
        Scratch<int32_t> begins(Way::kRuns ? 16 * tokens * sizes.runs : 0);
        const int64_t factors = round_up(Way::kScaled ? Way::kRows * sizes.runs * kOnce + kLanes : 0, 16);
        const int64_t row_codes = unpacks ? round_up(W.columns + 2 * kWord, kCacheLine) : 0;
        const int64_t own = factors + 2 * row_codes / 4;
        Scratch<float> owns(own * threads);
        if (!prepared.data || !scales.data || !begins.data || !owns.data) return false;
        for_each_range(sizes.runs, 1, tokens * W.columns < kParallel ? 1 : threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = 0; i < slices; ++i)
                for (int64_t run = begin; run < end; ++run)
                    prepare(slice(i), slice(i + 1), run, prepared.data, scales.data, begins.data);
        });
        const Parts parts(W, shape, threads);
        for_each_dynamic(parts.count, threads, owns.data, own, [&](int64_t part, float* mine) {
            const Tokens<X> all{prepared.data, scales.data, begins.data};
            const int64_t first = parts.begin(part), end = parts.begin(part + 1);
            if (unpacks) {
                int8_t* codes = reinterpret_cast<int8_t*>(mine + factors);
                int8_t* next = codes + row_codes;
                if (first < end) unpack(codes, first);
                for (int64_t row = first; row < end; ++row) {
                    // One row ahead: what has just been written is slow to read at other boundaries.
                    if (row + 1 < end) unpack(next, row + 1);
                    rows<1>(row, 0, all, mine, reinterpret_cast<const uint8_t*>(codes));
                    int8_t* const other = codes;
                    codes = next;
                    next = other;
                }
                return;
            }
            // Rows that are taken together are far apart, so that each goes on in memory where the one before it ended.
            const int64_t together = Way::kRows > 1 ? (end - first) / Way::kRows : 0;
            for (int64_t i = 0; i < together; ++i) rows<Way::kRows>(first + i, together, all, mine);
            for (int64_t row = first + together * Way::kRows; row < end; ++row) rows<1>(row, 0, all, mine);
        });
        return true;
    }

    void unpack(int8_t* codes, int64_t row) const {
        const int64_t most = 8 * static_cast<int64_t>(W.index[row + 1] - W.index[row]);
        unpack_codes<Way::kBiased>(codes, row_of(W, shape, row).values, most);
    }

    // R rows, each `step` after the one before, times all tokens; `codes` are the values of one row if they are given.
    template <int R>
    void rows(int64_t first, int64_t step, const Tokens<X>& all, float* factors, const uint8_t* codes = nullptr) const {
        Row some[R];
        for (int64_t r = 0; r < R; ++r) {
            some[r] = row_of(W, shape, first + r * step);
            __builtin_prefetch(W.index + first + r * step + kMasksAhead);
        }
        if (codes) some[0].values = codes;
        for (int64_t i = 0; i < slices; ++i) {
            const int64_t t = slice(i), runs = t * sizes.runs;
            const Tokens<X> own{all.x + t * shape.words * Way::kSize, all.scales + runs, all.begin + 16 * runs};
            multiply<R, kOnce>(some, first, step, t, slice(i + 1) - t, own, factors);
        }
    }

    // Run number `run` of the tokens first .. last, which are taken together.
    void prepare(int64_t first, int64_t last, int64_t run, X* prepared, float* scales, int32_t* begins) const {
        const int64_t count = last - first, word = run * run_words, words = min_of(run_words, shape.words - word);
        for (int64_t t = 0; t < count; ++t) {
            const T* const row = x + (first + t) * x_stride;
            X* const to = prepared + (first * shape.words + word * count + t) * Way::kSize;
            if constexpr (Way::kRuns) {
                float wide[kRunWords * kWord];
                for (int64_t w = 0; w < words; ++w) load_word(wide + w * kWord, row, word + w, W.columns);
                const int64_t at = first * sizes.runs + run * count + t;
                scales[at] = Way::prepare(to, count * Way::kSize, begins + 16 * at, wide, words);
            } else {
                for (int64_t w = 0; w < words; ++w) {
                    float wide[kWord];
                    load_word(wide, row, word + w, W.columns);
                    Way::prepare(to + w * count * Way::kSize, wide);
                }
            }
        }
    }

    // factors [runs, N]: a row's scales times those of N tokens, if they have any.
    template <int N>
    void scale(float* factors, const uint16_t* scales, const float* own) const {
        if (N == 1 && Way::kRuns && sizes.group_runs == 1) {  // what lies behind the last scale may be read and written
            typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
            for (int64_t run = 0; run < sizes.runs; run += kLanes) {
                __builtin_prefetch(scales + run + kAhead / 2);
                const IntVec wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(scales + run), IntVec);
                vec(factors + run) = (Vec)(wide << 16) * vec(own + run);
            }
            return;
        }
        if (sizes.group_runs == 1) {
            for (int64_t run = 0; run < sizes.runs; ++run)
                for (int64_t n = 0; n < N; ++n)
                    factors[run * N + n] = to_float(bf16{scales[run]}) * (Way::kRuns ? own[run * N + n] : 1.0f);
            return;
        }
        for (int64_t run = 0; run < sizes.runs; ++scales)
            for (const int64_t end = min_of(sizes.runs, run + sizes.group_runs); run < end; ++run)
                for (int64_t n = 0; n < N; ++n)
                    factors[run * N + n] = to_float(bf16{*scales}) * (Way::kRuns ? own[run * N + n] : 1.0f);
    }

    // R rows times `count` tokens, at most N.
    template <int R, int N>
    void multiply(const Row* rows, int64_t row, int64_t step, int64_t t, int64_t count, const Tokens<X>& some,
                  float* factors) const {
        if constexpr (N > 1)
            if (count < N) return multiply<R, N - 1>(rows, row, step, t, count, some, factors);
        if constexpr (Way::kScaled)
            for (int64_t r = 0; r < R; ++r) scale<N>(factors + r * sizes.runs * N, rows[r].scales, some.scales);
        float sums[R][N];
        Way::template product<R, N>(sums, rows, some, sizes, factors);
        for (int64_t r = 0; r < R; ++r)
            for (int64_t n = 0; n < N; ++n)
                put(y + (t + n) * y_stride + row + r * step, sums[r][n] + (bias ? bias[row + r * step] : 0.0f));
    }
};

}  // namespace

bool rac::RAC_ISA::packed_matmul(void* Y, int64_t y_stride, const void* X, DType x_dtype, int64_t tokens,
                                 int64_t x_stride, const PackedRows& W, const float* bias, int threads) {
    bool done = false;
    with_dtype(x_dtype, [&](auto x_zero) {
        using T = decltype(x_zero);
        const auto run = [&](auto way, bool unpacks) {
            done =
                Product<decltype(way), T>{
                    W, static_cast<const T*>(X), tokens, x_stride, static_cast<T*>(Y), y_stride, bias, threads, unpacks}
                    .run();
        };
        if (W.kind == Values::same) {
            with_dtype(W.dtype, [&](auto w_zero) {
                using V = decltype(w_zero);
#if RAC_EXPAND
                if constexpr (__is_same(V, bf16) && __is_same(T, bf16)) return run(Pairs{}, false);
#elif defined(__AVX2__)
                if constexpr (__is_same(V, bf16)) return run(Pairs{}, false);
#endif
                run(Floats<V>{}, false);
            });
            return;
        }
        const bool nibbles = W.kind == Values::int4;
#if defined(__AVX2__)
        if constexpr (sizeof(T) == 2) {  // 16 bits are not enough for fp32
            if (nibbles)
                run(Codes<true>{}, true);
            else
                run(Codes<false>{}, false);
            return;
        }
#endif
        run(FloatCodes{}, nibbles);
    });
    return done;
}
