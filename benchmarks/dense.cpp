// The rival of packed matrices: y = W x of a dense bf16 matrix, as fast as this machine reads it. benchmarks/packed.py
// compiles it with the flags of the instruction set in use.
#include <immintrin.h>
#include <stdint.h>

extern "C" __attribute__((visibility("default"))) void dense_bf16(float* y, const uint16_t* W, const uint16_t* x,
                                                                   int64_t rows, int64_t columns, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const uint16_t* const w = W + r * columns;
        float rest = 0;
        int64_t j = 0;
#if defined(__AVX512BF16__)
        __m512 sums[4] = {};
        for (; j + 128 <= columns; j += 128)
            for (int64_t k = 0; k < 4; ++k) {
                _mm_prefetch(w + j + 32 * k + 1024, _MM_HINT_T0);
                const __m512i left = _mm512_loadu_si512(w + j + 32 * k), right = _mm512_loadu_si512(x + j + 32 * k);
                sums[k] = _mm512_dpbf16_ps(sums[k], (__m512bh)left, (__m512bh)right);
            }
        rest = _mm512_reduce_add_ps((sums[0] + sums[1]) + (sums[2] + sums[3]));
#elif defined(__AVX2__)
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        __m256 sums[4] = {};
        for (; j + 32 <= columns; j += 32) {
            _mm_prefetch(w + j + 1024, _MM_HINT_T0);
            for (int64_t k = 0; k < 2; ++k) {
                const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + j + 16 * k));
                const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j + 16 * k));
                sums[2 * k] = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(a, 16), (__m256)_mm256_slli_epi32(b, 16),
                                              sums[2 * k]);
                sums[2 * k + 1] =
                    _mm256_fmadd_ps((__m256)(a & upper), (__m256)(b & upper), sums[2 * k + 1]);
            }
        }
        const __m256 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        for (int i = 0; i < 8; ++i) rest += sum[i];
#endif
        for (; j < columns; ++j) {
            const uint32_t a = static_cast<uint32_t>(w[j]) << 16, b = static_cast<uint32_t>(x[j]) << 16;
            float left, right;
            __builtin_memcpy(&left, &a, 4);
            __builtin_memcpy(&right, &b, 4);
            rest += left * right;
        }
        y[r] = rest;
    }
}
