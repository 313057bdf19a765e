// Causal attention of short sequences that lie behind one another: scores, shares and outputs in fp32, a few queries at
// a time, so that all of them stay in the cache.
#include "cpu/tile.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t kWide = 4;  // vectors of a panel: with the rows of kQueries, sums that fill the registers
#else
constexpr int64_t kWide = 2;
#endif
constexpr int64_t kPanel = kWide * kLanes, kQueries = 6;

inline void store(bf16* to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t nan = (bits & 0x7fffffff) > 0x7f800000;
    to->bits = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// C[q, :] = sum over k of A[q, k] B[k, :] for a panel B [depth, kPanel] and kQueries rows.
inline void panel_product(float* C, int64_t c_stride, const float* A, int64_t a_stride, const float* B, int64_t depth) {
    Vec sum[kQueries][kWide] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const float* b = B + k * kPanel;
#pragma GCC unroll 6
        for (int64_t q = 0; q < kQueries; ++q)
#pragma GCC unroll 4
            for (int64_t v = 0; v < kWide; ++v) sum[q][v] += vec(b + v * kLanes) * A[q * a_stride + k];
    }
#pragma GCC unroll 6
    for (int64_t q = 0; q < kQueries; ++q)
#pragma GCC unroll 4
        for (int64_t v = 0; v < kWide; ++v) vec(C + q * c_stride + v * kLanes) = sum[q][v];
}

// e^x for x <= 0, to 2e-7; 0 below -87, NaN for NaN.
inline Vec exp_of(Vec x) {
    constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    const IntVec small = x < -87.0f;
    const Vec shifted = x * kLog2E + kRound, n = shifted - kRound;
    const Vec r = x - n * kLn2High - n * kLn2Low;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // The integer lies in the low bits of the shifted number.
    const IntVec power = ((IntVec)shifted + 127) << 23;
    return (Vec)((IntVec)(p * (Vec)power) & ~small);
}

// The shares of `seen` keys in place of their scores s, and zeros in the rest of `length`, a multiple of kLanes;
// returns what they add up to.
inline float shares(float* s, int64_t seen, int64_t length) {
    for (int64_t j = seen; j < length; ++j) s[j] = -__builtin_inff();
    Vec tops = vec(s);
    for (int64_t j = kLanes; j < seen; j += kLanes) tops = vec(s + j) > tops ? vec(s + j) : tops;
    float top = tops[0];
    for (int64_t l = 1; l < kLanes; ++l) top = tops[l] > top ? tops[l] : top;
    Vec sums = {};
    for (int64_t j = 0; j < length; j += kLanes) {
        const Vec share = exp_of(vec(s + j) - top);
        sums += share;
        vec(s + j) = share;
    }
    float sum = 0;
    for (int64_t l = 0; l < kLanes; ++l) sum += sums[l];
    return sum;
}

// Scratch of a thread, in floats.
struct Rooms {
    int64_t keys, values, queries, scores, sums;
    Rooms(int64_t longest, int64_t d, int64_t e)
        : keys(round_up(longest, kPanel) * d),
          values(round_up(e, kPanel) * longest),
          queries(kQueries * d),
          scores(kQueries * round_up(longest + kQueries, kPanel)),
          sums(kQueries * round_up(e, kPanel)) {}
    int64_t all() const { return round_up(keys + values + queries + scores + sums, kLanes); }
};

void attend(bf16* out, const bf16* q, const bf16* k, const bf16* v, const rac::AttentionSizes& sizes, int64_t start,
            int64_t length, int64_t head, const Rooms& rooms, float* scratch) {
    const int64_t d = sizes.d, e = sizes.e, group = sizes.heads / sizes.key_heads, padded = round_up(length, kPanel);
    float *keys = scratch, *values = keys + rooms.keys, *queries = values + rooms.values;
    float *scores = queries + rooms.queries, *sums = scores + rooms.scores;
    k += head * sizes.k_head + start * sizes.k_row;
    v += head * sizes.v_head + start * sizes.v_row;
    for (int64_t first = 0; first < padded; first += kPanel)  // panels [d, kPanel] of keys
        for (int64_t j = 0; j < kPanel; ++j)
            for (int64_t i = 0; i < d; ++i)
                keys[first * d + i * kPanel + j] =
                    first + j < length ? to_float(k[(first + j) * sizes.k_row + i]) : 0.0f;
    for (int64_t first = 0; first < e; first += kPanel)  // panels [length, kPanel] of values
        for (int64_t t = 0; t < length; ++t)
            for (int64_t i = 0; i < kPanel; ++i)
                values[first * length + t * kPanel + i] =
                    first + i < e ? to_float(v[t * sizes.v_row + first + i]) : 0.0f;
    const int64_t score_row = round_up(length + kQueries, kPanel), sum_row = round_up(e, kPanel);
    for (int64_t own = head * group; own < (head + 1) * group; ++own) {
        for (int64_t at = 0; at < length; at += kQueries) {
            const int64_t rows = min_of(kQueries, length - at), seen = at + rows;
            for (int64_t r = 0; r < kQueries; ++r) {
                const bf16* row = q + own * sizes.q_head + (start + min_of(at + r, length - 1)) * sizes.q_row;
                for (int64_t i = 0; i < d; ++i) queries[r * d + i] = to_float(row[i]) * sizes.scale;
            }
            for (int64_t first = 0; first < seen; first += kPanel)
                panel_product(scores + first, score_row, queries, d, keys + first * d, d);
            float whole[kQueries];
            for (int64_t r = 0; r < kQueries; ++r)
                whole[r] = shares(scores + r * score_row, min_of(at + r + 1, length), round_up(seen, kLanes));
            for (int64_t first = 0; first < e; first += kPanel)
                panel_product(sums + first, sum_row, scores, score_row, values + first * length, seen);
            for (int64_t r = 0; r < rows; ++r) {
                bf16* to = out + ((start + at + r) * sizes.heads + own) * e;
                const float* from = sums + r * sum_row;
                for (int64_t i = 0; i < e; ++i) store(to + i, from[i] / whole[r]);
            }
        }
    }
}

}  // namespace

bool rac::RAC_ISA::attention(void* out, const void* q, const void* k, const void* v, const AttentionSizes& sizes,
                             const int64_t* starts, int64_t sequences, int threads) {
    int64_t longest = 1;
    for (int64_t i = 0; i < sequences; ++i) longest = max_of(longest, starts[i + 1] - starts[i]);
    const Rooms rooms(longest, sizes.d, sizes.e);
    const int64_t items = sequences * sizes.key_heads, team = min_of<int64_t>(threads, max_of<int64_t>(items, 1));
    Scratch<float> scratch(team * rooms.all());
    if (!scratch.data) return false;
    for_each_dynamic(items, static_cast<int>(team), scratch.data, rooms.all(), [&](int64_t item, float* own) {
        const int64_t sequence = item / sizes.key_heads, head = item % sizes.key_heads;
        attend(static_cast<bf16*>(out), static_cast<const bf16*>(q), static_cast<const bf16*>(k),
               static_cast<const bf16*>(v), sizes, starts[sequence], starts[sequence + 1] - starts[sequence], head,
               rooms, own);
    });
    return true;
}
