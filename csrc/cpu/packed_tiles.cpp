// Products of many tokens with packed matrices: a few rows at a time are expanded, a block of columns that stays in the
// cache, and multiplied by all tokens, kRows rows by kTokens tokens of sums in registers. Numbers are those of the dense
// matrix, int8 and int4 values being rounded as rac_kernels/ops/packed.py says. With AVX-512 products of bf16 are by
// VDPBF16PS, else all is in fp32. What is multiplied next is fetched meanwhile.
#include "cpu/packed.h"

namespace {

constexpr int64_t kGroup = 16;       // rows that are expanded together
constexpr int64_t kBlockWords = 28;  // words of a block of columns, at most

// Bytes that are fetched at each step, of what is expanded next.
struct Ahead {
    const char* at;
    int64_t step;

    void fetch() {
        const char* const end = at + step;
        for (const char* line = at; line < end; line += kCacheLine) __builtin_prefetch(line, 0, 2);
        at = end;
    }
};

// To bf16, as fp32.
inline Vec rounded_to_bf16(Vec x) {
    const IntVec bits = (IntVec)x;
    return (Vec)((bits + 0x7fff + (bits >> 16 & 1)) & static_cast<int32_t>(0xffff0000u));
}

// Ways to multiply. A way has: E, the element of tiles; kRows and kTokens; `prepare`, 64 columns of X; `same`, `bytes`
// and `nibbles`, a word of W whose kept values begin `at` values after the row's first; and `dots`, of T tokens.

// In fp32.
struct InFloats {
    using E = float;
    static constexpr int64_t kRows = 4, kTokens = kLanes == 16 ? 6 : 3, kStep = kLanes;

    template <class T>
    static void prepare(E* to, const T* x, int64_t word, int64_t columns) {
        load_word(to, x, word, columns);
    }

    template <class V>
    static void same(E* to, uint64_t mask, const uint8_t* values, int64_t at) {
        expand_word(to, mask, reinterpret_cast<const V*>(values) + at);
    }

    template <class V>
    static void scaled(E* to, float scale) {
        if constexpr (__is_same(V, fp16)) {
            for (int64_t j = 0; j < kWord; ++j) {
                fp16 rounded;
                put(&rounded, to[j] * scale);
                to[j] = to_float(rounded);
            }
            return;
        }
        for (int64_t j = 0; j < kWord; j += kLanes)
            vec(to + j) = __is_same(V, bf16) ? rounded_to_bf16(vec(to + j) * scale) : vec(to + j) * scale;
    }

    template <class V>
    static void bytes(E* to, uint64_t mask, const uint8_t* values, int64_t at, float scale) {
        expand_word(to, mask, reinterpret_cast<const int8*>(values + at));
        scaled<V>(to, scale);
    }

    template <class V>
    static void nibbles(E* to, uint64_t mask, const uint8_t* values, int64_t at, float scale) {
        int8_t codes[2 * kWord];
        unpack_codes<false>(codes, values + at / 2, kWord + at % 2);
        expand_word(to, mask, reinterpret_cast<const int8*>(codes + at % 2));
        scaled<V>(to, scale);
    }

    // sums[t * kGroup + r] (+)= <row r of w, token t of x>.
    template <int T>
    [[gnu::noinline]] static void dots(float* sums, const E* w, int64_t w_step, const E* x, int64_t x_step,
                                       int64_t count, bool more, Ahead ahead) {
        Vec sum[kRows][T] = {};
        for (int64_t j = 0; j < count; j += kLanes) {
            ahead.fetch();
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const Vec left = vec(w + r * w_step + j);
#pragma GCC unroll 6
                for (int t = 0; t < T; ++t) sum[r][t] += left * vec(x + t * x_step + j);
            }
        }
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < kRows; ++r) {
                float* const to = sums + t * kGroup + r;
                *to = sum_of(sum[r][t]) + (more ? *to : 0.0f);
            }
    }
};

#if RAC_EXPAND
// In bf16, both of them.
struct InPairs {
    using E = bf16;
    static constexpr int64_t kRows = 4, kTokens = 5, kStep = 32;

    static void prepare(E* to, const bf16* x, int64_t word, int64_t columns) {
        const int64_t first = word * kWord, count = min_of(kWord, columns - first);
        memcpy(to, x + first, count * sizeof(bf16));
        memset(to + count, 0, (kWord - count) * sizeof(bf16));
    }

