// The k-th smallest of many floats.
#include "cpu/select.h"

bool rac::RAC_ISA::kth_smallest(const float* scores, int64_t count, int64_t k, float* result, int threads) {
    Scratch<int64_t> counts(select_scratch(threads));
    if (!counts.data) return false;
    *result =
        unordered(kth_smallest_key(count, k, counts.data, threads, [&](int64_t i) { return ordered(scores[i]); }).key);
    return true;
}
