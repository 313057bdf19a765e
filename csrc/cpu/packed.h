// Rows of a packed matrix (rac_kernels/ops/packed.py), expanded: shared by the products with few and with many tokens.
// VPEXPAND only from register to register: the form that reads memory is microcoded on Zen 4.
#pragma once
#include "cpu/tile.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the headers of GCC 12 themselves
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define RAC_EXPAND 1
#else
#define RAC_EXPAND 0
#endif

namespace {

using rac::PackedRows;
using rac::Values;

constexpr int64_t kWord = 64;            // columns of a word
constexpr int64_t kAhead = 2048;         // bytes of values that are fetched ahead
constexpr int64_t kParallel = 1 << 16;   // elements of X that are prepared by more than one thread
constexpr int64_t kMasksAhead = 256;     // words of the mask that are fetched ahead
constexpr int64_t kPartBytes = 1 << 17;  // that are worth a thread's while

// The sum of a vector's numbers, by halves.
template <class V>
inline float sum_of(V v) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[sizeof v / sizeof(Four)];
    memcpy(parts, &v, sizeof v);
    for (size_t i = 1; i < sizeof v / sizeof(Four); ++i) parts[0] += parts[i];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// To bf16 or fp16, to the nearest, ties to even.
inline uint16_t bf16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t fp16_bits(float x) {
#if defined(__F16C__)
    return static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or beyond
    if (rest < 0x38800000) {  // below 2^-14: what is added leaves the subnormal's bits at the end
        const float shifted = from_bits(rest) + 0.5f;
        memcpy(&bits, &shifted, sizeof bits);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
#endif
}

inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) { to->bits = bf16_bits(x); }
inline void put(fp16* to, float x) { to->bits = fp16_bits(x); }

struct int8 { int8_t code; };
inline float to_float(int8 x) { return x.code; }

// Where the bytes of eight columns, Size each, come from among those of the kept; 0x80 where a column is not.
template <int Size>
struct Places {
    uint8_t of[256][8 * Size];
    constexpr Places() : of() {
        for (int mask = 0; mask < 256; ++mask)
            for (int column = 0, place = 0; column < 8; ++column) {
                const bool kept = mask >> column & 1;
                for (int i = 0; i < Size; ++i)
                    of[mask][Size * column + i] = static_cast<uint8_t>(kept ? Size * place + i : 0x80);
                place += kept;
            }
    }
};
alignas(kCacheLine) constexpr Places<1> kBytes;
alignas(kCacheLine) constexpr Places<2> kPairs;

inline int64_t count_of(uint64_t mask) { return __builtin_popcountll(mask); }

// A row: its mask, and the bytes that its values begin at.
struct Row {
    const uint64_t* mask;
    const uint8_t* values;
    const uint16_t* scales;
};

struct Shape {
    int64_t words, groups;
    explicit Shape(const PackedRows& W)
        : words(ceil_div(W.columns, kWord)), groups(W.scales ? ceil_div(W.columns, W.group) : 0) {}
};

inline Row row_of(const PackedRows& W, const Shape& shape, int64_t row) {
    return {W.mask + row * shape.words, W.values + 4 * static_cast<int64_t>(W.index[row]),
            W.scales ? W.scales + row * shape.groups : nullptr};
}

// Nibbles to bytes, plus 8 if they are to be `Biased`: `count` codes, and up to 63 beyond them, are written.
template <bool Biased>
inline void unpack_codes(int8_t* to, const uint8_t* from, int64_t count) {
#if defined(__AVX512BW__)
    const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(8);
    for (int64_t i = 0; i < count; i += 64) {
        _mm_prefetch(from + i / 2 + kAhead, _MM_HINT_T0);
        const __m512i two = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i / 2)));
        // (two | two << 4) & 15
        const __m512i one = _mm512_ternarylogic_epi32(two, _mm512_slli_epi16(two, 4), nibble, 0xa8);
        const __m512i biased = _mm512_xor_si512(one, sign);
        _mm512_storeu_si512(to + i, Biased ? biased : _mm512_sub_epi8(biased, sign));
    }
#elif defined(__AVX2__)
    const __m256i nibble = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(8);
    for (int64_t i = 0; i < count; i += 32) {
        _mm_prefetch(from + i / 2 + kAhead, _MM_HINT_T0);
        const __m256i two = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i / 2)));
        const __m256i one = _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi16(two, 4)), nibble);
        const __m256i biased = _mm256_xor_si256(one, sign);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), Biased ? biased : _mm256_sub_epi8(biased, sign));
    }
#else
    for (int64_t i = 0; i < count; i += 2) {
        const uint8_t two = from[i / 2];
        to[i] = static_cast<int8_t>(((two & 15) ^ 8) - (Biased ? 0 : 8));
        to[i + 1] = static_cast<int8_t>(((two >> 4) ^ 8) - (Biased ? 0 : 8));
    }
#endif
}

#if defined(__AVX512F__)
// 64 bytes, in a register: the compiler may not make them an operand in memory of what comes next.
inline __m512i load(const void* from) {
    __m512i found = _mm512_loadu_si512(from);
    asm("" : "+v"(found));
    return found;
}
#endif

