// Levels plain, AVX2 and AVX-512: the same text for each, and for fp32 and bf16 weights. bf16 is widened as it is read.

#include "kernels.h"
#include "vectors.h"

namespace moeyard {
namespace {

constexpr int64_t kWidest = 16;  // lanes of the widest vector; rows of x are zero up to a multiple of it

int64_t padded(int64_t k) { return (k + kWidest - 1) / kWidest * kWidest; }

int64_t packed_bytes(int64_t n, int64_t k) { return n * padded(k) * static_cast<int64_t>(sizeof(float)); }

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  copy_bits(wide, bits);
  return wide;
}

template <class T>
void pack(const void* x, int64_t stride, int64_t n, int64_t k, void* packed) {
  const T* in = static_cast<const T*>(x);
  float* out = static_cast<float*>(packed);
  for (int64_t m = 0; m < n; ++m, in += stride, out += padded(k)) {
    for (int64_t i = 0; i < k; ++i) out[i] = widen(in[i]);
    for (int64_t i = k; i < padded(k); ++i) out[i] = 0;
  }
}

// One level: L lanes, parts of a tile whose sums fit its registers (32 of AVX-512, else 16), and the functions of
// vectors.h inlined where its instructions may be used.
#define MOEYARD_LEVEL(NAME, L, OUTPUTS, ROWS, TARGET)                                                              \
  template <class T>                                                                                               \
  struct NAME {                                                                                                    \
    static constexpr int kOutputs = OUTPUTS, kRows = ROWS;                                                         \
    template <int R, int M>                                                                                        \
    TARGET static void run(const T* w, int64_t stride, int64_t k, const float* x, int64_t x_stride, float* tile) { \
      dot_tile<L, R, M, T>(w, stride, k, x, x_stride, tile);                                                       \
    }                                                                                                              \
    static void multiply(const Panels& panels, const Fetch&, const void* packed, int64_t first, int64_t n,         \
                         float* tile) {                                                                            \
      const int64_t x_stride = padded(panels.k);                                                                   \
      multiply_panels<NAME, T>(panels, static_cast<const float*>(packed) + first * x_stride, x_stride, n, tile);   \
    }                                                                                                              \
    TARGET static void store(const float* tile, int64_t n, const int count[2], void* y, int64_t stride) {          \
      store_tile<L, T>(tile, n, count, static_cast<T*>(y), stride);                                                \
    }                                                                                                              \
    TARGET static void silu_mul(const float* tile, int64_t n, int count, void* y, int64_t stride) {                \
      silu_mul_tile<L, T>(tile, n, count, static_cast<T*>(y), stride);                                             \
    }                                                                                                              \
    static const Kernels* table() {                                                                                \
      static constexpr Kernels kTable{packed_bytes, pack<T>, multiply, store, silu_mul};                           \
      return &kTable;                                                                                              \
    }                                                                                                              \
  };

MOEYARD_LEVEL(Plain, 4, 4, 2, )
MOEYARD_LEVEL(Avx2, 8, 4, 2, MOEYARD_AVX2)
MOEYARD_LEVEL(Avx512, 16, 4, 4, MOEYARD_AVX512)

template <class T>
const Kernels* table(Level level) {
  if (level == Level::kPlain) return Plain<T>::table();
  return level == Level::kAvx2 ? Avx2<T>::table() : Avx512<T>::table();
}

}  // namespace

const Kernels* plain_kernels(Level level, Type type) {
  return type == Type::kFloat ? table<float>(level) : table<bf16>(level);
}

const Kernels& kernels(Level level, Type type) {
  const Kernels* found = nullptr;
  if (type == Type::kBfloat16 && level == Level::kAmx) found = amx_kernels();
  if (type == Type::kBfloat16 && level == Level::kAvx512Bf16) found = avx512_bf16_kernels();
  return found ? *found : *plain_kernels(level < Level::kAvx512 ? level : Level::kAvx512, type);
}

}  // namespace moeyard
