// attend_singles: single queries of many sequences over a paged cache. Reference: moe.ops.paged_attention.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks.h"
#include "rows/attend.h"
#include "rows/product.h"

namespace moeyard {
namespace {

// The table of every sequence names blocks that there are, for as many positions as it has.
void check_tables(const int64_t* table, int64_t columns, const int64_t* length, int64_t sequences, int64_t blocks,
                  int64_t block_size) {
  for (int64_t b = 0; b < sequences; ++b) {
    STD_TORCH_CHECK(length[b] > 0 && length[b] <= columns * block_size, "length_B gives sequence ", b, " ", length[b],
                    " positions, its table has blocks for ", columns * block_size);
    for (int64_t i = 0; i * block_size < length[b]; ++i) {
      const int64_t block = table[b * columns + i];
      STD_TORCH_CHECK(block >= 0 && block < blocks, "table_BC names block ", block, ", there are ", blocks);
    }
  }
}

// (B, H, d) queries, (P, b, G, d) keys and values, (B, C) blocks of each sequence, (B,) positions -> (B, H, d).
Tensor attend_singles(Tensor q, Tensor k, Tensor v, Tensor table, Tensor length, int64_t level) {
  check_shape(q, "q_BHd", {{"B", -1}, {"H", -1}, {"d", -1}});
  const int64_t sequences = q.size(0), heads = q.size(1), width = q.size(2);
  check_shape(k, "k_PbGd", {{"P", -1}, {"b", -1}, {"G", -1}, {"d", width}});
  const int64_t blocks = k.size(0), block_size = k.size(1), groups = k.size(2);
  check_shape(v, "v_PbGd", {{"P", blocks}, {"b", block_size}, {"G", groups}, {"d", width}});
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "q_BHd has ", heads, " heads, no multiple of the ", groups,
                  " of k_PbGd");
  check_shape(table, "table_BC", {{"B", sequences}, {"C", -1}});
  check_shape(length, "length_B", {{"B", sequences}});
  const Type type = check_type(q, "q_BHd");
  check_same_type(k, "k_PbGd", q, "q_BHd");
  check_same_type(v, "v_PbGd", q, "q_BHd");
  for (const auto& [tensor, name] : {std::pair{&table, "table_BC"}, std::pair{&length, "length_B"}}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long, name, " is of dtype ",
                    torch::headeronly::toString(tensor->scalar_type()), ", expected Long");
    check_cpu(*tensor, name);
  }
  check_cpu(k, "k_PbGd");
  check_cpu(v, "v_PbGd");
  const Attend attend_one = attend(check_level(level), type);
  q = with_contiguous_rows(q);
  k = with_contiguous_rows(k);
  v = with_contiguous_rows(v);
  table = torch::stable::contiguous(table);
  length = torch::stable::contiguous(length);
  const int64_t columns = table.size(1), shared = heads / groups;
  const auto* table_data = static_cast<const int64_t*>(table.const_data_ptr());
  const auto* length_data = static_cast<const int64_t*>(length.const_data_ptr());
  check_tables(table_data, columns, length_data, sequences, blocks, block_size);
  Tensor out = torch::stable::new_empty(q, {sequences, heads, width});
  const void *q_data = q.const_data_ptr(), *k_data = k.const_data_ptr(), *v_data = v.const_data_ptr();
  void* out_data = out.mutable_data_ptr();

  // Threads share out pairs of sequence and key head by the positions that these have.
  std::vector<int64_t> before(sequences * groups + 1, 0);
  int64_t longest = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    longest = std::max(longest, length_data[b]);
    for (int64_t g = 0; g < groups; ++g) before[b * groups + g + 1] = before[b * groups + g] + length_data[b];
  }
  const int64_t useful = std::max<int64_t>(1, 2 * before.back() * width * element_bytes(type) / kBytesPerThread);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), useful);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    auto* memory = static_cast<float*>(scratch.reserve(attend_scratch(width, longest) * 4));
    for (int64_t thread = begin; thread < end; ++thread) {
      const Share share(before.back(), thread, threads);
      const auto first = std::lower_bound(before.begin(), before.end(), share.begin) - before.begin();
      for (int64_t pair = first; pair < sequences * groups && before[pair] < share.end; ++pair) {
        const int64_t b = pair / groups, g = pair % groups;
        const Queries queries{at(q_data, b * q.stride(0) + g * shared * q.stride(1), type),
                              at(out_data, (b * heads + g * shared) * width, type),
                              shared,
                              width,
                              q.stride(1),
                              width};
        const Pages pages{at(k_data, g * k.stride(2), type),
                          at(v_data, g * v.stride(2), type),
                          table_data + b * columns,
                          block_size,
                          length_data[b],
                          k.stride(0),
                          k.stride(1),
                          v.stride(0),
                          v.stride(1)};
        attend_one(queries, pages, memory);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace moeyard

STABLE_TORCH_LIBRARY_FRAGMENT(moeyard, m) {
  m.def("attend_singles(Tensor q, Tensor k, Tensor v, Tensor table, Tensor length, int level) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(moeyard, CPU, m) { m.impl("attend_singles", TORCH_BOX(&moeyard::attend_singles)); }
