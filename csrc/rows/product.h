// Rows times the panels of a matrix, for one thread, and how outputs are shared out over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace moeyard {

inline constexpr int64_t kChunkBytes = 1 << 19;      // of rows that are packed together, to stay in the cache
inline constexpr int64_t kBytesPerThread = 1 << 17;  // a thread that reads less than this costs more than it gives

// A thread's own memory for packed rows. It is kept: getting it anew from the system each time costs page faults.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

inline int64_t element_bytes(Type type) { return type == Type::kFloat ? 4 : 2; }

inline const void* at(const void* base, int64_t elements, Type type) {
  return static_cast<const char*>(base) + elements * element_bytes(type);
}

inline void* at(void* base, int64_t elements, Type type) {
  return static_cast<char*>(base) + elements * element_bytes(type);
}

// n rows of x times the pairs of panels [begin, end): `panels_of(pair)` says where their weights are, and
// `finish(panels, pair, first, rows, tile)` takes the sums of rows [first, first + rows).
template <class PanelsOf, class Finish>
void multiply_pairs(const Kernels& kernels, Type type, const void* x, int64_t stride, int64_t n, int64_t k,
                    int64_t begin, int64_t end, const PanelsOf& panels_of, const Finish& finish) {
  static thread_local Scratch scratch;
  alignas(64) float tile[kTileRows * kPair];
  const int64_t chunk = (kChunkBytes / (kernels.packed_bytes(kTileRows, k) + 1) + 1) * kTileRows;  // k may be 0
  for (int64_t first = 0; first < n && begin < end; first += chunk) {
    const int64_t rows = std::min(chunk, n - first);
    const int64_t passes = (rows + kTileRows - 1) / kTileRows;
    void* packed = scratch.reserve(kernels.packed_bytes(rows, k));
    kernels.pack(at(x, first * stride, type), stride, rows, k, packed);
    for (int64_t pair = begin; pair < end; ++pair) {
      const Panels panels = panels_of(pair);
      const Panels next = panels_of(std::min(pair + 1, end - 1));
      for (int64_t pass = 0; pass < passes; ++pass) {
        // A single pass reads its weights from memory; of several, each asks for a part of the next pair's weights.
        const Panels& asked = passes == 1 ? panels : next;
        const Fetch fetch{{asked.weights[0], asked.weights[1]},
                          static_cast<int>(pass * kPanel / passes),
                          static_cast<int>((pass + 1) * kPanel / passes),
                          passes == 1};
        const int64_t m = pass * kTileRows, part = std::min<int64_t>(kTileRows, rows - m);
        kernels.multiply(panels, fetch, packed, m, part, tile);
        finish(panels, pair, first + m, part, tile);
      }
    }
  }
}

// Pair number `pair` of the neighbouring panels of a matrix with `outputs` rows of k weights.
inline Panels neighbours(const void* w, int64_t stride, int64_t pair, int64_t outputs, int64_t k, Type type) {
  const int64_t first = pair * kPair;
  const int left = static_cast<int>(std::min<int64_t>(kPair, outputs - first));
  return Panels{{at(w, first * stride, type), at(w, (first + kPanel) * stride, type)},
                {std::min(left, kPanel), std::max(left - kPanel, 0)},
                stride,
                k};
}

// The part [begin, end) of `total` pieces of work that thread `index` of `threads` does.
struct Share {
  int64_t begin, end;
  Share(int64_t total, int64_t index, int64_t threads)
      : begin(total * index / threads), end(total * (index + 1) / threads) {}
};

}  // namespace moeyard
