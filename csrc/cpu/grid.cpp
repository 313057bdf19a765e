// Rounding of kept weights to a grid, a block of columns at a time: rows do not depend on each other, and a row's block
// of residuals stays in the first-level cache while its weights are gone through.
#include "cpu/common.h"

namespace {

constexpr float kInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers

// x rounded to the dtype, to nearest, ties to even. Those too small for fp16's full precision keep more of it.
inline float stored(float x, DType dtype) {
    if (dtype == DType::float32) return x;
    const uint32_t drop = dtype == DType::bfloat16 ? 16 : 13;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits += (1u << (drop - 1)) - 1 + (bits >> drop & 1);
    return from_bits(bits >> drop << drop);
}

}  // namespace

void rac::RAC_ISA::grid_walk(float* Q, int64_t q_stride, float* pull, int64_t pull_stride, const uint8_t* mask,
                             int64_t mask_stride, const float* scales, int64_t scale_stride, const float* H,
                             const float* inverse, int64_t largest, DType dtype, int64_t rows, int64_t columns,
                             int threads) {
    const float most = static_cast<float>(largest);
    for_each_range(rows, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float scale = scales[row * scale_stride];
            if (!(scale > 0)) continue;
            float* const __restrict q = Q + row * q_stride;
            float* const __restrict p = pull + row * pull_stride;
            const uint8_t* const kept = mask + row * mask_stride;
            for (int64_t j = 0; j < columns; ++j) {
                if (!kept[j]) continue;
                const float wanted = (q[j] + p[j] * inverse[j]) / scale;
                float code = wanted > most ? most : wanted;
                code = code < -most ? -most : code;
                code = (code + kInteger) - kInteger;
                const float found = stored(code * scale, dtype), step = found - q[j];
                if (step == 0) continue;
                q[j] = found;
                const float* const __restrict across = H + j * columns;
                for (int64_t k = 0; k < columns; ++k) p[k] -= step * across[k];
            }
        }
    });
}
