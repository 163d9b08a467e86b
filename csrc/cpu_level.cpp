// cpu_level: number of the best level of this CPU; see rows/kernels.h.

#include <torch/csrc/stable/library.h>

#include "rows/kernels.h"

namespace moeyard {
namespace {

int64_t cpu_level() { return static_cast<int64_t>(best_level()); }

}  // namespace
}  // namespace moeyard

STABLE_TORCH_LIBRARY_FRAGMENT(moeyard, m) { m.def("cpu_level() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(moeyard, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&moeyard::cpu_level));
}
