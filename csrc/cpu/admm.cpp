// ADMM between two products with the inverse: two passes over memory around the selection.
#include "cpu/select.h"

namespace {

// What stays of each group of a row: all but the group - keep smallest; of equal ones the leftmost goes.
template <int64_t kGroup>
inline void choose_in_row(const float* __restrict scores, uint8_t* __restrict kept, int64_t n, int64_t keep,
                          int64_t any_group) {
    const int64_t group = kGroup ? kGroup : any_group;
    for (int64_t first = 0; first < n; first += group)
        for (int64_t i = 0; i < group; ++i) {
            const float own = scores[first + i];
            int32_t before = 0;  // how many of the group go before this one
            for (int64_t j = 0; j < i; ++j) before += scores[first + j] <= own;
            for (int64_t j = i + 1; j < group; ++j) before += scores[first + j] < own;
            kept[first + i] = before >= group - keep;
        }
}

}  // namespace

bool rac::RAC_ISA::settle(float* T, float* V, uint8_t* kept, const float* goal, uint16_t* gap, int64_t rows, int64_t n,
                          int64_t zeros, int64_t keep, int64_t group, float relaxation, float shrink, int threads) {
    const int64_t count = rows * n;
    const bool selects = !group && zeros > 0;
    Scratch<int64_t> counts(selects ? select_scratch(threads) : 0);
    Scratch<int32_t> keys(selects ? collect_scratch(count, threads) : 0);
    if (!counts.data || !keys.data) return false;
    for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float* const __restrict t = T + row * n;
            float* const __restrict v = V + row * n;
            uint8_t* const __restrict stays = kept + row * n;
            for (int64_t j = 0; j < n; ++j) {
                t[j] += relaxation * (v[j] - (stays[j] ? t[j] : 0.0f));
                v[j] = __builtin_fabsf(t[j]);
            }
            if (group == 4)
                choose_in_row<4>(v, stays, n, keep, group);
            else if (group == 8)
                choose_in_row<8>(v, stays, n, keep, group);
            else if (group)
                choose_in_row<0>(v, stays, n, keep, group);
        }
    });
    float bound = -1;  // what is not above it goes, but for equal ones beyond the first `ties`
    int64_t ties = 0;
    bool tied = false;
    if (selects) {
        const int32_t* scores = reinterpret_cast<const int32_t*>(V);
        const Kth found = kth_smallest_score(scores, count, zeros, counts.data, keys.data, threads);
        bound = from_bits(found.key);
        ties = zeros - found.below;
        tied = ties < found.equal;
    }
    for_each_range(rows, 1, tied ? 1 : threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float* const __restrict t = T + row * n;
            const float* const __restrict v = V + row * n;
            const float* const __restrict aim = goal + row * n;
            uint8_t* const __restrict stays = kept + row * n;
            uint16_t* const __restrict out = gap + row * n;
            if (!group) {
                for (int64_t j = 0; j < n; ++j) stays[j] = !(v[j] <= bound);
                for (int64_t j = 0; tied && j < n; ++j)
                    if (v[j] == bound && ties-- <= 0) stays[j] = 1;
            }
            for (int64_t j = 0; j < n; ++j) {
                t[j] *= stays[j] ? 1.0f : shrink;
                out[j] = to_bf16((stays[j] ? t[j] : -t[j]) - aim[j]).bits;
            }
        }
    });
    return true;
}
