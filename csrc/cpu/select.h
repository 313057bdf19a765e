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
    constexpr int kShifts[] = {21, 10, 0};
    for (const int shift : kShifts) {
        const uint32_t low = (shift ? kBins : 1024) - 1;
        memset(counts, 0, select_scratch(threads) * sizeof *counts);
        int64_t taken = 0;
        on_threads(threads, [&](int thread, int) {
            int64_t* mine = counts + thread * kHistograms * kBins;
            constexpr int64_t kChunk = 1 << 14;
            for (int64_t begin; (begin = __atomic_fetch_add(&taken, kChunk, __ATOMIC_RELAXED)) < count;) {
                const int64_t end = min_of(count, begin + kChunk);
                for (int64_t i = begin; i < end; ++i) {
                    const uint32_t x = key(i);
                    if ((x & mask) == prefix) ++mine[(i % kHistograms) * kBins + ((x >> shift) & low)];
                }
            }
        });
        for (int64_t part = 1; part < threads * kHistograms; ++part)
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

}  // namespace
