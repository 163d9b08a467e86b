// linear_rows: a dense projection of few rows, y = x @ w^T. Reference: torch.nn.functional.linear.

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "rows/product.h"

namespace moeyard {
namespace {

// (N, D) rows and (O, D) weights -> (N, O), in their dtype; sums are fp32.
Tensor linear_rows(Tensor x, Tensor w, int64_t level) {
  check_shape(x, "x_ND", {{"N", -1}, {"D", -1}});
  const int64_t n = x.size(0), d = x.size(1);
  check_shape(w, "w_OD", {{"O", -1}, {"D", d}});
  const Type type = check_type(x, "x_ND");
  check_same_type(w, "w_OD", x, "x_ND");
  check_cpu(w, "w_OD");
  const Kernels& ops = kernels(check_level(level), type);
  const int64_t outputs = w.size(0);
  x = with_contiguous_rows(x);
  w = with_contiguous_rows(w);
  Tensor y = torch::stable::new_empty(x, {n, outputs});
  const void *x_data = x.const_data_ptr(), *w_data = w.const_data_ptr();
  void* y_data = y.mutable_data_ptr();
  const int64_t x_stride = x.stride(0), w_stride = w.stride(0);

  const int64_t pairs = (outputs + kPair - 1) / kPair;
  const int64_t useful = std::max<int64_t>(1, outputs * d * element_bytes(type) / kBytesPerThread);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), useful);
  const auto panels_of = [&](int64_t pair) { return neighbours(w_data, w_stride, pair, outputs, d, type); };
  const auto finish = [&](const Panels& panels, int64_t pair, int64_t first, int64_t rows, const float* tile) {
    ops.store(tile, rows, panels.count, at(y_data, first * outputs + pair * kPair, type), outputs);
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Share share(pairs, thread, threads);
      multiply_pairs(ops, type, x_data, x_stride, n, d, share.begin, share.end, panels_of, finish);
    }
  });
  return y;
}

}  // namespace
}  // namespace moeyard

STABLE_TORCH_LIBRARY_FRAGMENT(moeyard, m) {
  m.def("linear_rows(Tensor x, Tensor w, int level) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(moeyard, CPU, m) { m.impl("linear_rows", TORCH_BOX(&moeyard::linear_rows)); }
