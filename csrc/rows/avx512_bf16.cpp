// Level AVX512-BF16: vdpbf16ps multiplies 32 pairs of bf16 and adds them in twos to 16 fp32 sums.

#include "kernels.h"
#include "vectors.h"

#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#include <immintrin.h>

#define MOEYARD_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace moeyard {
namespace {

constexpr int64_t kStep = 32;  // bf16 in a vector

int64_t padded(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

int64_t packed_bytes(int64_t n, int64_t k) { return n * padded(k) * static_cast<int64_t>(sizeof(bf16)); }

void pack(const void* x, int64_t stride, int64_t n, int64_t k, void* packed) {
  const bf16* in = static_cast<const bf16*>(x);
  bf16* out = static_cast<bf16*>(packed);
  for (int64_t m = 0; m < n; ++m, in += stride, out += padded(k)) {
    std::memcpy(out, in, k * sizeof(bf16));
    std::memset(out + k, 0, (padded(k) - k) * sizeof(bf16));
  }
}

struct Tile {
  static constexpr int kOutputs = 4, kRows = 4;
  // As dot_tile of vectors.h, with one instruction for the product and the sum of neighbours. Loops are told to be
  // unrolled, or sums would be kept on the stack; intrinsics cannot stand in a lambda for `unrolled` to call.
  template <int R, int M>
  MOEYARD_BF16 static void run(const bf16* w, int64_t stride, int64_t k, const bf16* x, int64_t x_stride, float* tile) {
    __m512 sums[R][M];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[r][m] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += kStep) {
      // Loads take what is left of a row and zeros for the rest.
      const __mmask32 mask = k - i >= kStep ? 0xffffffffu : (1u << (k - i)) - 1;
      __m512i x_part[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) x_part[m] = _mm512_loadu_si512(x + m * x_stride + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(w + (r + R) * stride + i), _MM_HINT_T0);
        const __m512i w_part = _mm512_maskz_loadu_epi16(mask, w + r * stride + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r][m] = _mm512_dpbf16_ps(sums[r][m], (__m512bh)w_part, (__m512bh)x_part[m]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) tile[m * kPair + r] = _mm512_reduce_add_ps(sums[r][m]);
  }
};

void multiply(const Panels& panels, const Fetch&, const void* packed, int64_t first, int64_t n, float* tile) {
  const int64_t x_stride = padded(panels.k);
  multiply_panels<Tile, bf16>(panels, static_cast<const bf16*>(packed) + first * x_stride, x_stride, n, tile);
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels* plain = plain_kernels(Level::kAvx512, Type::kBfloat16);
  static const Kernels table{packed_bytes, pack, multiply, plain->store, plain->silu_mul};
  return &table;
}

}  // namespace moeyard
#else
namespace moeyard {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace moeyard
#endif
