// Attention of single queries at levels plain, AVX2 and AVX-512, for fp32 and bf16. bf16 is widened as it is read.
//
// Few queries meet many keys, so this too is bound by reading: a key is read once for all query heads that share it, and
// so is a value. Scores of all positions are kept (4 bytes each, in the cache), then made a softmax, then multiplied.

#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vectors.h"

namespace moeyard {
namespace {

constexpr int64_t kWidest = 16;  // lanes of the widest vector
constexpr int kHeads = 4;        // most query heads that are computed at once
constexpr int kVectors = 4;      // vectors of a value that are added up at once

int64_t padded(int64_t n) { return (n + kWidest - 1) / kWidest * kWidest; }

// One vector of a row of `width`; beyond its end there are zeros. `Whole`: rows have no incomplete vector. The call that
// copies one would cost the loop around it its registers, taken or not.
template <int L, bool Whole, class T>
MOEYARD_INLINE void load_part(const T* row, int64_t i, int64_t width, typename Vec<L>::F& v) {
  if (Whole || i + L <= width) {
    load<L>(row + i, v);
  } else {
    T edge[L] = {};
    std::memcpy(edge, row + i, (width - i) * sizeof(T));
    load<L>(edge, v);
  }
}

// Asks for the rows of this head in block number `block` of the table, if there is one.
template <class T>
MOEYARD_INLINE void fetch(const Pages& pages, const void* rows, int64_t block_stride, int64_t stride, int64_t block,
                          int64_t width) {
  const int64_t first = block * pages.block_size;
  if (first >= pages.length) return;
  const T* row = static_cast<const T*>(rows) + pages.table[block] * block_stride;
  const int64_t count = std::min(pages.block_size, pages.length - first);
  for (int64_t offset = 0; offset < count; ++offset, row += stride)
    for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

// Calls `visit(position, row)` for every position. Rows of a head are short and far apart, which no processor foresees,
// so those of the next block are asked for while this one's are used.
template <class T, class Visit>
MOEYARD_INLINE void for_all_positions(const Pages& pages, const void* rows, int64_t block_stride, int64_t stride,
                                      int64_t width, const Visit& visit) {
  for (int64_t first = 0, block = 0; first < pages.length; first += pages.block_size, ++block) {
    fetch<T>(pages, rows, block_stride, stride, block + 1, width);
    const T* row = static_cast<const T*>(rows) + pages.table[block] * block_stride;
    const int64_t count = std::min(pages.block_size, pages.length - first);
    for (int64_t offset = 0; offset < count; ++offset, row += stride) visit(first + offset, row);
  }
}

// scores[r][position] = q[r] . key, with q widened, scaled, and zero up to a multiple of the widest vector.
template <int L, int R, bool Whole, class T>
MOEYARD_INLINE void score(const Pages& pages, const float* q, int64_t width, float* scores, int64_t stride) {
  using F = typename Vec<L>::F;
  const auto visit = [&](int64_t position, const T* row) MOEYARD_ALWAYS {
    F sums[R] = {};
    for (int64_t i = 0; i < width; i += L) {
      F key;
      load_part<L, Whole>(row, i, width, key);
      unrolled<R>([&](auto r) MOEYARD_ALWAYS {
        F query;
        load<L>(q + r * padded(width) + i, query);
        sums[r] += key * query;
      });
    }
    unrolled<R>([&](auto r) MOEYARD_ALWAYS { scores[r * stride + position] = sum<L>(sums[r]); });
  };
  for_all_positions<T>(pages, pages.keys, pages.key_block, pages.key_position, width, visit);
}

// Scores to probabilities, times their sum, which is returned.
template <int L>
MOEYARD_INLINE float exponentials(float* scores, int64_t length) {
  using F = typename Vec<L>::F;
  float highest = scores[0];
  for (int64_t i = 1; i < length; ++i) highest = scores[i] > highest ? scores[i] : highest;
  for (int64_t i = length; i < padded(length); ++i) scores[i] = -INFINITY;
  F sums = {};
  for (int64_t i = 0; i < length; i += L) {
    F x;
    load<L>(scores + i, x);
    x = x - highest;
    exp<L>(x);
    sums += x;
    store<L>(x, scores + i);
  }
  return sum<L>(sums);
}

// V vectors of out[r], from column `i` on.
template <int L, int R, int V, bool Whole, class T>
MOEYARD_INLINE void mix(const Pages& pages, const float* scores, int64_t stride, const float* totals, int64_t i,
                        int64_t width, T* out, int64_t out_stride) {
  using F = typename Vec<L>::F;
  F sums[R][V] = {};
  const auto visit = [&](int64_t position, const T* row) MOEYARD_ALWAYS {
    unrolled<V>([&](auto v) MOEYARD_ALWAYS {
      F value;
      load_part<L, Whole>(row, i + v * L, width, value);
      unrolled<R>([&](auto r) MOEYARD_ALWAYS { sums[r][v] += scores[r * stride + position] * value; });
    });
  };
  for_all_positions<T>(pages, pages.values, pages.value_block, pages.value_position, width, visit);
  unrolled<R>([&](auto r) MOEYARD_ALWAYS {
    unrolled<V>([&](auto v) MOEYARD_ALWAYS {
      T row[L];
      const F result = sums[r][v] / totals[r];
      store<L>(result, row);
      const int64_t left = std::min<int64_t>(L, width - i - v * L);
      std::memcpy(out + r * out_stride + i + v * L, row, left * sizeof(T));
    });
  });
}

template <int L, int R, bool Whole, class T>
MOEYARD_INLINE void attend_heads(const Queries& queries, int64_t first, const Pages& pages, float* scratch) {
  const int64_t width = queries.width, stride = padded(pages.length);
  float *q = scratch, *scores = scratch + kHeads * padded(width);
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  for (int r = 0; r < R; ++r) {
    const T* row = static_cast<const T*>(queries.q) + (first + r) * queries.q_stride;
    for (int64_t i = 0; i < padded(width); i += L) {
      typename Vec<L>::F part = {};
      if (i < width) load_part<L, Whole>(row, i, width, part);
      part = part * scale;
      store<L>(part, q + r * padded(width) + i);
    }
  }
  score<L, R, Whole, T>(pages, q, width, scores, stride);
  fetch<T>(pages, pages.values, pages.value_block, pages.value_position, 0, width);
  float totals[R];
  for (int r = 0; r < R; ++r) totals[r] = exponentials<L>(scores + r * stride, pages.length);
  T* out = static_cast<T*>(queries.out) + first * queries.out_stride;
  int64_t i = 0;
  for (; i + kVectors * L <= width; i += kVectors * L)
    mix<L, R, kVectors, Whole, T>(pages, scores, stride, totals, i, width, out, queries.out_stride);
  for (; i < width; i += L) mix<L, R, 1, Whole, T>(pages, scores, stride, totals, i, width, out, queries.out_stride);
}

template <int L, bool Whole, class T>
MOEYARD_INLINE void attend_all(const Queries& queries, const Pages& pages, float* scratch) {
  int64_t h = 0;
  for (; h + 4 <= queries.heads; h += 4) attend_heads<L, 4, Whole, T>(queries, h, pages, scratch);
  for (; h + 2 <= queries.heads; h += 2) attend_heads<L, 2, Whole, T>(queries, h, pages, scratch);
  for (; h < queries.heads; ++h) attend_heads<L, 1, Whole, T>(queries, h, pages, scratch);
}

#define MOEYARD_ATTEND(NAME, L, TARGET)                                          \
  template <class T>                                                             \
  TARGET void NAME(const Queries& queries, const Pages& pages, float* scratch) { \
    if (queries.width % L == 0) {                                                \
      attend_all<L, true, T>(queries, pages, scratch);                           \
    } else {                                                                     \
      attend_all<L, false, T>(queries, pages, scratch);                          \
    }                                                                            \
  }

MOEYARD_ATTEND(attend_plain, 4, )
MOEYARD_ATTEND(attend_avx2, 8, MOEYARD_AVX2)
MOEYARD_ATTEND(attend_avx512, 16, MOEYARD_AVX512)

template <class T>
Attend choose(Level level) {
  if (level == Level::kPlain) return attend_plain<T>;
  return level == Level::kAvx2 ? attend_avx2<T> : attend_avx512<T>;
}

}  // namespace

int64_t attend_scratch(int64_t width, int64_t length) { return kHeads * (padded(width) + padded(length)); }

Attend attend(Level level, Type type) { return type == Type::kFloat ? choose<float>(level) : choose<bf16>(level); }

}  // namespace moeyard
