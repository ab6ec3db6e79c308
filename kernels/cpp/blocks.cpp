// Products with matrices in blocks: see blocks.h. The decoding of each format is in block_formats.h.
#include "block_formats.h"

#include <vector>

namespace {

// Rounds one row of activations [k] to int8 for a format, and takes the sums that it needs.
template <int64_t FORMAT>
void round_row(const float* x, int64_t k, Inputs* to) {
  constexpr float most_finite = 3.4028234664e38f, least = 1e-30f;
  const int64_t groups = steps_of(FORMAT, k) * GROUPS;
  for (int64_t group = 0; group < groups; group++) {
    Inputs& step = to[group / GROUPS];
    const int64_t at = group % GROUPS, first = group * GROUP;
    float values[GROUP] = {};
    const int64_t here = k - first < GROUP ? k - first : GROUP;
    if (here > 0) std::memcpy(values, x + first, here * sizeof(float));
    Vec most{};
    IVec finite = IVec{} - 1;
    for (int i = 0; i < GROUP; i += LANES) {
      const Vec v = load(values + i);
      const Vec size = v < 0.0f ? -v : v;
      most = size > most ? size : most;
      finite &= size <= splat(most_finite);
    }
    float largest = 0.0f;
    bool valid = true;
    for (int i = 0; i < LANES; i++) {
      largest = most[i] > largest ? most[i] : largest;
      valid = valid && finite[i];
    }
    const bool some = valid && largest > least;
    const float scale = valid ? (some ? largest / 127.0f : 0.0f) : std::nanf("");
    const float inverse = some ? 127.0f / largest : 0.0f;
    int8_t rounded[GROUP];
    const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    for (int i = 0; i < GROUP; i += LANES) {
      const Vec v = some ? load(values + i) * splat(inverse) : Vec{};
      const IVec whole = __builtin_convertvector((v + shift) - shift, IVec);
      const BVec small = __builtin_convertvector(whole, BVec);
      std::memcpy(rounded + i, &small, sizeof small);
    }
    std::memcpy(step.low + at * 16, rounded, 16);
    std::memcpy(step.high + at * 16, rounded + 16, 16);
    for (int i = 0; i < 4; i++) {
      int low = 0, high = 0;
      for (int j = 0; j < 4; j++) low += rounded[4 * i + j], high += rounded[16 + 4 * i + j];
      const int64_t lane = at * 4 + i;
      step.scale[lane] = scale;
      step.sum[lane] = scale * (float)(low + high);
      step.start[lane] = -zero_of<FORMAT> * (FORMAT == Q6_K ? low : low + high);
      step.start_high[lane] = -zero_of<FORMAT> * high;
    }
  }
}

// What one step of a row of weights adds to the sum of one row of activations.
template <int64_t FORMAT>
inline Vec add_step(Vec sum, const Weights& w, const Inputs& x) {
  constexpr int most = most_of<FORMAT>;
  const Vec scale = load(x.scale);
  const IVec start = zero_of<FORMAT> ? read<IVec>(x.start) : IVec{};
  IVec low = dot<most>(start, w.low, read<XVec>(x.low));
  if constexpr (FORMAT == Q6_K) {
    const IVec high = dot<most>(read<IVec>(x.start_high), w.high, read<XVec>(x.high));
    sum = multiply_add(__builtin_convertvector(low, Vec), w.scale * scale, sum);
    return multiply_add(__builtin_convertvector(high, Vec), w.other * scale, sum);
  } else {
    low = dot<most>(low, w.high, read<XVec>(x.high));
    sum = multiply_add(__builtin_convertvector(low, Vec), w.scale * scale, sum);
    if constexpr (has_minimum<FORMAT>) sum = multiply_add(w.other, load(x.sum), sum);
    return sum;
  }
}

// Bytes ahead of where a row is read: the processor's own prefetching begins anew with every
// matrix and page (30 layers of 2.2 MB, one row: 3.6 ms without, 2.6 with; four rows: 7.3 and 5.1).
constexpr int64_t AHEAD = 2048;

template <int64_t FORMAT, int ROWS, int OUTPUTS>
inline void block_tile(const Inputs* const* x, const uint8_t* const* w, int64_t k, float* out) {
  constexpr int count = ROWS * OUTPUTS, here = step_bytes(FORMAT);
  Vec sum[count] = {};
  const int64_t steps = steps_of(FORMAT, k), whole = whole_steps(FORMAT, k);
  int64_t step = 0;
  for (; step < whole; step++) {
#pragma GCC unroll 8
    for (int j = 0; j < OUTPUTS; j++) {
      // Past the end it is a hint and no access.
      for (int line = 0; line < here; line += 64)
        __builtin_prefetch(w[j] + step * here + AHEAD + line, 0, 3);
      const Weights weights = decode<FORMAT, true>(w[j], step, GROUPS);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++)
        sum[m * OUTPUTS + j] = add_step<FORMAT>(sum[m * OUTPUTS + j], weights, x[m][step]);
    }
  }
  if (step < steps) {
    const int left = (int)((k + GROUP - 1) / GROUP - step * GROUPS);
    for (int j = 0; j < OUTPUTS; j++) {
      const Weights weights = decode<FORMAT, false>(w[j], step, left);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++)
        sum[m * OUTPUTS + j] = add_step<FORMAT>(sum[m * OUTPUTS + j], weights, x[m][step]);
    }
  }
  constexpr int lanes = count < LANES ? count : count % LANES == 0 ? LANES : OUTPUTS;