    template <class V>
    static void same(E* to, uint64_t mask, const uint8_t* values, int64_t at) {
        spread_word(to, mask, reinterpret_cast<const bf16*>(values) + at);
    }

    template <class V>
    static void bytes(E* to, uint64_t mask, const uint8_t* values, int64_t at, float scale) {
        const __m512i codes = expand_8(mask, load(values + at));
        const __m512 factor = _mm512_set1_ps(scale);
        const auto wide = [&](__m128i some) {
            return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some)), factor);
        };
        const __m512 a = wide(_mm512_castsi512_si128(codes)), b = wide(_mm512_extracti32x4_epi32(codes, 1));
        const __m512 c = wide(_mm512_extracti32x4_epi32(codes, 2)), d = wide(_mm512_extracti32x4_epi32(codes, 3));
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        _mm512_storeu_si512(to + 32, (__m512i)_mm512_cvtne2ps_pbh(d, c));
    }

    // Each code's number is looked up: there are but sixteen, twice in a register.
    template <class V>
    static void nibbles(E* to, uint64_t mask, const uint8_t* values, int64_t at, float scale) {
        const __m512 codes = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m256i numbers = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(scale)));
        const __m512i table = _mm512_broadcast_i64x4(numbers);
        // Each eight bytes from those that hold eight nibbles, the first of them in the upper half of a byte if at is odd.
        const __m512i eights =
            _mm512_set_epi64(0x232221201f1e1d1c, 0x1f1e1d1c1b1a1918, 0x1b1a191817161514, 0x1716151413121110,
                             0x131211100f0e0d0c, 0x0f0e0d0c0b0a0908, 0x0b0a090807060504, 0x0706050403020100);
        const __m512i places = _mm512_set1_epi64(at & 1 ? 0x201c1814100c0804 : 0x1c1814100c080400);
        const __m512i spread = _mm512_permutexvar_epi8(eights, load(values + at / 2));
        const __m512i found = expand_8(mask, _mm512_multishift_epi64_epi8(places, spread));
        const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(found));
        const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(found, 1));
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(low, table));
        _mm512_storeu_si512(to + 32, _mm512_permutexvar_epi16(high, table));
    }

    // sums[t * kGroup + r] (+)= <row r of w, token t of x>.
    template <int T>
    [[gnu::noinline]] static void dots(float* sums, const E* w, int64_t w_step, const E* x, int64_t x_step,
                                       int64_t count, bool more, Ahead ahead) {
        __m512 sum[kRows][T] = {};
        for (int64_t j = 0; j < count; j += 32) {
            ahead.fetch();
            __m512bh left[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) left[r] = (__m512bh)load(w + r * w_step + j);
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t) {
                const __m512bh right = (__m512bh)load(x + t * x_step + j);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], left[r], right);
            }
        }
        for (int t = 0; t < T; ++t) {
            const auto halves = [](__m512 a, __m512 b) {
                return (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
            };
            const __m512d a = halves(sum[0][t], sum[1][t]), b = halves(sum[2][t], sum[3][t]);
            const __m512 rows = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
            const __m256 half = _mm512_castps512_ps256(rows) + _mm512_extractf32x8_ps(rows, 1);
            const __m128 all = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
            float* const to = sums + t * kGroup;
            _mm_storeu_ps(to, more ? all + _mm_loadu_ps(to) : all);
        }
    }
};
#endif

template <class Way, class V, class T>
struct TileProduct {
    using E = typename Way::E;

    const PackedRows& W;
    const T* x;
    const int64_t tokens, x_stride;
    T* const y;
    const int64_t y_stride;
    const float* const bias;
    const int threads;

    const Shape shape{W};
    const int64_t group_words = shape.groups ? W.group / kWord : 1;
    const int64_t blocks = max_of<int64_t>(1, ceil_div(shape.words, kBlockWords));
    const int64_t block_words = ceil_div(shape.words, blocks);
    // Rows one cache line further apart than they are long: many of them would share a place in the cache.
    const int64_t x_step = shape.words * kWord + kCacheLine / sizeof(E);
    const int64_t w_step = block_words * kWord + kCacheLine / sizeof(E);
    const int64_t slices = ceil_div(tokens, Way::kTokens);

