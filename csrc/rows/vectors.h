// Arithmetic on vectors of L floats in the compilers' vector extension: one text for every instruction set.
//
// Functions here are always inlined into callers that name their instruction set (`target`), which is what decides the
// instructions; so this file holds no intrinsics. Vectors go by reference: by value they would need a calling
// convention that the plain functions do not have.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define MOEYARD_ALWAYS __attribute__((always_inline))
#define MOEYARD_INLINE inline MOEYARD_ALWAYS

// The instruction sets of levels that plain vectors are compiled for.
#if defined(__x86_64__)
#define MOEYARD_AVX2 __attribute__((target("avx2,fma")))
#define MOEYARD_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#else
#define MOEYARD_AVX2
#define MOEYARD_AVX512
#endif

namespace moeyard {

using bf16 = uint16_t;  // the upper half of an fp32

template <int L>
struct Vec {
  typedef float F __attribute__((vector_size(4 * L)));
  typedef int32_t I __attribute__((vector_size(4 * L)));
  typedef uint32_t U __attribute__((vector_size(4 * L)));
  typedef uint16_t H __attribute__((vector_size(2 * L)));
};

// visit(0), ..., visit(N - 1) with numbers that the compiler knows from the start. Sums in an array stay in registers
// then; in a loop that is unrolled later they are written to the stack at every step, at half the speed.
template <class Visit, int... I>
MOEYARD_INLINE void visit_all(std::integer_sequence<int, I...>, const Visit& visit) {
  (visit(std::integral_constant<int, I>{}), ...);
}
template <int N, class Visit>
MOEYARD_INLINE void unrolled(const Visit& visit) {
  visit_all(std::make_integer_sequence<int, N>{}, visit);
}

template <class To, class From>
MOEYARD_INLINE void copy_bits(To& to, const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
}

template <int L>
MOEYARD_INLINE void load(const float* p, typename Vec<L>::F& v) {
  std::memcpy(&v, p, sizeof(v));
}

template <int L>
MOEYARD_INLINE void load(const bf16* p, typename Vec<L>::F& v) {
  typename Vec<L>::H halves;
  std::memcpy(&halves, p, sizeof(halves));
  const typename Vec<L>::U bits = __builtin_convertvector(halves, typename Vec<L>::U) << 16;
  copy_bits(v, bits);
}

template <int L>
MOEYARD_INLINE void store(const typename Vec<L>::F& v, float* p) {
  std::memcpy(p, &v, sizeof(v));
}

// Round to nearest even; NaN stays NaN.
template <int L>
MOEYARD_INLINE void store(const typename Vec<L>::F& v, bf16* p) {
  using U = typename Vec<L>::U;
  U bits;
  copy_bits(bits, v);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  const typename Vec<L>::H halves = __builtin_convertvector(v == v ? rounded : quiet, typename Vec<L>::H);
  std::memcpy(p, &halves, sizeof(halves));
}

// Halves are added until four lanes are left.
template <int L>
MOEYARD_INLINE float sum(const typename Vec<L>::F& v) {
  if constexpr (L == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    typename Vec<L / 2>::F low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    const typename Vec<L / 2>::F halves = low + high;
    return sum<L / 2>(halves);
  }
}

// exp(t), good to about two units in the last place: 2^n * exp(r) with |r| <= ln(2) / 2 and a polynomial for exp(r).
// Below -87 it is that of -87 (1e-38), above 89 infinite.
template <int L>
MOEYARD_INLINE void exp(typename Vec<L>::F& t) {
  using F = typename Vec<L>::F;
  using I = typename Vec<L>::I;
  t = t > 89.0f ? F{} + 89.0f : t;
  t = t < -87.0f ? F{} - 87.0f : t;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const F n = (t * 1.44269504f + kRound) - kRound;
  const F r = (t - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first of few bits
  F p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I bits = (__builtin_convertvector(n, I) + 127) << 23;
  F power;
  copy_bits(power, bits);
  t = p * power;
}

// x / (1 + exp(-x)); where the exponential is infinite the quotient is zero, as it should be.
template <int L>
MOEYARD_INLINE void silu(typename Vec<L>::F& x) {
  typename Vec<L>::F power = -x;
  exp<L>(power);
  x = x / (1.0f + power);
}

// R weight rows times M rows of x, which are fp32, zero up to a multiple of L, and `x_stride` apart. While a weight is
// multiplied the one R rows further down is asked for: it is the next that this core will need from memory.
template <int L, int R, int M, class T>
MOEYARD_INLINE void dot_tile(const T* w, int64_t stride, int64_t k, const float* x, int64_t x_stride, float* tile) {
  using F = typename Vec<L>::F;
  F sums[R][M] = {};
  int64_t i = 0;
  for (; i + L <= k; i += L) {
    F x_part[M];
    unrolled<M>([&](auto m) MOEYARD_ALWAYS { load<L>(x + m * x_stride + i, x_part[m]); });
    unrolled<R>([&](auto r) MOEYARD_ALWAYS {
      F w_part;
      __builtin_prefetch(w + (r + R) * stride + i);
      load<L>(w + r * stride + i, w_part);
      unrolled<M>([&](auto m) MOEYARD_ALWAYS { sums[r][m] += w_part * x_part[m]; });
    });
  }
  if (i < k) {  // the last, incomplete vector of each row, filled up with zeros
    unrolled<R>([&](auto r) MOEYARD_ALWAYS {
      T edge[L] = {};
      std::memcpy(edge, w + r * stride + i, (k - i) * sizeof(T));
      F w_part;
      load<L>(edge, w_part);
      unrolled<M>([&](auto m) MOEYARD_ALWAYS {
        F x_part;
        load<L>(x + m * x_stride + i, x_part);
        sums[r][m] += w_part * x_part;
      });
    });
  }
  unrolled<R>([&](auto r) MOEYARD_ALWAYS {
    unrolled<M>([&](auto m) MOEYARD_ALWAYS { tile[m * kPair + r] = sum<L>(sums[r][m]); });
  });
}

// A tile in parts of Tile::kOutputs weight rows and Tile::kRows rows of x, as many as the level's registers hold sums
// for, and single ones at the ends, by `Tile::run<R, M>(w, stride, k, x, x_stride, tile)`.
template <class Tile, int R, class T, class X>
MOEYARD_INLINE void multiply_rows(const Panels& panels, int p, int r, const X* x, int64_t x_stride, int64_t n,
                                  float* tile) {
  constexpr int kRows = Tile::kRows;
  const T* w = static_cast<const T*>(panels.weights[p]) + r * panels.stride;
  float* out = tile + p * kPanel + r;
  int64_t m = 0;
  for (; m + kRows <= n; m += kRows)
    Tile::template run<R, kRows>(w, panels.stride, panels.k, x + m * x_stride, x_stride, out + m * kPair);
  for (; m < n; ++m)
    Tile::template run<R, 1>(w, panels.stride, panels.k, x + m * x_stride, x_stride, out + m * kPair);
}

template <class Tile, class T, class X>
MOEYARD_INLINE void multiply_panels(const Panels& panels, const X* x, int64_t x_stride, int64_t n, float* tile) {
  constexpr int kOutputs = Tile::kOutputs;
  for (int p = 0; p < 2; ++p) {
    int r = 0;
    for (; r + kOutputs <= panels.count[p]; r += kOutputs)
      multiply_rows<Tile, kOutputs, T>(panels, p, r, x, x_stride, n, tile);
    for (; r < panels.count[p]; ++r) multiply_rows<Tile, 1, T>(panels, p, r, x, x_stride, n, tile);
  }
}

// The two ways that a tile is finished; see Kernels. Whole panels are computed, so that no element has a place of its
// own in the code, and written as far as they count.
template <int L, class T>
MOEYARD_INLINE void store_tile(const float* tile, int64_t n, const int count[2], T* y, int64_t stride) {
  for (int64_t m = 0; m < n; ++m) {
    T out[kPair];
    for (int i = 0; i < kPair; i += L) {
      typename Vec<L>::F v;
      load<L>(tile + m * kPair + i, v);
      store<L>(v, out + i);
    }
    for (int p = 0; p < 2; ++p)
      std::memcpy(y + m * stride + p * kPanel, out + p * kPanel, count[p] * sizeof(T));
  }
}

template <int L, class T>
MOEYARD_INLINE void silu_mul_tile(const float* tile, int64_t n, int count, T* y, int64_t stride) {
  for (int64_t m = 0; m < n; ++m) {
    T out[kPanel];
    for (int i = 0; i < kPanel; i += L) {
      typename Vec<L>::F gate, up;
      load<L>(tile + m * kPair + i, gate);
      load<L>(tile + m * kPair + kPanel + i, up);
      silu<L>(gate);
      const typename Vec<L>::F hidden = gate * up;
      store<L>(hidden, out + i);
    }
    std::memcpy(y + m * stride, out, count * sizeof(T));
  }
}

}  // namespace moeyard