#pragma GCC unroll 4
  for (int at = 0; at < count; at += lanes) {
    float parts[LANES];
    store(parts, sums<lanes>(sum + at));
    std::memcpy(out + at, parts, lanes * sizeof(float));
  }
}

// One part of a matrix; `first` is its first output.
struct Part {
  BlockPart blocks;
  int64_t first, k, bytes;
  const float* bias;

  // Where the output of a row of the part goes.
  int64_t place(int64_t row) const {
    if (!blocks.rotary) return first + row;
    const int64_t head = row / blocks.rotary, at = row % blocks.rotary;
    return first + head * blocks.rotary + at % 2 * (blocks.rotary / 2) + at / 2;
  }
};

template <int64_t FORMAT, int ROWS, int OUTPUTS>
inline void block_place(const Inputs* const* x, const Part& part, int64_t column, int64_t apart,
                        float* const* out) {
  const uint8_t* rows[OUTPUTS];
  for (int j = 0; j < OUTPUTS; j++) rows[j] = part.blocks.data + (column + j * apart) * part.bytes;
  float result[ROWS * OUTPUTS];
  block_tile<FORMAT, ROWS, OUTPUTS>(x, rows, part.k, result);
  for (int j = 0; j < OUTPUTS; j++) {
    const int64_t n = part.place(column + j * apart);
    const float bias = part.bias ? part.bias[n] : 0.0f;
    for (int m = 0; m < ROWS; m++) out[m][n] = result[m * OUTPUTS + j] + bias;
  }
}

template <int64_t FORMAT, int OUTPUTS>
inline void block_column(const Inputs* const* x, int64_t rows, const Part& part, int64_t column,
                         int64_t apart, float* const* out) {
  int64_t blocks = (rows + 3) / 4;
  while (rows > 0) {
    const int64_t now = (rows + blocks - 1) / blocks;
    if (now == 4) block_place<FORMAT, 4, OUTPUTS>(x, part, column, apart, out);
    if (now == 3) block_place<FORMAT, 3, OUTPUTS>(x, part, column, apart, out);
    if (now == 2) block_place<FORMAT, 2, OUTPUTS>(x, part, column, apart, out);
    if (now == 1) block_place<FORMAT, 1, OUTPUTS>(x, part, column, apart, out);
    x += now, out += now, rows -= now, blocks -= 1;
  }
}

template <int64_t FORMAT, int OUTPUTS>
void block_columns(const Inputs* const* x, int64_t rows, const Part& part, float* const* out,
                   int threads) {
  const int64_t apart = part.blocks.n / OUTPUTS;
  parallel(threads, apart, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column++)
      block_column<FORMAT, OUTPUTS>(x, rows, part, column, apart, out);
  });
  for (int64_t column = apart * OUTPUTS; column < part.blocks.n; column++)
    block_column<FORMAT, 1>(x, rows, part, column, 1, out);
}

template <int64_t FORMAT>
void part_product(const float* const* x, int64_t rows, const Part& part, float* const* out,
                  int threads) {
  static thread_local std::vector<Inputs> inputs;
  static thread_local std::vector<const Inputs*> pointers;
  const int64_t steps = steps_of(FORMAT, part.k);
  if ((int64_t)inputs.size() < rows * steps) inputs.resize(rows * steps);
  pointers.resize(rows);
  for (int64_t m = 0; m < rows; m++) {
    pointers[m] = inputs.data() + m * steps;
    round_row<FORMAT>(x[m], part.k, inputs.data() + m * steps);
  }
  block_columns<FORMAT, 4>(pointers.data(), rows, part, out, threads);
}

