// Attention of a few tokens of one sequence over its cached keys and values, and the cache's writes.
//
// A sequence's slots are runs: one for a cache that holds each row in a buffer of its own, and as many
// as its blocks make in a pool of blocks. A token's result is the same to the bit however its
// sequence is cut into runs: keys are multiplied one by one, and values are added up in the order of
// their positions.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "entries.h"
#include "products.h"

struct Layer {
  Matrix qkv, out, gate_up, down;
  const float *attention_norm, *query_norm, *key_norm, *mlp_norm;  // query and key: null if none
  int64_t heads, kv_heads, head_dim;
  int64_t window;  // 0: none
  float scaling, eps, head_eps;
};

// Positions position..position+count-1 of a sequence lie in slots slot.. one after another.
struct Run {
  int64_t position, slot, count;
};

// Runs of rising positions, each beginning where the one before ends.
struct Table {
  const Run* runs;
  int64_t count;
};

// Consecutive tokens of one sequence: rows offset.. of the pass at positions start.. of cache row
// `row`. `holes` [start + count] is 1 where a slot holds nothing, or null. `tables`, one a group of
// layers, say where the sequence's slots are in pools; null: in its row. Spans come in the order of
// their offsets.
struct Span {
  int64_t row, start, count, offset;
  const uint8_t* holes;
  const Table* tables;
};

// exp(x) to about one unit in the last place; 0 below -87, and NaN stays NaN.
static inline Vec exponential(Vec x) {
  const Vec low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec n = multiply_add(x, splat(1.44269504088896341f), shift) - shift;
  const Vec high_part = multiply_add(n, splat(-0.693359375f), x);
  const Vec r = multiply_add(n, splat(2.12194440e-4f), high_part);
  Vec p = splat(1.9875691500e-4f);
  p = multiply_add(p, r, splat(1.3981999507e-3f));
  p = multiply_add(p, r, splat(8.3334519073e-3f));
  p = multiply_add(p, r, splat(4.1665795894e-2f));
  p = multiply_add(p, r, splat(1.6666665459e-1f));
  p = multiply_add(p, r, splat(5.0000001201e-1f));
  p = multiply_add(p * r, r, r + splat(1.0f));
  const IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
  return p * (Vec)power;
}

static void rms_norm(const float* x, const float* gain, int64_t d, float eps, float* out) {
  Vec squares{};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
  float parts[LANES];
  store(parts, sums<1>(&squares));
  float total = parts[0];
  for (; i < d; i++) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / (float)d + eps);
  for (i = 0; i + LANES <= d; i += LANES) store(out + i, load(gain + i) * (load(x + i) * scale));
  for (; i < d; i++) out[i] = gain[i] * (x[i] * scale);
}

