// ADMM's step between two products: two passes over memory around the selection.
#include "cpu/select.h"
#include "cpu/int16_gemm.h"

namespace {

// Choose what stays of each group of a row: all but the group - keep smallest; of equal ones the leftmost goes. Scores
// are not negative.
template <int64_t kGroup>
inline void choose_in_row(const float* __restrict scores, uint8_t* __restrict kept, int64_t n, int64_t keep,
                          int64_t any_group) {
    const int64_t group = kGroup ? kGroup : any_group;
    int64_t first = 0;
#if defined(__AVX2__)
    if (kGroup) {
        // Every lane against the next of its group, the one after that and so on, round the group. As the integers that
        // they are too, no score is negative: not above is below one more.
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), last = _mm256_set1_epi32(kGroup - 1);
        const __m256i own_group = _mm256_andnot_si256(last, lane), goes = _mm256_set1_epi32(group - keep - 1);
        for (; first + 8 <= n; first += 8) {
            const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores + first));
            __m256i before = _mm256_setzero_si256();  // how many of the group go before this one
            for (int round = 1; round < kGroup; ++round) {
                const __m256i next = _mm256_and_si256(_mm256_add_epi32(lane, _mm256_set1_epi32(round)), last);
                const __m256i from = _mm256_or_si256(own_group, next);
                const __m256i left = _mm256_cmpgt_epi32(lane, from);  // -1 where it stands before
                const __m256i other = _mm256_permutevar8x32_epi32(own, from);
                before = _mm256_sub_epi32(before, _mm256_cmpgt_epi32(_mm256_sub_epi32(own, left), other));
            }
            const __m256i stays = _mm256_cmpgt_epi32(before, goes);
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(stays), _mm256_extracti128_si256(stays, 1));
            const __m128i bytes = _mm_and_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(1));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(kept + first), bytes);
        }
    }
#endif
    for (; first < n; first += group)
        for (int64_t i = 0; i < group; ++i) {
            const float own = scores[first + i];
            int32_t before = 0;
            for (int64_t j = 0; j < i; ++j) before += scores[first + j] <= own;
            for (int64_t j = i + 1; j < group; ++j) before += scores[first + j] < own;
            kept[first + i] = before >= group - keep;
        }
}

}  // namespace

bool rac::RAC_ISA::admm_step(float* T, float* V, uint8_t* kept, const float* goal, int32_t* packed, float* scales,
                             int64_t rows, int64_t n, int64_t zeros, int64_t keep, int64_t group, float relaxation,
                             float shrink, int threads) {
    const int64_t count = rows * n;
    const Runs runs(n);
    const bool selects = !group && zeros > 0;
    Scratch<int64_t> counts(selects ? select_scratch(threads) : 0);
    Scratch<int32_t> keys(selects ? collect_scratch(count, threads) : 0);
    if (!counts.data || !keys.data) return false;
    const auto relax = [&](int64_t row) {
        float* const __restrict t = T + row * n;
        float* const __restrict v = V + row * n;
        const uint8_t* const __restrict stays = kept + row * n;
        for (int64_t j = 0; j < n; ++j) {
            t[j] += relaxation * (v[j] - static_cast<float>(stays[j]) * t[j]);
            v[j] = __builtin_fabsf(t[j]);
        }
    };
    const auto finish = [&](int64_t row) {
        float* const __restrict t = T + row * n;
        float* const __restrict v = V + row * n;
        const float* const __restrict aim = goal + row * n;
        const uint8_t* const __restrict stays = kept + row * n;
        for (int64_t j = 0; j < n; ++j) {
            const float stay = stays[j], own = t[j] * stay, gone = t[j] * shrink * (1 - stay);
            t[j] = own + gone;
            v[j] = own - gone - aim[j];
        }
        pack_row(v, packed_row(packed, row, runs), scales + row * runs.count, n, runs);
    };
    if (group) {  // all of a row while it is in the cache
        for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                relax(row);
                if (group == 4)
                    choose_in_row<4>(V + row * n, kept + row * n, n, keep, group);
                else if (group == 8)
                    choose_in_row<8>(V + row * n, kept + row * n, n, keep, group);
                else
                    choose_in_row<0>(V + row * n, kept + row * n, n, keep, group);
                finish(row);
            }
        });
        return true;
    }
    for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) relax(row);
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
            const float* const __restrict v = V + row * n;
            uint8_t* const __restrict stays = kept + row * n;
            const float most = bound;  // a byte that is written could be part of what is held by reference
            const int64_t columns = n;
            for (int64_t j = 0; j < columns; ++j) stays[j] = !(v[j] <= most);
            for (int64_t j = 0; tied && j < n; ++j)
                if (v[j] == bound && ties-- <= 0) stays[j] = 1;
            finish(row);
        }
    });
    return true;
}
