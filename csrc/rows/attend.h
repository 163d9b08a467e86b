// Attention of single queries, one set of functions for each kind of CPU.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace moeyard {

// The keys and values of one head of one sequence, block after block of a paged cache.
struct Pages {
  const void *keys, *values;              // first element of this head in block 0
  const int64_t* table;                   // the sequence's blocks, in order
  int64_t block_size;                     // positions of a block
  int64_t length;                         // positions to attend to, at least one
  int64_t key_block, key_position;        // elements from one block, or position, to the next
  int64_t value_block, value_position;
};

// Query heads that share those keys.
struct Queries {
  const void* q;     // `heads` rows of `width`, `q_stride` apart
  void* out;         // the same, `out_stride` apart
  int64_t heads, width, q_stride, out_stride;
};

// Floats of scratch memory that `attend` needs for so many positions.
int64_t attend_scratch(int64_t width, int64_t length);

// out = softmax(q K^T / sqrt(width)) V in fp32, rounded to the type once. Every head is added up in the same order
// whatever else is computed.
using Attend = void (*)(const Queries& queries, const Pages& pages, float* scratch);

// `level` must be one that this CPU has; above kAvx512 there is nothing to gain.
Attend attend(Level level, Type type);

}  // namespace moeyard