// Rotary embedding in place; cos and sin [dim], halves rotated against each other.
static void rotate(float* x, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// The largest of scores[from..to), NaN left out; -inf of none. One running maximum would wait for
// itself at every score.
static float largest(const float* scores, int64_t from, int64_t to) {
  float most = -std::numeric_limits<float>::infinity();
  int64_t t = from;
  Vec lanes = splat(most);
  for (; t + LANES <= to; t += LANES) {
    const Vec now = load(scores + t);
    lanes = now > lanes ? now : lanes;
  }
  float parts[LANES];
  store(parts, lanes);
  for (float part : parts) most = part > most ? part : most;
  for (; t < to; t++) most = scores[t] > most ? scores[t] : most;
  return most;
}

// Softmax numerators of scores[from..to), scaled, in place; the others become 0. Returns their sum.
static float soften(float* scores, int64_t slots, int64_t from, int64_t to, float scaling) {
  const float most = largest(scores, from, to);
  for (int64_t t = 0; t < from; t++) scores[t] = 0.0f;
  Vec total{};
  int64_t t = from;
  for (; t + LANES <= to; t += LANES) {
    const Vec e = exponential((load(scores + t) - splat(most)) * splat(scaling));
    store(scores + t, e);
    total += e;
  }
  float parts[LANES];
  store(parts, sums<1>(&total));
  float sum = parts[0];
  if (t < to) {
    float rest[LANES] = {};
    std::memcpy(rest, scores + t, (to - t) * sizeof(float));
    store(rest, exponential((load(rest) - splat(most)) * splat(scaling)));
    for (int64_t i = 0; i < to - t; i++) {
      scores[t + i] = rest[i];
      sum += rest[i];
    }
  }
  for (t = to; t < slots; t++) scores[t] = 0.0f;
  return sum;
}

// to[r][i] = x[r] * keys[i] for the keys of one piece, whose first slot is `keys`; without scales.
template <int OUTPUTS, typename T>
static inline void score_tiles(const float* const* x, int64_t rows, const char* keys,
                               const Piece& piece, int64_t dim, float* const* to, Ahead& ahead) {
  const Matrix of{keys, nullptr, piece.tiled, dim, FLOAT32};
  const int64_t bytes = entry_bytes<T>(dim);
  int64_t i = 0;
  for (; i + OUTPUTS <= piece.tiled; i += OUTPUTS) {
    ahead.reach(piece.begin + i);
    const T* entries[OUTPUTS];
    for (int j = 0; j < OUTPUTS; j++) entries[j] = (const T*)(keys + (i + j) * bytes);
    blocks_of_tiles<OUTPUTS, T>(x, rows, entries, of, i, 1, to);
  }
  for (; i < piece.tiled; i++) {
    const T* entry = (const T*)(keys + i * bytes);
    blocks_of_tiles<1, T>(x, rows, &entry, of, i, 1, to);
  }
}

// out[i] [dim] = sum_t shares[i][t] values[t] / total[i] over from <= t < to, for ROWS rows; shares
// have the scales of the values in them.
template <int ROWS, typename T>
static inline void mix(const float* const* shares, const float* totals, const char* values,
                       const Piece* pieces, int64_t n_pieces, int64_t from, int64_t to,
                       int64_t dim, float* const* out, Ahead& ahead) {
  // Vectors of a value at a time. Each sum waits for itself at every position, so as many are kept
  // as there are registers for.
  constexpr int width = ROWS > 2 && ACCUMULATORS < 16 ? 2 : 4;
  const int64_t bytes = entry_bytes<T>(dim);
  int64_t d = 0;
  const auto chunk = [&](auto vectors) {
    constexpr int n = decltype(vectors)::value;
    Vec acc[ROWS][n] = {};
    for (int64_t p = 0; p < n_pieces; p++) {
      const Piece& piece = pieces[p];
      const int64_t low = from > piece.begin ? from : piece.begin;
      const int64_t high = to < piece.end ? to : piece.end;
      const char* first = values + (piece.slot - piece.begin) * bytes + d * (int64_t)sizeof(T);
      for (int64_t t = low; t < high;) {
        const int64_t stop = high - t > 8 ? t + 8 : high;
        ahead.reach(t);
        for (; t < stop; t++) {
          const T* row = (const T*)(first + t * bytes);
#pragma GCC unroll 4
          for (int j = 0; j < n; j++) {
            const Vec v = load(row + j * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++)
              acc[i][j] = multiply_add(splat(shares[i][t]), v, acc[i][j]);
          }
        }
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < n; j++) store(out[i] + d + j * LANES, acc[i][j] / splat(totals[i]));
    d += n * LANES;
  };
  while (d + width * LANES <= dim) chunk(std::integral_constant<int, width>{});
  if (width == 4 && d + 3 * LANES <= dim) chunk(std::integral_constant<int, 3>{});
  if (d + 2 * LANES <= dim) chunk(std::integral_constant<int, 2>{});
  if (d + LANES <= dim) chunk(std::integral_constant<int, 1>{});
  for (; d < dim; d++)
    for (int i = 0; i < ROWS; i++) {
      float total = 0.0f;
      for (int64_t p = 0; p < n_pieces; p++) {
        const Piece& piece = pieces[p];
        const int64_t low = from > piece.begin ? from : piece.begin;
        const int64_t high = to < piece.end ? to : piece.end;
        const char* first = values + (piece.slot - piece.begin) * bytes + d * (int64_t)sizeof(T);
        for (int64_t t = low; t < high; t++)
          total = std::fma(shares[i][t], widen(*(const T*)(first + t * bytes)), total);
      }
      out[i][d] = total / totals[i];
    }
}

namespace {

// Products of one head's queries and keys from which on heads are shared out among threads.
constexpr int64_t MANY_PRODUCTS = 1 << 13;

struct Scratch {
  std::vector<float> floats;
  std::vector<const float*> inputs;
  std::vector<float*> outputs;
  float* room(size_t count) {
    if (floats.size() < count) floats.resize(count);
    return floats.data();
  }
};

// Attention of one sequence's tokens over one layer's cache. `queries` is the joined QKV of the
// pass, `stride` floats a token; the result goes to `mixed`, heads * head_dim a token. A thread owns
// whole heads of keys.
template <typename T>
void attend_in(const Layer& layer, const KeysValues& kv, const Span& span, float* queries,
            int64_t stride, float* mixed, int threads) {
  const int64_t dim = layer.head_dim, groups = layer.heads / layer.kv_heads;
  const int64_t rows = groups * span.count, end = span.start + span.count;
  const int64_t bytes = entry_bytes<T>(dim);
  const auto first_seen = [&](int64_t r) {
    const int64_t position = span.start + r / groups;
    return layer.window && position >= layer.window ? position - layer.window + 1 : (int64_t)0;
  };
  const Run whole{0, 0, kv.capacity};
  const Table table = span.tables ? span.tables[kv.group] : Table{&whole, 1};
  // Scores are counted from the first position that any row sees.
  const int64_t base = first_seen(0), slots = end - base;
  const int64_t padded = (slots + 7) / 8 * 8;
  static thread_local std::vector<Piece> shared;
  std::vector<Piece>& cut = shared;  // the caller's, whichever thread reads it
  cut.clear();
  for (int64_t i = 0; i < table.count; i++) {
    const Run& run = table.runs[i];
    const int64_t low = run.position > base ? run.position : base;
    const int64_t stop = run.position + run.count, high = stop < end ? stop : end;
    if (low >= high) continue;
    const int64_t slot = run.slot + low - run.position;
    // Up to eight slots more at the end: tiles of outputs may then always be whole.
    const int64_t whole_tiles = padded - (low - base);
    const bool all = high == end && slot + whole_tiles <= kv.capacity;
    cut.push_back({slot, low - base, high - base, all ? whole_tiles : high - low});
  }
  const auto attend_head = [&](int64_t head) {
    static thread_local Scratch scratch;
    float* scores = scratch.room(rows * padded + rows);
    float* totals = scores + rows * padded;
    scratch.inputs.resize(2 * rows);
    scratch.outputs.resize(2 * rows);
    const float** x = scratch.inputs.data();
    float** to = scratch.outputs.data();
    for (int64_t r = 0; r < rows; r++) x[rows + r] = scores + r * padded;
    const int64_t held = (span.row * kv.row_stride + head * kv.capacity) * bytes;
    const char *head_keys = kv.keys + held, *head_values = kv.values + held;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = span.offset + r / groups, which = head * groups + r % groups;
      x[r] = queries + token * stride + which * dim;
      to[rows + r] = mixed + (token * layer.heads + which) * dim;
    }
    const Piece* pieces = cut.data();
    const int64_t count = (int64_t)cut.size();
    Ahead keys(head_keys, bytes, pieces, count);
    for (const Piece& piece : cut) {
      for (int64_t r = 0; r < rows; r++) to[r] = scores + r * padded + piece.begin;
      const char* first = head_keys + piece.slot * bytes;
      if (rows * 8 <= ACCUMULATORS)
        score_tiles<8, T>(x, rows, first, piece, dim, to, keys);
      else
        score_tiles<4, T>(x, rows, first, piece, dim, to, keys);
    }
    Ahead values(head_values, bytes, pieces, count);
    values.reach(0);
    if (head + 1 < layer.kv_heads)
      Ahead(head_keys + kv.capacity * bytes, bytes, pieces, count).reach(0);
    const auto from = [&](int64_t r) { return first_seen(r) - base; };
    const auto until = [&](int64_t r) { return span.start + r / groups + 1 - base; };
    const uint8_t* holes = span.holes ? span.holes + base : nullptr;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t first = from(r), last = until(r);
      float* mine = scores + r * padded;
      if (sizeof(T) == 1) scale_by_entry(mine, head_keys, dim, pieces, count, first, last);
      for (int64_t t = first; holes && t < last; t++)
        if (holes[t]) mine[t] = -std::numeric_limits<float>::infinity();
      totals[r] = soften(mine, slots, first, last, layer.scaling);
      for (int64_t t = first; holes && t < last; t++)
        if (holes[t]) mine[t] = 0.0f;
      if (sizeof(T) == 1) scale_by_entry(mine, head_values, dim, pieces, count, first, last);
    }
    int64_t r = 0;
    // Slots that one row of several sees and another does not have a share of 0 in the other.
    const auto mixed_together = [&](auto together) {
      constexpr int n = decltype(together)::value;
      mix<n, T>(x + rows + r, totals + r, head_values, pieces, count, from(r), until(r + n - 1),
                dim, to + rows + r, values);
      r += n;
    };
    while (r + 4 <= rows) mixed_together(std::integral_constant<int, 4>{});
    if (r + 3 == rows) mixed_together(std::integral_constant<int, 3>{});
    if (r + 2 == rows) mixed_together(std::integral_constant<int, 2>{});
    if (r < rows) mixed_together(std::integral_constant<int, 1>{});
  };
  const bool many = slots * rows * dim >= MANY_PRODUCTS;
  parallel(many ? threads : 1, layer.kv_heads, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; head++) attend_head(head);
  });
}