    int64_t slice(int64_t i) const { return tokens * i / slices; }

    bool run() const {
        const int64_t tile = round_up(kGroup * w_step * sizeof(E) / sizeof(float), kCacheLine / sizeof(float));
        const int64_t own = tile + round_up(kGroup * tokens, kCacheLine / sizeof(float));
        Scratch<E> prepared(tokens * x_step);
        Scratch<float> owns(own * threads);
        if (!prepared.data || !owns.data) return false;
        for_each_range(tokens, 1, tokens * W.columns < kParallel ? 1 : threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t)
                for (int64_t w = 0; w < shape.words; ++w)
                    Way::prepare(prepared.data + t * x_step + w * kWord, x + t * x_stride, w, W.columns);
        });
        const Parts parts(W, shape, threads);
        for_each_dynamic(parts.count, threads, owns.data, own, [&](int64_t part, float* mine) {
            const int64_t end = parts.begin(part + 1);
            for (int64_t row = parts.begin(part); row < end; row += kGroup)
                group(row, min_of(kGroup, end - row), prepared.data, reinterpret_cast<E*>(mine), mine + tile);
        });
        return true;
    }

    const uint8_t* values_of(int64_t row) const { return W.values + 4 * static_cast<int64_t>(W.index[row]); }

    // Rows first .. first + count.
    void group(int64_t first, int64_t count, const E* prepared, E* tile, float* sums) const {
        const int64_t tiles = ceil_div(count, Way::kRows), next = min_of(first + count + kGroup, W.rows);
        const char* ahead = reinterpret_cast<const char*>(values_of(first + count));
        const int64_t bytes = reinterpret_cast<const char*>(values_of(next)) - ahead, steps = blocks * slices * tiles;
        const int64_t share = ceil_div(bytes, steps * block_words * kWord / Way::kStep);
        int64_t at[kGroup] = {};
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t word = block * block_words, words = min_of(block_words, shape.words - word);
            for (int64_t r = 0; r < tiles * Way::kRows; ++r)
                if (r < count)
                    at[r] = expand(tile + r * w_step, first + r, word, words, at[r]);
                else
                    memset(tile + r * w_step, 0, words * kWord * sizeof(E));
            for (int64_t i = 0; i < slices; ++i) {
                const int64_t t = slice(i);
                for (int64_t r = 0; r < tiles; ++r) {
                    dots<Way::kTokens>(slice(i + 1) - t, sums + t * kGroup + r * Way::kRows,
                                       tile + r * Way::kRows * w_step, prepared + t * x_step + word * kWord,
                                       words * kWord, block > 0, Ahead{ahead, share});
                    ahead += words * kWord / Way::kStep * share;
                }
            }
        }
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t r = 0; r < count; ++r)
                put(y + t * y_stride + first + r, sums[t * kGroup + r] + (bias ? bias[first + r] : 0.0f));
    }

    // Words of a row, of which `at` values have been expanded; returns how many there are then.
    int64_t expand(E* to, int64_t row, int64_t word, int64_t words, int64_t at) const {
        const uint64_t* const mask = W.mask + row * shape.words + word;
        const uint8_t* const values = values_of(row);
        if (W.kind == Values::same) {
            for (int64_t w = 0; w < words; ++w, to += kWord) {
                Way::template same<V>(to, mask[w], values, at);
                at += count_of(mask[w]);
            }
            return at;
        }
        const bool nibbles = W.kind == Values::int4;
        const uint16_t* const scales = W.scales + row * shape.groups;
        for (int64_t w = 0; w < words;) {
            const int64_t group = (word + w) / group_words, end = min_of(words, (group + 1) * group_words - word);
            const float scale = to_float(bf16{scales[group]});
            for (; w < end; ++w, to += kWord) {
                if (nibbles)
                    Way::template nibbles<V>(to, mask[w], values, at, scale);
                else
                    Way::template bytes<V>(to, mask[w], values, at, scale);
                at += count_of(mask[w]);
            }
        }
        return at;
    }

    // `count` tokens, at most N.
    template <int N>
    void dots(int64_t count, float* sums, const E* w, const E* x, int64_t columns, bool more, Ahead ahead) const {
        if constexpr (N > 1)
            if (count < N) return dots<N - 1>(count, sums, w, x, columns, more, ahead);
        Way::template dots<N>(sums, w, w_step, x, x_step, columns, more, ahead);
    }
};

}  // namespace

