// Checks that all ops share: an argument that does not fit is an error with its name, its shape and what was expected.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>
#include <utility>

#include "rows/kernels.h"

namespace moeyard {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A dimension's letter and its size; a negative size is any.
using Dim = std::pair<const char*, int64_t>;

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<Dim> dims) {
  bool fits = tensor.dim() == static_cast<int64_t>(dims.size());
  std::ostringstream found, wanted;
  for (int64_t i = 0; i < tensor.dim(); ++i) found << (i ? ", " : "") << tensor.size(i);
  int64_t i = 0;
  for (const auto& [letter, size] : dims) {
    fits = fits && (size < 0 || tensor.size(i) == size);
    wanted << (i++ ? ", " : "") << letter;
    if (size >= 0) wanted << "=" << size;
  }
  STD_TORCH_CHECK(fits, name, " has shape (", found.str(), "), expected (", wanted.str(), ")");
}

inline Type check_type(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, " is of dtype ",
                  torch::headeronly::toString(type), ", expected Float or BFloat16");
  return type == ScalarType::Float ? Type::kFloat : Type::kBfloat16;
}

inline void check_same_type(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " is of dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), " and ", like_name, " of ",
                  torch::headeronly::toString(like.scalar_type()), ": they must be the same");
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
}

// The level to compute with: the best one for a negative number.
inline Level check_level(int64_t level) {
  const Level best = best_level();
  STD_TORCH_CHECK(level <= static_cast<int64_t>(best), "level ", level, " was asked for and this CPU has ",
                  static_cast<int64_t>(best));
  return level < 0 ? best : static_cast<Level>(level);
}

// Itself if elements of the last dimension are neighbours, else a copy.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace moeyard
