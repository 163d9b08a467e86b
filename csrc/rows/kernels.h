// Products of a few rows with a large matrix, one set of functions for each kind of CPU.
//
// Generating text multiplies few rows with many weights, so its time is that of reading weights. Everything here is
// made for that: weights stay as torch has them (one row for each output, contiguous along the inner dimension), each
// is read once for all rows, and what is small (the rows, the results) is rearranged instead.
//
// One output is always added up in the same order: along the inner dimension in steps of one vector, then over the
// lanes of the vector. Which other rows are there, how many, and how outputs are shared out over threads has no say in
// it, so a row's result is the same bits in every batch ("batch invariance").
//
// Letters: n rows of x, k inner width, m a row within a tile, o an output.
#pragma once

#include <cstdint>

namespace moeyard {

// What a CPU can do, each more than the one before. Numbers are the ones that Python passes.
enum class Level : int64_t { kPlain = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The highest level of this CPU and operating system; asked once.
Level best_level();

enum class Type { kFloat, kBfloat16 };

inline constexpr int kPanel = 16;         // outputs of a panel
inline constexpr int kPair = 2 * kPanel;  // outputs of a pair of panels, and floats of one row of a tile
inline constexpr int kTileRows = 32;      // most rows that one call multiplies

// Two panels of weight rows, which share the reading of x: neighbours in one matrix, or gate and up projection.
struct Panels {
  const void* weights[2];  // first element of each panel's first row
  int count[2];            // rows of each, at most kPanel; the second may have none
  int64_t stride;          // elements from one weight row to the next
  int64_t k;               // elements of a row
};

// Weight rows [begin, end) of both panels, to be asked for from memory while a tile is multiplied: those of the tile
// itself (`now`), or those of the next one while the cache already has this one's.
struct Fetch {
  const void* weights[2];
  int begin, end;
  bool now;
};

// Functions of one level for one type of weights. Results are fp32 tiles of kTileRows x kPair: output r of panel p for
// row m stands at tile[m * kPair + p * kPanel + r]; what lies beyond a panel's count is not defined.
struct Kernels {
  // Bytes that `pack` writes for n rows.
  int64_t (*packed_bytes)(int64_t n, int64_t k);
  // Rearrange n rows of x, `stride` elements apart, as `multiply` reads them.
  void (*pack)(const void* x, int64_t stride, int64_t n, int64_t k, void* packed);
  // tile = packed rows [first, first + n) times both panels; `first` is a multiple of kTileRows and n at most that.
  void (*multiply)(const Panels& panels, const Fetch& fetch, const void* packed, int64_t first, int64_t n, float* tile);
  // y[m * stride + 16 p + r] = tile, rounded to the type.
  void (*store)(const float* tile, int64_t n, const int count[2], void* y, int64_t stride);
  // y[m * stride + r] = silu(first panel) * second panel, computed in fp32 and rounded once.
  void (*silu_mul)(const float* tile, int64_t n, int count, void* y, int64_t stride);
};

// `level` must be one that this CPU has. fp32 has no functions above kAvx512 and takes those.
const Kernels& kernels(Level level, Type type);

// Parts of the table above that are in files of their own; null where the compiler cannot make them.
const Kernels* plain_kernels(Level level, Type type);
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

}  // namespace moeyard