template <int64_t FORMAT>
void widen_blocks(const uint8_t* row, int64_t k, float* out) {
  const int64_t steps = steps_of(FORMAT, k);
  for (int64_t step = 0; step < steps; step++) {
    const int64_t left = FORMAT == Q4_K || FORMAT == Q6_K ? GROUPS : (k + 31) / 32 - step * GROUPS;
    const Weights w = decode<FORMAT, false>(row, step, left < GROUPS ? (int)left : GROUPS);
    for (int64_t i = 0; i < STEP && step * STEP + i < k; i++) {
      const int64_t group = i / GROUP, at = i % GROUP, lane = group * 4 + at % 16 / 4;
      const int q = (at < 16 ? w.low : w.high)[group * 16 + at % 16] - zero_of<FORMAT>;
      const float scale = FORMAT == Q6_K && at >= 16 ? w.other[lane] : w.scale[lane];
      const float value = scale * (float)q;
      out[step * STEP + i] = has_minimum<FORMAT> ? value + w.other[lane] : value;
    }
  }
}

}  // namespace

void block_product(const float* const* x, int64_t rows, const Matrix& w, float* const* out,
                   int threads) {
  int64_t first = 0;
  for (const BlockPart* part = (const BlockPart*)w.data; first < w.n; first += part++->n) {
    const Part here{*part, first, w.k, row_bytes(part->format, w.k), w.bias};
    switch (part->format) {
      case Q4_0: part_product<Q4_0>(x, rows, here, out, threads); break;
      case Q4_1: part_product<Q4_1>(x, rows, here, out, threads); break;
      case Q8_0: part_product<Q8_0>(x, rows, here, out, threads); break;
      case Q4_K: part_product<Q4_K>(x, rows, here, out, threads); break;
      default: part_product<Q6_K>(x, rows, here, out, threads);
    }
  }
}

void widen_row(const Matrix& w, int64_t row, float* out) {
  if (w.storage == BLOCKS) {
    const BlockPart* part = (const BlockPart*)w.data;
    for (; row >= part->n; row -= part++->n) {
    }
    if (part->rotary) {
      const int64_t head = row / part->rotary, at = row % part->rotary, half = part->rotary / 2;
      row = head * part->rotary + at % half * 2 + at / half;
    }
    const uint8_t* data = part->data + row * row_bytes(part->format, w.k);
    switch (part->format) {
      case Q4_0: return widen_blocks<Q4_0>(data, w.k, out);
      case Q4_1: return widen_blocks<Q4_1>(data, w.k, out);
      case Q8_0: return widen_blocks<Q8_0>(data, w.k, out);
      case Q4_K: return widen_blocks<Q4_K>(data, w.k, out);
      default: return widen_blocks<Q6_K>(data, w.k, out);
    }
  }
  if (w.storage == FLOAT32 && !w.scale) {
    std::memcpy(out, (const float*)w.data + row * w.k, w.k * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < w.k; i++) {
    const int64_t at = row * w.k + i;
    const float value = w.storage == FLOAT32    ? ((const float*)w.data)[at]
                        : w.storage == BFLOAT16 ? widen(((const uint16_t*)w.data)[at])
                                                : widen(((const int8_t*)w.data)[at]);
    out[i] = w.scale ? value * w.scale[row] : value;
  }
}

extern "C" {

// Products of x [rows, k] with a weight in blocks -> out [rows, n].
void deliberate_multiply_blocks(const Matrix* w, const float* x, int64_t rows, float* out,
                                int64_t threads) {
  static thread_local std::vector<const float*> from;
  static thread_local std::vector<float*> to;
  from.resize(rows), to.resize(rows);
  for (int64_t m = 0; m < rows; m++) from[m] = x + m * w->k, to[m] = out + m * w->n;
  block_product(from.data(), rows, *w, to.data(), (int)threads);
}

// Rows ids[0..count) of a weight, widened -> out [count, k].
void deliberate_widen_rows(const Matrix* w, const int64_t* ids, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) widen_row(*w, ids[i], out + i * w->k);
}
}
