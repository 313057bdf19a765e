// Exact selection by radix on the bit patterns of floats.
#pragma once
#include "cpu/common.h"

namespace {

// Unsigned integers in the order of the floats they stand for; NaN (sign clear) comes last.
inline uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline float unordered(uint32_t key) { return from_bits(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

struct Kth {
    uint32_t key;   // the k-th smallest
    int64_t equal;  // how many keys are equal to it
    int64_t below;  // how many are smaller
};

constexpr int64_t kBins = 2048;
constexpr int64_t kHistograms = 4;  // a thread's own, taken in turn: runs of one bin do not wait for their own stores

inline int64_t select_scratch(int threads) { return threads * kHistograms * kBins; }

// The k-th smallest (1 <= k <= count) of key(0) .. key(count - 1). counts: select_scratch(threads) elements.
template <class F>
Kth kth_smallest_key(int64_t count, int64_t k, int64_t* counts, int threads, const F& key) {
    uint32_t prefix = 0, mask = 0;
    Kth found{0, count, 0};
    const int64_t histograms = count < 8 * kBins ? 1 : kHistograms;  // of few keys clearing and adding takes longer
    constexpr int kShifts[] = {21, 10, 0};
    for (const int shift : kShifts) {
        const uint32_t low = (shift ? kBins : 1024) - 1;
        memset(counts, 0, threads * histograms * kBins * sizeof *counts);
        int64_t taken = 0;
        on_threads(threads, [&](int thread, int) {
            int64_t* mine = counts + thread * histograms * kBins;
            constexpr int64_t kChunk = 1 << 14;
            for (int64_t begin; (begin = __atomic_fetch_add(&taken, kChunk, __ATOMIC_RELAXED)) < count;) {
                const int64_t end = min_of(count, begin + kChunk);
                for (int64_t i = begin; i < end; ++i) {
                    const uint32_t x = key(i);
                    if ((x & mask) == prefix) ++mine[(i & (histograms - 1)) * kBins + ((x >> shift) & low)];
                }
            }
        });
        for (int64_t part = 1; part < threads * histograms; ++part)
            for (int64_t bin = 0; bin <= low; ++bin) counts[bin] += counts[part * kBins + bin];
        uint32_t bin = 0;
        for (; found.below + counts[bin] < k; ++bin) found.below += counts[bin];
        prefix |= bin << shift;
        mask |= low << shift;
        found.equal = counts[bin];
    }
    found.key = prefix;
    return found;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each of the 256 ways to choose from eight lanes, which lanes those are, one after the other.
struct Compress {
    int32_t lanes[256][8];
    constexpr Compress() : lanes{} {
        for (int chosen = 0; chosen < 256; ++chosen)
            for (int lane = 0, at = 0; lane < 8; ++lane)
                if (chosen >> lane & 1) lanes[chosen][at++] = lane;
    }
};
alignas(kCacheLine) constexpr Compress kCompress;
#endif

// Keys in the bracket [low, high] in `from[0 .. count - 1]`, copied to `to`, which has room for a vector more; `below`
// grows by the number of keys that are smaller. How many were copied.
inline int64_t collect(const int32_t* from, int64_t count, int32_t low, int32_t high, int32_t* to, int64_t& below) {
    int64_t found = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i lowest = _mm512_set1_epi32(low), highest = _mm512_set1_epi32(high);
    for (; i + 16 <= count; i += 16) {
        const __m512i x = _mm512_loadu_si512(from + i);
        const __mmask16 small = _mm512_cmplt_epi32_mask(x, lowest);
        const __mmask16 inside = _mm512_cmple_epi32_mask(x, highest) & static_cast<__mmask16>(~small);
        _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(inside, x));
        below += __builtin_popcount(small);
        found += __builtin_popcount(inside);
    }
#elif defined(__AVX2__)
    const __m256i lowest = _mm256_set1_epi32(low), highest = _mm256_set1_epi32(high);
    const auto lanes = [](__m256i x) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(x))); };
    for (; i + 8 <= count; i += 8) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
        const unsigned small = lanes(_mm256_cmpgt_epi32(lowest, x));
        const unsigned inside = (small | lanes(_mm256_cmpgt_epi32(x, highest))) ^ 255;
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompress.lanes[inside]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + found), _mm256_permutevar8x32_epi32(x, order));
        below += __builtin_popcount(small);
        found += __builtin_popcount(inside);
    }
#endif
    for (; i < count; ++i) {
        to[found] = from[i];
        below += from[i] < low;
        found += from[i] >= low && from[i] <= high;
    }
    return found;
}

constexpr int64_t kSample = 4096, kShares = 64;  // sampled at most; an eighth of what there is where that is less
constexpr int64_t kVector = 16;

// Scratch that kth_smallest_score needs for itself, in elements.
inline int64_t collect_scratch(int64_t count, int threads) { return count + 2 * threads * kVector + kSample; }

// kth_smallest_key of numbers that are not negative. Of many only those are sorted out that a sample says are near;
// where it misled, all of them. keys: collect_scratch(count, threads) elements.
inline Kth kth_smallest_score(const int32_t* scores, int64_t count, int64_t k, int64_t* counts, int32_t* keys,
                              int threads) {
    const auto smallest = [&](const int32_t* from, int64_t of, int64_t rank, int team) {
        return kth_smallest_key(of, rank, counts, team, [&](int64_t i) { return static_cast<uint32_t>(from[i]); });
    };
    if (count < 2 * kSample) return smallest(scores, count, k, threads);
    int32_t* sample = keys + count + 2 * threads * kVector;
    const int64_t stride = max_of<int64_t>(count / kSample, 8) | 1;  // odd: no multiple of a tile's rows
    int64_t sampled = 0;
    for (int64_t i = 0; i < count && sampled < kSample; i += stride) sample[sampled++] = scores[i];
    // Four standard deviations of the sample's quantile to either side.
    const int64_t middle = static_cast<int64_t>(static_cast<double>(k) / count * sampled);
    const int64_t margin = static_cast<int64_t>(2 * __builtin_sqrt(static_cast<double>(sampled)));
    const int32_t low = middle <= margin ? 0 : static_cast<int32_t>(smallest(sample, sampled, middle - margin, 1).key);
    const int32_t high = middle + margin >= sampled
                             ? 0x7fffffff
                             : static_cast<int32_t>(smallest(sample, sampled, middle + margin, 1).key);
    // Each thread's share lies one after the other in `keys`, closed up below.
    int64_t below = 0, total = 0, share[kShares] = {};
    const int64_t each = round_up(ceil_div(count, min_of<int64_t>(threads, kShares)), kVector);
    for_each_dynamic(ceil_div(count, each), threads, [&](int64_t part) {
        int64_t mine = 0;
        share[part] = collect(scores + part * each, min_of(each, count - part * each), low, high,
                              keys + part * (each + kVector), mine);
        __atomic_fetch_add(&below, mine, __ATOMIC_RELAXED);
    });
    for (int64_t part = 0; part * each < count; total += share[part++])
        memmove(keys + total, keys + part * (each + kVector), share[part] * sizeof *keys);
    if (k <= below || k > below + total) return smallest(scores, count, k, threads);
    Kth found = smallest(keys, total, k - below, 1);
    found.below += below;
    return found;
}

}  // namespace