void attend(const Layer& layer, const KeysValues& kv, const Span& span, float* queries,
            int64_t stride, float* mixed, int threads) {
  if (kv.storage == INT8)
    attend_in<int8_t>(layer, kv, span, queries, stride, mixed, threads);
  else
    attend_in<float>(layer, kv, span, queries, stride, mixed, threads);
}

// Query and key norms, rotary embedding, and the cache, of one span's tokens. `joined` has for each
// token, `stride` floats apart, its queries (if `queries`), keys and values.
void write_keys(const Layer& layer, const KeysValues& kv, const Span& span, bool queries,
                const float* cos, const float* sin, float* joined, int64_t stride) {
  const int64_t dim = layer.head_dim, before = queries ? layer.heads : 0;
  const Run whole{0, 0, kv.capacity};
  const Run* run = span.tables ? span.tables[kv.group].runs : &whole;
  for (int64_t c = 0; c < span.count; c++) {
    const int64_t t = span.offset + c, position = span.start + c;
    while (position >= run->position + run->count) run++;
    const int64_t slot = run->slot + position - run->position;
    float* token = joined + t * stride;
    for (int64_t h = 0; h < before + layer.kv_heads; h++) {
      float* head = token + h * dim;
      const float* norm = h < before ? layer.query_norm : layer.key_norm;
      if (norm) rms_norm(head, norm, dim, layer.head_eps, head);
      rotate(head, cos + t * dim, sin + t * dim, dim);
    }
    for (int64_t h = 0; h < layer.kv_heads; h++) {
      const int64_t at = span.row * kv.row_stride + h * kv.capacity + slot;
      const float *key = token + (before + h) * dim, *value = key + layer.kv_heads * dim;
      if (kv.storage == INT8) {
        const int64_t bytes = entry_bytes<int8_t>(dim);
        write_entry(key, dim, kv.keys + at * bytes);
        write_entry(value, dim, kv.values + at * bytes);
        continue;
      }
      const int64_t bytes = entry_bytes<float>(dim);
      std::memcpy(kv.keys + at * bytes, key, bytes);
      std::memcpy(kv.values + at * bytes, value, bytes);
    }
  }
}

}  // namespace
