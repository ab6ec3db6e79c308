// Matrices of 4 to 8 bits in the blocks of GGUF files, read as they lie there.
//
// Weights come in blocks of 32, or of 256 with scales for each 32 or 16. A product rounds each row of
// activations to 8 bits in blocks of 32 with a scale of their own (the largest of a block is 127),
// multiplies whole numbers, and adds scale times sum in float32, lane by lane in the order of k. So an
// output depends on its own row of activations and its own row of weights and on nothing else.
#pragma once

#include "products.h"

// As GGUF numbers them.
enum BlockFormat : int64_t { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12, Q6_K = 14,
// Not in files: bfloat16 and int8 in panels of 16 rows. A panel has, pair of columns after pair, two
// numbers of each row; int8, a sign and a size, has those of four rows in the first of two pairs, of
// the same in the second one, and so on. The last panel has the rows that are left, pair after pair.
// After the panels of int8 comes a float32 scale of each row. Activations are rounded to bfloat16,
// products of such numbers are exact, and sums are float32.
                           BF16_PANELS = 1001, INT8_PANELS = 1002,
// Blocks of 32 in panels of 16 rows. A panel has, group of 32 columns after group, vectors of four
// columns of each row: of Q8_0 eight, of numbers plus 128; of the others four, the i-th with columns
// 4 i.. in the lower halves of its bytes and 16 + 4 i.. in the upper ones; then the float16 scales of
// its rows and, of Q4_1, their minima. The last panel has the rows that are left.
                           Q4_0_PANELS = 1003, Q4_1_PANELS = 1004, Q8_0_PANELS = 1005 };

// Rows of a matrix, each `row_bytes` long. `rotary` [0: none]: width of a head whose rows lie in pairs
// for the rotary embedding, as llama.cpp keeps them: row 2 i + j of a head is output j * rotary/2 + i.
struct BlockPart {
  const uint8_t* data;
  int64_t n, format, rotary;
};

constexpr int64_t GROUP = 32;

static inline int64_t row_bytes(int64_t format, int64_t k) {
  const int64_t small = (k + 31) / 32, large = (k + 255) / 256;
  switch (format) {
    case Q4_0: return small * 18;
    case Q4_1: return small * 20;
    case Q8_0: return small * 34;
    case Q4_K: return large * 144;
    case BF16_PANELS: return (k + 1) / 2 * 4;
    case INT8_PANELS: return (k + 3) / 4 * 4 + 4;
    case Q4_0_PANELS: return small * 18;
    case Q4_1_PANELS: return small * 20;
    case Q8_0_PANELS: return small * 34;
    default: return large * 210;
  }
}

// Bytes that one product with a weight reads.
static inline int64_t bytes_of(const Matrix& w) {
  if (w.storage != BLOCKS) return w.n * w.k * (int64_t)sizeof(float);
  int64_t rows = 0, bytes = 0;
  for (const BlockPart* part = (const BlockPart*)w.data; rows < w.n; rows += part++->n)
    bytes += part->n * row_bytes(part->format, w.k);
  return bytes;
}

// A weight without its first rows; of blocks, whole parts.
static inline Matrix without_rows(Matrix w, int64_t skipped) {
  if (w.storage == BLOCKS) {
    const BlockPart* part = (const BlockPart*)w.data;
    for (int64_t rows = 0; rows < skipped; rows += part++->n) {
    }
    w.data = part;
  } else {
    w.data = (const char*)w.data + skipped * (bytes_of(w) / w.n);
  }
  w.bias = w.bias ? w.bias + skipped : nullptr;
  w.n -= skipped;
  return w;
}

// Products with one part in panels, whose first output is `first`. `rounded`: of the same rows, which
// were rounded by the part before.
void panel_product(const float* const* x, int64_t rows, const BlockPart& part, int64_t k,
                   int64_t first, const float* bias, float* const* out, int threads, bool rounded);

// Row `row` of a part in panels, widened to float32 -> out [k].
void widen_panel_row(const BlockPart& part, int64_t k, int64_t row, float* out);

// The same two of parts, all of one format, whose blocks are in panels.
void block_panel_product(const float* const* x, int64_t rows, const BlockPart* parts, int64_t count,
                         int64_t k, int64_t first, const float* bias, float* const* out,
                         int threads, bool rounded);
void widen_block_panel_row(const BlockPart& part, int64_t k, int64_t row, float* out);

// Row `row` of a weight of any storage, widened to float32 -> out [k].
void widen_row(const Matrix& w, int64_t row, float* out);