#if RAC_EXPAND
// VPEXPAND waits for what was in the register that it writes, on Zen 4 even where that is to become zero. So the register
// is cleared first, by an instruction that waits for nothing, and the compiler must not know it is zero.
inline __m512i cleared() {
    __m512i zero = _mm512_setzero_si512();
    asm("" : "+v"(zero));
    return zero;
}
// A mask from memory straight into a register for masks: by way of a general one costs VPEXPAND's ports twice as much.
inline __mmask64 mask_64(const uint64_t* from) {
    __mmask64 mask;
    asm("kmovq %1, %0" : "=k"(mask) : "m"(*from));
    return mask;
}
inline __m512i expand_16(__mmask32 mask, __m512i values) { return _mm512_mask_expand_epi16(cleared(), mask, values); }
inline __m512i expand_8(__mmask64 mask, __m512i values) { return _mm512_mask_expand_epi8(cleared(), mask, values); }
#endif

// The 64 columns of a word in fp32, zeros for what is not kept; `values` are the kept ones, of which 64 bytes and more
// may be read.
template <class T>
inline void expand_word(float* to, uint64_t mask, const T* values) {
    memset(to, 0, kWord * sizeof(float));
    for (; mask; mask &= mask - 1) to[__builtin_ctzll(mask)] = to_float(*values++);
}

#if defined(__AVX512F__)
inline void expand_word(float* to, uint64_t mask, const float* values) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, mask >>= 16) {
        const __mmask16 own = static_cast<__mmask16>(mask);
        _mm512_storeu_ps(to + 16 * i, _mm512_maskz_expand_ps(own, _mm512_castsi512_ps(load(values))));
        values += count_of(own);
    }
}
#endif

#if defined(__AVX2__)
#if !defined(__AVX512F__)
inline void expand_word(float* to, uint64_t mask, const float* values) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, mask >>= 8) {
        const uint8_t own = static_cast<uint8_t>(mask);
        const __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBytes.of[own])));
        const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), place);
        _mm256_storeu_ps(to + 8 * i, _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), found));
        values += count_of(own);
    }
}
#endif

// Eight columns of 16-bit values; `offset` is 16 times their mask.
inline __m128i expand_at(uint64_t offset, const void* values) {
    return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)),
                            _mm_load_si128(reinterpret_cast<const __m128i*>(kPairs.of[0] + offset)));
}
inline __m128i expand_pairs(uint8_t mask, const void* values) { return expand_at(16 * mask, values); }

inline void expand_word(float* to, uint64_t mask, const bf16* values) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, mask >>= 8) {
        const uint8_t own = static_cast<uint8_t>(mask);
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(expand_pairs(own, values)), 16);
        _mm256_storeu_ps(to + 8 * i, _mm256_castsi256_ps(wide));
        values += count_of(own);
    }
}

inline void expand_word(float* to, uint64_t mask, const fp16* values) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, mask >>= 8) {
        const uint8_t own = static_cast<uint8_t>(mask);
        _mm256_storeu_ps(to + 8 * i, _mm256_cvtph_ps(expand_pairs(own, values)));
        values += count_of(own);
    }
}

inline void expand_word(float* to, uint64_t mask, const int8* values) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, mask >>= 8) {
        const uint8_t own = static_cast<uint8_t>(mask);
        const __m128i place = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBytes.of[own]));
        const __m128i found = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)), place);
        _mm256_storeu_ps(to + 8 * i, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(found)));
        values += count_of(own);
    }
}
#endif

// A word's columns as they are.
template <class T>
inline void spread_word(T* to, uint64_t mask, const T* values) {
    memset(to, 0, kWord * sizeof(T));
    for (; mask; mask &= mask - 1) to[__builtin_ctzll(mask)] = *values++;
}

inline void spread_word(float* to, uint64_t mask, const float* values) { expand_word(to, mask, values); }

#if defined(__AVX2__)
template <class T>
inline void spread_pairs(T* to, uint64_t mask, const T* values) {
#if RAC_EXPAND
    const uint32_t low = static_cast<uint32_t>(mask), high = static_cast<uint32_t>(mask >> 32);
    _mm512_storeu_si512(to, expand_16(low, load(values)));
    _mm512_storeu_si512(to + 32, expand_16(high, load(values + count_of(low))));
#else
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, mask >>= 8) {
        const uint8_t own = static_cast<uint8_t>(mask);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i), expand_pairs(own, values));
        values += count_of(own);
    }
#endif
}

inline void spread_word(bf16* to, uint64_t mask, const bf16* values) { spread_pairs(to, mask, values); }
inline void spread_word(fp16* to, uint64_t mask, const fp16* values) { spread_pairs(to, mask, values); }
#endif

// A token's 64 columns of a word, in fp32, zeros beyond the last.
template <class T>
inline void load_word(float* to, const T* x, int64_t word, int64_t columns) {
    const int64_t first = word * kWord;
    if (first + kWord <= columns) {
        for (int64_t j = 0; j < kWord; ++j) to[j] = to_float(x[first + j]);
        return;
    }
    for (int64_t j = 0; j < kWord; ++j) to[j] = first + j < columns ? to_float(x[first + j]) : 0;
}

// The rows at which parts of about the same number of bytes begin.
struct Parts {
    const PackedRows& W;
    int64_t row_bytes, total, count;

    Parts(const PackedRows& W, const Shape& shape, int threads)
        : W(W), row_bytes(8 * shape.words + 2 * shape.groups), total(cost(W.rows)) {
        count = threads == 1 ? 1 : max_of<int64_t>(1, min_of<int64_t>(total / kPartBytes, 4 * threads));
    }

    int64_t cost(int64_t row) const { return 4 * static_cast<int64_t>(W.index[row] - W.index[0]) + row * row_bytes; }

    int64_t begin(int64_t part) const {
        int64_t low = 0, high = W.rows;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (cost(middle) * count < total * part)
                low = middle + 1;
            else
                high = middle;
        }
        return part == count ? W.rows : low;
    }
};

}  // namespace