bool rac::RAC_ISA::packed_tiles(void* Y, int64_t y_stride, const void* X, DType x_dtype, int64_t tokens,
                                int64_t x_stride, const PackedRows& W, const float* bias, int threads) {
    bool done = false;
    with_dtype(x_dtype, [&](auto x_zero) {
        using T = decltype(x_zero);
        with_dtype(W.dtype, [&](auto w_zero) {
            using V = decltype(w_zero);
            const auto run = [&](auto way) {
                done =
                    TileProduct<decltype(way), V, T>{
                        W, static_cast<const T*>(X), tokens, x_stride, static_cast<T*>(Y), y_stride, bias, threads}
                        .run();
            };
#if RAC_EXPAND
            if constexpr (__is_same(V, bf16) && __is_same(T, bf16)) return run(InPairs{});
#endif
            run(InFloats{});
        });
    });
    return done;
}

namespace {

// out = W; a word at a time, the last of a row by way of a buffer.
template <class T, class F>
bool expand_rows(T* out, const PackedRows& W, const Shape& shape, int threads, const F& word_of) {
    const int64_t own = W.kind == Values::int4 ? round_up(W.columns + 2 * kWord, kCacheLine) / 4 : 0;
    const Parts parts(W, shape, threads);
    Scratch<float> codes(own * threads);
    if (!codes.data) return false;
    for_each_dynamic(parts.count, threads, codes.data, own, [&](int64_t part, float* mine) {
        for (int64_t r = parts.begin(part), end = parts.begin(part + 1); r < end; ++r) {
            const Row row = row_of(W, shape, r);
            const uint8_t* values = row.values;
            if (W.kind == Values::int4) {
                unpack_codes<false>(reinterpret_cast<int8_t*>(mine), values,
                                    8 * static_cast<int64_t>(W.index[r + 1] - W.index[r]));
                values = reinterpret_cast<const uint8_t*>(mine);
            }
            for (int64_t w = 0; w < shape.words; ++w) {
                T buffer[kWord], *const to = out + r * W.columns + w * kWord;
                const int64_t columns = min_of(kWord, W.columns - w * kWord);
                values = word_of(columns < kWord ? buffer : to, row, w, values);
                if (columns < kWord) memcpy(to, buffer, columns * sizeof(T));
            }
        }
    });
    return true;
}

}  // namespace

bool rac::RAC_ISA::packed_expand(void* out, DType dtype, const PackedRows& W, int threads) {
    const Shape shape(W);
    bool done = false;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T* const to = static_cast<T*>(out);
        if (W.kind == Values::same && W.dtype == dtype) {
            done = expand_rows(to, W, shape, threads, [](T* to, const Row& row, int64_t w, const uint8_t* values) {
                spread_word(to, row.mask[w], reinterpret_cast<const T*>(values));
                return values + count_of(row.mask[w]) * sizeof(T);
            });
        } else if (W.kind == Values::same) {
            with_dtype(W.dtype, [&](auto own) {
                using V = decltype(own);
                done = expand_rows(to, W, shape, threads, [](T* to, const Row& row, int64_t w, const uint8_t* values) {
                    float wide[kWord];
                    expand_word(wide, row.mask[w], reinterpret_cast<const V*>(values));
                    for (int64_t j = 0; j < kWord; ++j) put(to + j, wide[j]);
                    return values + count_of(row.mask[w]) * sizeof(V);
                });
            });
        } else {
            with_dtype(W.dtype, [&](auto own) {
                using V = decltype(own);
                const int64_t group_words = W.group / kWord;
                done = expand_rows(to, W, shape, threads, [&](T* to, const Row& row, int64_t w, const uint8_t* values) {
                    const float scale = to_float(bf16{row.scales[w / group_words]});
                    float wide[kWord];
                    V rounded[kWord];
                    expand_word(wide, row.mask[w], reinterpret_cast<const int8*>(values));
                    for (int64_t j = 0; j < kWord; ++j) put(rounded + j, wide[j] * scale);
                    for (int64_t j = 0; j < kWord; ++j) put(to + j, to_float(rounded[j]));
                    return values + count_of(row.mask[w]);
                });
            });
        }
    });
    return done;
}