// Level AMX: tdpbf16ps multiplies a tile of 16 x 32 bf16 with one of 32 x 16 into 16 x 16 fp32 sums.
//
// Weights are the left tile, as they lie in memory: 16 weight rows, 32 elements of each. So they need no packing, and a
// product is limited by memory up to some 16 rows of x and by the tile unit (16 times an AVX-512 one) after that. Rows
// of x are the right tile, which the unit wants as pairs of elements: pair j of all 16 rows, then pair j + 1. The sums
// come out with outputs as rows and are turned over when they are written.
//
// The instruction adds element by element of the inner dimension for each of its sums, whatever the other columns hold:
// a row of x beside fifteen rows of zeros is the same bits as beside fifteen others.

#include "kernels.h"
#include "vectors.h"

#if defined(__x86_64__) && __has_include(<amxbf16intrin.h>)
#include <immintrin.h>

#define MOEYARD_TILES __attribute__((target("avx512f,avx512bw,avx512vl,amx-tile,amx-bf16")))
#define MOEYARD_WIDE __attribute__((target("avx512f,avx512bw,avx512vl")))

namespace moeyard {
namespace {

constexpr int64_t kStep = 32;                 // inner elements of a tile
constexpr int64_t kColumns = 16;              // rows of x in a tile
constexpr int64_t kTile = kStep * kColumns;   // bf16 in a tile: 1 KiB
constexpr int64_t kWidth = 64;                // bytes of a tile's row

int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

int64_t packed_bytes(int64_t n, int64_t k) {
  return padded(n, kColumns) * padded(k, kStep) * static_cast<int64_t>(sizeof(bf16));
}

// 16 x 16 elements of four bytes: rows to columns, in three rounds that exchange blocks of 1, 2, and 4 and 8 elements.
MOEYARD_WIDE inline void transpose(__m512i v[16]) {
  __m512i u[16];
  for (int i = 0; i < 8; ++i) {
    u[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    u[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 0x88 takes the even quarters of both vectors, 0xdd the odd ones
    u[0] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    u[1] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    u[2] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    u[3] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    v[i] = _mm512_shuffle_i32x4(u[0], u[2], 0x88);
    v[4 + i] = _mm512_shuffle_i32x4(u[1], u[3], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(u[0], u[2], 0xdd);
    v[12 + i] = _mm512_shuffle_i32x4(u[1], u[3], 0xdd);
  }
}

MOEYARD_WIDE void pack(const void* x, int64_t stride, int64_t n, int64_t k, void* packed) {
  bf16* out = static_cast<bf16*>(packed);
  for (int64_t first = 0; first < n; first += kColumns) {
    for (int64_t i = 0; i < k; i += kStep, out += kTile) {
      const __mmask32 mask = k - i >= kStep ? 0xffffffffu : (1u << (k - i)) - 1;
      __m512i rows[16];
      for (int m = 0; m < 16; ++m) {
        const bf16* from = static_cast<const bf16*>(x) + (first + m) * stride + i;
        rows[m] = first + m < n ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int j = 0; j < 16; ++j) _mm512_storeu_si512(out + j * kStep, rows[j]);
    }
  }
}

// The layout that ldtilecfg reads: palette 1, and for each tile register its rows and their bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kWidth, kWidth, kWidth, kWidth, kWidth, kWidth, kWidth, kWidth};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

// gcc's tile loads do not say that they read memory: without this it might write what they read too early, or not at
// all.
MOEYARD_INLINE void keep_memory_order() { __asm__ volatile("" ::: "memory"); }

// A weight tile that is not whole, filled up with zeros.
inline void copy_edge(const bf16* w, int64_t stride, int rows, int64_t width, bf16* edge) {
  keep_memory_order();
  std::memset(edge, 0, kTile * sizeof(bf16));
  for (int r = 0; r < rows; ++r) std::memcpy(edge + r * kStep, w + r * stride, width * sizeof(bf16));
  keep_memory_order();
}

// The cache lines of one step, into cache level `kCache`: the first if they are needed at once, else the second, where
// they do not drive out what is being multiplied.
template <int kCache>
MOEYARD_INLINE void ask_for(const Fetch& fetch, int64_t stride, int64_t i) {
  for (int r = fetch.begin; r < fetch.end; ++r) {
    __builtin_prefetch(static_cast<const bf16*>(fetch.weights[0]) + r * stride + i, 0, 4 - kCache);
    __builtin_prefetch(static_cast<const bf16*>(fetch.weights[1]) + r * stride + i, 0, 4 - kCache);
  }
}

// Registers 0 to 3 hold sums [panel][16 rows of x], 4 and 5 the panels' weights, 6 and 7 the rows of x. A template for
// one or two tiles of rows: register numbers are part of the instructions.
template <int kTilesOfRows>
MOEYARD_TILES void multiply_tiles(const Panels& panels, const Fetch& fetch, const bf16* x, float* sums) {
  const int64_t k = panels.k, x_tile = padded(k, kStep) * kColumns;
  const bf16* w0 = static_cast<const bf16*>(panels.weights[0]);
  const bf16* w1 = static_cast<const bf16*>(panels.weights[1]);
  const int64_t row_bytes = panels.stride * static_cast<int64_t>(sizeof(bf16));
  const bool whole0 = panels.count[0] == kPanel, whole1 = panels.count[1] == kPanel;
  alignas(64) bf16 edge[kTile];
  keep_memory_order();
  _tile_loadconfig(&kConfig);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < k; i += kStep, x += kTile) {
    const bool whole_step = k - i >= kStep;
    if (fetch.now) {
      ask_for<1>(fetch, panels.stride, i);
    } else {
      ask_for<2>(fetch, panels.stride, i);
    }
    _tile_loadd(6, x, kWidth);
    if constexpr (kTilesOfRows == 2) _tile_loadd(7, x + x_tile, kWidth);
    if (whole_step && whole0) {
      _tile_loadd(4, w0 + i, row_bytes);
    } else {
      copy_edge(w0 + i, panels.stride, panels.count[0], whole_step ? kStep : k - i, edge);
      _tile_loadd(4, edge, kWidth);
    }
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTilesOfRows == 2) _tile_dpbf16ps(1, 4, 7);
    if (!panels.count[1]) continue;
    if (whole_step && whole1) {
      _tile_loadd(5, w1 + i, row_bytes);
    } else {
      copy_edge(w1 + i, panels.stride, panels.count[1], whole_step ? kStep : k - i, edge);
      _tile_loadd(5, edge, kWidth);
    }
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTilesOfRows == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kWidth);
  _tile_stored(2, sums + 256, kWidth);
  if constexpr (kTilesOfRows == 2) {
    _tile_stored(1, sums + 512, kWidth);
    _tile_stored(3, sums + 768, kWidth);
  }
  _tile_release();
}

MOEYARD_WIDE void multiply(const Panels& panels, const Fetch& fetch, const void* packed, int64_t first, int64_t n,
                           float* tile) {
  const bf16* x = static_cast<const bf16*>(packed) + first * padded(panels.k, kStep);
  alignas(64) float sums[2][2][256];  // [tile of rows][panel][output * 16 + row]
  if (n > kColumns) {
    multiply_tiles<2>(panels, fetch, x, sums[0][0]);
  } else {
    multiply_tiles<1>(panels, fetch, x, sums[0][0]);
  }
  for (int64_t m = 0; m < n; m += kColumns) {
    for (int p = 0; p < 2; ++p) {
      __m512i v[16];
      for (int r = 0; r < 16; ++r) v[r] = _mm512_load_si512(&sums[m / kColumns][p][r * 16]);
      transpose(v);
      for (int j = 0; j < 16 && m + j < n; ++j) _mm512_storeu_si512(tile + (m + j) * kPair + p * kPanel, v[j]);
    }
  }
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels* plain = plain_kernels(Level::kAvx512, Type::kBfloat16);
  static const Kernels table{packed_bytes, pack, multiply, plain->store, plain->silu_mul};
  return &table;
}

}  // namespace moeyard
#else
namespace moeyard {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace moeyard
#endif
