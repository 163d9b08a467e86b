// expert_mlp: the SwiGLU networks of all experts of a layer that have rows, in one call.
// Reference: moe.experts.swiglu_experts.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks.h"
#include "rows/product.h"

namespace moeyard {
namespace {

// Rows [first, first + rows) belong to `expert`.
struct Hit {
  int64_t expert, first, rows;
};

std::vector<Hit> find_hits(const Tensor& load, int64_t n) {
  const int64_t experts = load.size(0), stride = load.stride(0);
  const int64_t* rows = static_cast<const int64_t*>(load.const_data_ptr());
  std::vector<Hit> hits;
  int64_t first = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t count = rows[expert * stride];
    STD_TORCH_CHECK(count >= 0 && count <= n - first, "load_E gives expert ", expert, " ", count, " rows, there are ",
                    n - first, " left of ", n);
    if (count) hits.push_back({expert, first, count});
    first += count;
  }
  STD_TORCH_CHECK(first == n, "load_E sums to ", first, ", there are ", n, " rows");
  return hits;
}

// One product of every hit expert, in one parallel region. Threads share out output features, the same of every expert,
// so that they read the same number of weights and do the same work however rows are spread over experts: piece
// `pair * hits + expert` of the work, so that a share is a run of pairs for each expert.
template <class Multiply>
void for_all_pairs(const std::vector<Hit>& hits, int64_t pairs, int64_t bytes, const Multiply& multiply) {
  const int64_t count = static_cast<int64_t>(hits.size());
  const int64_t useful = std::max<int64_t>(1, bytes / kBytesPerThread);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), useful);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Share share(pairs * count, thread, threads);
      for (int64_t i = 0; i < count; ++i) {
        const auto pairs_before = [&](int64_t piece) { return piece > i ? (piece - i - 1) / count + 1 : 0; };
        multiply(hits[i], pairs_before(share.begin), pairs_before(share.end));
      }
    }
  });
}

// (N, D) rows sorted by expert, load[e] of them for expert e; (E, 2 F, D) gate and up projections; (E, D, F) down
// projections -> (N, D), in their dtype. Sums and silu are fp32; the hidden layer is rounded to the dtype once.
Tensor expert_mlp(Tensor rows, Tensor w_gate_up, Tensor w_down, Tensor load, int64_t level) {
  check_shape(rows, "rows_ND", {{"N", -1}, {"D", -1}});
  const int64_t n = rows.size(0), d = rows.size(1);
  check_shape(w_down, "w_down_EDF", {{"E", -1}, {"D", d}, {"F", -1}});
  const int64_t experts = w_down.size(0), f = w_down.size(2);
  check_shape(w_gate_up, "w_gate_up_EGD", {{"E", experts}, {"G", 2 * f}, {"D", d}});
  check_shape(load, "load_E", {{"E", experts}});
  const Type type = check_type(rows, "rows_ND");
  check_same_type(w_gate_up, "w_gate_up_EGD", rows, "rows_ND");
  check_same_type(w_down, "w_down_EDF", rows, "rows_ND");
  STD_TORCH_CHECK(load.scalar_type() == ScalarType::Long, "load_E is of dtype ",
                  torch::headeronly::toString(load.scalar_type()), ", expected Long");
  check_cpu(w_gate_up, "w_gate_up_EGD");
  check_cpu(w_down, "w_down_EDF");
  check_cpu(load, "load_E");
  const Kernels& ops = kernels(check_level(level), type);
  const std::vector<Hit> hits = find_hits(load, n);
  rows = with_contiguous_rows(rows);
  w_gate_up = with_contiguous_rows(w_gate_up);
  w_down = with_contiguous_rows(w_down);
  Tensor hidden = torch::stable::new_empty(rows, {n, f});
  Tensor y = torch::stable::new_empty(rows, {n, d});
  const void *x_data = rows.const_data_ptr(), *up_data = w_gate_up.const_data_ptr(),
             *down_data = w_down.const_data_ptr();
  void *hidden_data = hidden.mutable_data_ptr(), *y_data = y.mutable_data_ptr();
  const int64_t x_stride = rows.stride(0);
  const int64_t hit_bytes = static_cast<int64_t>(hits.size()) * d * f * element_bytes(type);

  // A pair of panels is 16 rows of the gate projection and the same 16 of the up projection.
  for_all_pairs(hits, (f + kPanel - 1) / kPanel, 2 * hit_bytes, [&](const Hit& hit, int64_t begin, int64_t end) {
    const int64_t stride = w_gate_up.stride(1);
    const void* gate = at(up_data, hit.expert * w_gate_up.stride(0), type);
    const void* up = at(gate, f * stride, type);
    const auto panels_of = [&](int64_t pair) {
      const int64_t first = pair * kPanel;
      const int count = static_cast<int>(std::min<int64_t>(kPanel, f - first));
      return Panels{{at(gate, first * stride, type), at(up, first * stride, type)}, {count, count}, stride, d};
    };
    const auto finish = [&](const Panels& panels, int64_t pair, int64_t first, int64_t count, const float* tile) {
      void* to = at(hidden_data, (hit.first + first) * f + pair * kPanel, type);
      ops.silu_mul(tile, count, panels.count[0], to, f);
    };
    const void* x = at(x_data, hit.first * x_stride, type);
    multiply_pairs(ops, type, x, x_stride, hit.rows, d, begin, end, panels_of, finish);
  });

  for_all_pairs(hits, (d + kPair - 1) / kPair, hit_bytes, [&](const Hit& hit, int64_t begin, int64_t end) {
    const int64_t stride = w_down.stride(1);
    const void* down = at(down_data, hit.expert * w_down.stride(0), type);
    const auto panels_of = [&](int64_t pair) { return neighbours(down, stride, pair, d, f, type); };
    const auto finish = [&](const Panels& panels, int64_t pair, int64_t first, int64_t count, const float* tile) {
      ops.store(tile, count, panels.count, at(y_data, (hit.first + first) * d + pair * kPair, type), d);
    };
    const void* x = at(static_cast<const void*>(hidden_data), hit.first * f, type);
    multiply_pairs(ops, type, x, f, hit.rows, f, begin, end, panels_of, finish);
  });
  return y;
}

}  // namespace
}  // namespace moeyard

STABLE_TORCH_LIBRARY_FRAGMENT(moeyard, m) {
  m.def("expert_mlp(Tensor rows, Tensor w_gate_up, Tensor w_down, Tensor load, int level) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(moeyard, CPU, m) { m.impl("expert_mlp", TORCH_BOX(&moeyard::expert_mlp)); }
