// Products with matrices in blocks: see blocks.h. The decoding of each format is in block_formats.h.
#include "block_formats.h"

#include <vector>

namespace {

// Rounds one row of activations [k] to int8 for a format, and takes the sums that it needs.
template <int64_t FORMAT>
void round_row(const float* x, int64_t k, Inputs* to) {
  const int64_t groups = steps_of(FORMAT, k) * GROUPS;
  for (int64_t group = 0; group < groups; group++) {
    const int64_t first = group * GROUP;
    int8_t rounded[GROUP];
    const float scale = round_group(x + first, k - first, rounded).scale;
    int low[4] = {}, high[4] = {};
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) low[i] += rounded[4 * i + j], high[i] += rounded[16 + 4 * i + j];
    Inputs& step = to[group / GROUPS];
    const int64_t at = group % GROUPS;
    std::memcpy(step.low + at * 16, rounded, 16);
    std::memcpy(step.high + at * 16, rounded + 16, 16);
    for (int i = 0; i < 4; i++) {
      const int64_t lane = at * 4 + i;
      step.scale[lane] = scale;
      step.sum[lane] = scale * (float)(low[i] + high[i]);
      step.start[lane] = -zero_of<FORMAT> * (FORMAT == Q6_K ? low[i] : low[i] + high[i]);
      step.start_high[lane] = -zero_of<FORMAT> * high[i];
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

// Rows of activations taken at once.
constexpr int MOST_ROWS = 4;

// Products of ROWS rows with OUTPUTS rows of weights.
template <int64_t FORMAT, int ROWS, int OUTPUTS>
inline void block_tile(const Inputs* const* x, const uint8_t* const* w, int64_t k, float* out) {
  constexpr int count = ROWS * OUTPUTS, here = step_bytes(FORMAT);
  Vec sum[count] = {};
  const int64_t steps = steps_of(FORMAT, k), whole = whole_steps(FORMAT, k);
  for (int64_t step = 0; step < steps; step++) {
    const int left = (int)((k + GROUP - 1) / GROUP - step * GROUPS);
#pragma GCC unroll 8
    for (int j = 0; j < OUTPUTS; j++) {
      // Past the end it is a hint and no access.
      for (int line = 0; line < here; line += 64)
        __builtin_prefetch(w[j] + step * here + AHEAD + line, 0, 3);
      const Weights weights = step < whole ? decode<FORMAT, true>(w[j], step, GROUPS)
                                           : decode<FORMAT, false>(w[j], step, left);
#pragma GCC unroll 8
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

template <int64_t FORMAT, int OUTPUTS, int ROWS>
inline void block_rows(const Inputs* const* x, int64_t rows, const Part& part, int64_t column,
                       int64_t apart, float* const* out) {
  if (rows == ROWS)
    block_place<FORMAT, ROWS, OUTPUTS>(x, part, column, apart, out);
  else if constexpr (ROWS > 1)
    block_rows<FORMAT, OUTPUTS, ROWS - 1>(x, rows, part, column, apart, out);
}

// Outputs column, column + apart, ... for all rows, in blocks of nearly equal size.
template <int64_t FORMAT, int OUTPUTS>
inline void block_column(const Inputs* const* x, int64_t rows, const Part& part, int64_t column,
                         int64_t apart, float* const* out) {
  for (int64_t at = 0, left = (rows + MOST_ROWS - 1) / MOST_ROWS; at < rows; left--) {
    const int64_t now = (rows - at + left - 1) / left;
    block_rows<FORMAT, OUTPUTS, MOST_ROWS>(x + at, now, part, column, apart, out + at);
    at += now;
  }
}

// `rounded`: the rows were rounded for this format already, by the part before.
template <int64_t FORMAT>
void part_product(const float* const* x, int64_t rows, const Part& part, float* const* out,
                  int threads, bool rounded) {
  static thread_local std::vector<Inputs> inputs;
  static thread_local std::vector<const Inputs*> starts;
  const int64_t steps = steps_of(FORMAT, part.k);
  if (!rounded) {
    if ((int64_t)inputs.size() < rows * steps) inputs.resize(rows * steps);
    starts.resize(rows);
    for (int64_t m = 0; m < rows; m++) {
      starts[m] = inputs.data() + m * steps;
      round_row<FORMAT>(x[m], part.k, inputs.data() + m * steps);
    }
  }
  const Inputs* const* from = starts.data();
  const int64_t apart = part.blocks.n / 4;
  parallel(threads, apart, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column++)
      block_column<FORMAT, 4>(from, rows, part, column, apart, out);
  });
  for (int64_t column = apart * 4; column < part.blocks.n; column++)
    block_column<FORMAT, 1>(from, rows, part, column, 1, out);
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
  int64_t first = 0, before = -1;
  for (const BlockPart* part = (const BlockPart*)w.data; first < w.n; first += part++->n) {
    const Part here{*part, first, w.k, row_bytes(part->format, w.k), w.bias};
    const bool rounded = part->format == before;
    before = part->format;
    switch (part->format) {
      case Q4_0: part_product<Q4_0>(x, rows, here, out, threads, rounded); break;
      case Q4_1: part_product<Q4_1>(x, rows, here, out, threads, rounded); break;
      case Q8_0: part_product<Q8_0>(x, rows, here, out, threads, rounded); break;
      case Q4_K: part_product<Q4_K>(x, rows, here, out, threads, rounded); break;
      case BF16_PANELS:
      case INT8_PANELS:
        panel_product(x, rows, *part, w.k, first, w.bias, out, threads, rounded);
        break;
      case Q4_0_PANELS:
      case Q4_1_PANELS:
      case Q8_0_PANELS:
      {
        // Those of one format together; the loop goes on after the last of them.
        const BlockPart* const begin = part;
        int64_t end = first + part->n;
        while (end < w.n && part[1].format == begin->format) end += (++part)->n;
        block_panel_product(x, rows, begin, part - begin + 1, w.k, first, w.bias, out, threads,
                            rounded);
        first = end - part->n;
        break;
      }
      default: part_product<Q6_K>(x, rows, here, out, threads, rounded);
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
    if (part->format >= Q4_0_PANELS) return widen_block_panel_row(*part, w.k, row, out);
    if (part->format >= BF16_PANELS) return widen_panel_row(*part, w.k, row, out);
    const uint8_t* data = part->data + row * row_bytes(part->format, w.k);
    switch (part->format) {
      case Q4_0: return widen_blocks<Q4_0>(data, w.k, out);
      case Q4_1: return widen_blocks<Q4_1>(data, w.k, out);
      case Q8_0: return widen_blocks<Q8_0>(data, w.k, out);
      case Q4_K: return widen_blocks<Q4_K>(data, w.k, out);
      default: return widen_blocks<Q6_K>(data, w.k, out);
    }
  }
  std::memcpy(out, (const float*)w.data + row * w.k, w.k * sizeof(float));
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
