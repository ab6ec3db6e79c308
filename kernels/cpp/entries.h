// Keys and values as a cache holds them: where an entry lies, how it is written, asked for ahead, and
// how the scales of entries in 8 bits come into the scores and shares of attention.
#pragma once

#include <cmath>
#include <cstring>

#include "products.h"

// Keys and values of one layer: rows of buffers [batch, kv_heads, capacity, entry], or, where
// `row_stride` is 0, a pool [kv_heads, capacity, entry] for all sequences. An entry is head_dim
// floats, or with `storage` INT8 head_dim whole numbers and one float behind them, their scale
// (deliberate/cache/int8_cache.py). `group` says which of a span's tables is this layer's.
struct KeysValues {
  char *keys, *values;
  int64_t capacity;
  int64_t row_stride;  // entries
  int64_t group;
  int64_t storage;
};

// Bytes of one entry of numbers of type T.
template <typename T>
static inline int64_t entry_bytes(int64_t dim) {
  return dim * (int64_t)sizeof(T) + (sizeof(T) == 1 ? (int64_t)sizeof(float) : 0);
}

// Positions begin..end-1, counted as scores are, lie in slots slot..; `tiled` keys are multiplied.
struct Piece {
  int64_t slot, begin, end, tiled;
};

// Asks for keys or values, in the order of their positions, before they are needed: they come from
// the third-level cache or from memory, in runs too short for the processor to foresee.
class Ahead {
 public:
  // `from`: the first slot, `bytes` each; of `count` pieces.
  Ahead(const char* from, int64_t bytes, const Piece* pieces, int64_t count)
      : from_(from), bytes_(bytes), piece_(pieces), end_(pieces + count) {}

  // Those that are needed soon after position `now`, unless they were asked for before.
  void reach(int64_t now) {
    constexpr int64_t soon = 32;  // positions
    while (piece_ < end_ && next_ < now + soon) {
      const int64_t stop = piece_->end < now + soon ? piece_->end : now + soon;
      const char* at = from_ + (piece_->slot + next_ - piece_->begin) * bytes_;
      const char* to = from_ + (piece_->slot + stop - piece_->begin) * bytes_;
      for (; at < to; at += 64) __builtin_prefetch(at, 0, 3);
      next_ = stop;
      if (stop == piece_->end) piece_++;
    }
  }

 private:
  const char* from_;
  int64_t bytes_;
  const Piece *piece_, *end_;
  int64_t next_ = 0;
};

// row[t] *= the scale of entry t for from <= t < to; `entries` is the first slot.
static inline void scale_by_entry(float* row, const char* entries, int64_t dim,
                                  const Piece* pieces, int64_t n_pieces, int64_t from,
                                  int64_t to) {
  const int64_t bytes = entry_bytes<int8_t>(dim);
  for (int64_t p = 0; p < n_pieces; p++) {
    const Piece& piece = pieces[p];
    const int64_t low = from > piece.begin ? from : piece.begin;
    const int64_t high = to < piece.end ? to : piece.end;
    const char* scale = entries + (piece.slot + low - piece.begin) * bytes + dim;
    for (int64_t t = low; t < high; t++, scale += bytes) row[t] *= read<float>(scale);
  }
}

// One entry of `dim` whole numbers and their scale, rounded to nearest, halves to even.
static void write_entry(const float* x, int64_t dim, char* entry) {
  float most = 0.0f;
  for (int64_t i = 0; i < dim; i++) most = std::fmax(most, std::fabs(x[i]));
  const float scale = most / 127.0f, by = scale > 0.0f ? scale : 1.0f;
  for (int64_t i = 0; i < dim; i++) ((int8_t*)entry)[i] = (int8_t)std::nearbyint(x[i] / by);
  std::memcpy(entry + dim, &scale, sizeof scale);
}
