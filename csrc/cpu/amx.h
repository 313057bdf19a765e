// AMX: matrices of 16 rows of 64 bytes ("tiles") in registers of their own, multiplied 16 x 16 x 64 bytes at once.
#pragma once
#include "cpu/common.h"

namespace {

#if defined(__AMX_TILE__)
constexpr int64_t kTileRows = 16, kTileWords = 256;  // of a tile; words are 32 bits

struct TileShapes {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
// Not a local: the intrinsic tells the compiler of its first eight bytes alone.
alignas(kCacheLine) const TileShapes kFullTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The tile registers, all of the full size, for as long as this lives and for this thread; nothing without AMX.
struct Tiles {
    Tiles() {
        __asm__ volatile("" ::: "memory");  // what loads a tile does not tell the compiler that it reads memory
        _tile_loadconfig(&kFullTiles);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// to = from^T, 16 x 16 words, rows of `from` being `stride` words apart and those of `to` 16.
inline void transpose_tile(void* to, const void* from, int64_t stride) {
    __m512i row[16], half[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(static_cast<const int32_t*>(from) + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // lane l of row[i + c]: column 4 l + c of four rows
        row[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
    __m512i* const out = static_cast<__m512i*>(to);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i even_top = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
        const __m512i even_end = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
        const __m512i odd_top = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
        const __m512i odd_end = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
        _mm512_storeu_si512(out + c, _mm512_shuffle_i32x4(even_top, even_end, 0x88));
        _mm512_storeu_si512(out + 4 + c, _mm512_shuffle_i32x4(odd_top, odd_end, 0x88));
        _mm512_storeu_si512(out + 8 + c, _mm512_shuffle_i32x4(even_top, even_end, 0xdd));
        _mm512_storeu_si512(out + 12 + c, _mm512_shuffle_i32x4(odd_top, odd_end, 0xdd));
    }
}
#else
struct Tiles {
    Tiles() {}
};
#endif

}  // namespace
