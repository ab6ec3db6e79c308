// Products with matrices in blocks: see blocks.h. The decoding of each format is in block_formats.h.
#include "block_formats.h"

#include <vector>

namespace {

// Rounded activations of a run of four steps, a group a lane: vector `i` holds every group's i-th four
// numbers. `sum` is scale times a group's sum, `start` minus the format's zero times that sum.
struct alignas(BYTES) RunInputs {
  int8_t q[QUARTERS][BYTES];
  float scale[LANES], sum[LANES];
  int32_t start[LANES];
};

// One row of activations: runs of four steps, then single steps.
struct Row {
  const RunInputs* runs;
  const Inputs* steps;
};

// Lane of a run in which group `at` of its groups is: four steps' groups are transposed.
static inline int64_t lane_of(int64_t at) { return at % GROUPS * 4 + at / GROUPS; }

// Rounds one row of activations [k] to int8 for a format, and takes the sums that it needs.
template <int64_t FORMAT>
void round_row(const float* x, int64_t k, RunInputs* runs, Inputs* to) {
  constexpr float most_finite = 3.4028234664e38f, least = 1e-30f;
  const int64_t run_groups = runs_of<FORMAT>(k) * RUN;
  const int64_t groups = steps_of(FORMAT, k) * GROUPS;
  for (int64_t group = 0; group < groups; group++) {
    const int64_t first = group * GROUP;
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
    int low[4] = {}, high[4] = {};
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) low[i] += rounded[4 * i + j], high[i] += rounded[16 + 4 * i + j];
    if (group < run_groups) {
      RunInputs& run = runs[group / RUN];
      const int64_t lane = lane_of(group % RUN);
      int whole = 0;
      for (int i = 0; i < 4; i++) whole += low[i] + high[i];
      for (int i = 0; i < QUARTERS; i++) std::memcpy(run.q[i] + 4 * lane, rounded + 4 * i, 4);
      run.scale[lane] = scale;
      run.sum[lane] = scale * (float)whole;
      run.start[lane] = -zero_of<FORMAT> * whole;
      continue;
    }
    Inputs& step = to[(group - run_groups) / GROUPS];
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

// What one run adds. Two chains of sums, half as long as one.
template <int64_t FORMAT>
inline Vec add_run(Vec sum, const Run& w, const RunInputs& x) {
  constexpr int most = most_of<FORMAT>;
  IVec low = zero_of<FORMAT> ? read<IVec>(x.start) : IVec{}, high{};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    low = dot<most>(low, w.q[i], read<XVec>(x.q[i]));
    high = dot<most>(high, w.q[4 + i], read<XVec>(x.q[4 + i]));
  }
  sum = multiply_add(__builtin_convertvector(low + high, Vec), w.scale * load(x.scale), sum);
  if constexpr (has_minimum<FORMAT>) sum = multiply_add(w.other, load(x.sum), sum);
  return sum;
}

// Bytes ahead of where a row is read: the processor's own prefetching begins anew with every
// matrix and page (30 layers of 2.2 MB, one row: 3.6 ms without, 2.6 with; four rows: 7.3 and 5.1).
constexpr int64_t AHEAD = 2048;

template <int64_t FORMAT>
inline Run next_run(const uint8_t* row, int64_t run) {
  constexpr int here = 4 * step_bytes(FORMAT);
  // Past the end it is a hint and no access.
  for (int line = 0; line < here; line += 64)
    __builtin_prefetch(row + run * here + AHEAD + line, 0, 3);
  return decode_run<FORMAT>(row, run);
}

// Rows of activations taken at once. Of formats in runs one or two meet four outputs, whose streams
// fill the memory's bandwidth; more meet two, for which there are registers.
constexpr int FEW = 2, SOME = 4, MANY = 8;

// Products of ROWS rows with OUTPUTS rows of weights. `kept` holds the runs of the weights, one
// output after another, where they were decoded before (`KEPT`).
template <int64_t FORMAT, bool KEPT, int ROWS, int OUTPUTS>
inline void block_tile(const Row* x, const uint8_t* const* w, int64_t k, const Run* kept,
                       float* out) {
  constexpr int count = ROWS * OUTPUTS;
  Vec sum[count] = {};
  const int64_t runs = runs_of<FORMAT>(k), steps = steps_of(FORMAT, k);
  for (int64_t run = 0; run < runs; run++) {
#pragma GCC unroll 8
    for (int j = 0; j < OUTPUTS; j++) {
      // Rows are read again for every output: kept over outputs they would fill the registers.
      if (ROWS > FEW) asm volatile("" ::: "memory");
      const Run weights = KEPT ? kept[j * runs + run] : next_run<FORMAT>(w[j], run);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++)
        sum[m * OUTPUTS + j] = add_run<FORMAT>(sum[m * OUTPUTS + j], weights, x[m].runs[run]);
    }
  }
  const int64_t whole = whole_steps(FORMAT, k);
  for (int64_t step = 4 * runs; step < steps; step++) {
    const int left = (int)((k + GROUP - 1) / GROUP - step * GROUPS);
#pragma GCC unroll 8
    for (int j = 0; j < OUTPUTS; j++) {
      if (in_runs<FORMAT>) asm volatile("" ::: "memory");
      // What is left of a row after its runs is mostly one or two groups.
      constexpr int here = step_bytes(FORMAT), lines = in_runs<FORMAT> ? 64 : here;
      for (int line = 0; !KEPT && line < lines; line += 64)
        __builtin_prefetch(w[j] + step * here + AHEAD + line, 0, 3);
      const Weights weights = step < whole ? decode<FORMAT, true>(w[j], step, GROUPS)
                                           : decode<FORMAT, false>(w[j], step, left);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++)
        sum[m * OUTPUTS + j] =
            add_step<FORMAT>(sum[m * OUTPUTS + j], weights, x[m].steps[step - 4 * runs]);
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

template <int64_t FORMAT, bool KEPT, int ROWS, int OUTPUTS>
inline void block_place(const Row* x, const Part& part, int64_t column, int64_t apart,
                        const Run* kept, float* const* out) {
  const uint8_t* rows[OUTPUTS];
  for (int j = 0; j < OUTPUTS; j++) rows[j] = part.blocks.data + (column + j * apart) * part.bytes;
  float result[ROWS * OUTPUTS];
  block_tile<FORMAT, KEPT, ROWS, OUTPUTS>(x, rows, part.k, kept, result);
  for (int j = 0; j < OUTPUTS; j++) {
    const int64_t n = part.place(column + j * apart);
    const float bias = part.bias ? part.bias[n] : 0.0f;
    for (int m = 0; m < ROWS; m++) out[m][n] = result[m * OUTPUTS + j] + bias;
  }
}

template <int64_t FORMAT, bool KEPT, int OUTPUTS, int ROWS>
inline void block_rows(const Row* x, int64_t rows, const Part& part, int64_t column, int64_t apart,
                       const Run* kept, float* const* out) {
  if (rows == ROWS)
    block_place<FORMAT, KEPT, ROWS, OUTPUTS>(x, part, column, apart, kept, out);
  else if constexpr (ROWS > 1)
    block_rows<FORMAT, KEPT, OUTPUTS, ROWS - 1>(x, rows, part, column, apart, kept, out);
}

// Outputs column, column + apart, ... for all rows, in blocks of at most MOST of nearly equal size.
template <int64_t FORMAT, int OUTPUTS, int MOST>
inline void block_column(const Row* x, int64_t rows, const Part& part, int64_t column,
                         int64_t apart, float* const* out) {
  for (int64_t at = 0, left = (rows + MOST - 1) / MOST; at < rows; left--) {
    const int64_t now = (rows - at + left - 1) / left;
    block_rows<FORMAT, false, OUTPUTS, MOST>(x + at, now, part, column, apart, nullptr, out + at);
    at += now;
  }
}

template <int64_t FORMAT, int OUTPUTS, int MOST>
void block_columns(const Row* x, int64_t rows, const Part& part, float* const* out, int threads) {
  const int64_t apart = part.blocks.n / OUTPUTS;
  parallel(threads, apart, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column++)
      block_column<FORMAT, OUTPUTS, MOST>(x, rows, part, column, apart, out);
  });
  for (int64_t column = apart * OUTPUTS; column < part.blocks.n; column++)
    block_column<FORMAT, 1, MOST>(x, rows, part, column, 1, out);
}

// The same for many rows of a format in runs. Weights are decoded once for all of them, and a block of
// rows meets several columns before the next one, while it is in the first-level cache.
constexpr int64_t TOGETHER = 4;

template <int64_t FORMAT>
void many_rows(const Row* x, int64_t rows, const Part& part, float* const* out, int threads) {
  const int64_t apart = part.blocks.n / 2, runs = runs_of<FORMAT>(part.k);
  parallel(threads, (apart + TOGETHER - 1) / TOGETHER, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<Run> kept;
    if ((int64_t)kept.size() < TOGETHER * 2 * runs) kept.resize(TOGETHER * 2 * runs);
    for (int64_t group = begin; group < end; group++) {
      const int64_t first = group * TOGETHER;
      const int64_t columns = apart - first < TOGETHER ? apart - first : TOGETHER;
      for (int64_t j = 0; j < 2 * columns; j++) {
        const uint8_t* row = part.blocks.data + (first + j / 2 + j % 2 * apart) * part.bytes;
        for (int64_t run = 0; run < runs; run++)
          kept[j * runs + run] = next_run<FORMAT>(row, run);
      }
      int64_t at = 0;
      for (int64_t left = (rows + MANY - 1) / MANY; at < rows; left--) {
        const int64_t now = (rows - at + left - 1) / left;
        for (int64_t c = 0; c < columns; c++)
          block_rows<FORMAT, true, 2, MANY>(x + at, now, part, first + c, apart,
                                            kept.data() + 2 * c * runs, out + at);
        at += now;
      }
    }
  });
  for (int64_t column = apart * 2; column < part.blocks.n; column++)
    block_column<FORMAT, 1, MANY>(x, rows, part, column, 1, out);
}

// `rounded`: the rows were rounded for this format already, by the part before.
template <int64_t FORMAT>
void part_product(const float* const* x, int64_t rows, const Part& part, float* const* out,
                  int threads, bool rounded) {
  static thread_local std::vector<RunInputs> run_inputs;
  static thread_local std::vector<Inputs> step_inputs;
  static thread_local std::vector<Row> inputs;
  const int64_t runs = runs_of<FORMAT>(part.k), steps = steps_of(FORMAT, part.k) - 4 * runs;
  if (!rounded) {
    if ((int64_t)run_inputs.size() < rows * runs) run_inputs.resize(rows * runs);
    if ((int64_t)step_inputs.size() < rows * steps) step_inputs.resize(rows * steps);
    inputs.resize(rows);
    for (int64_t m = 0; m < rows; m++) {
      inputs[m] = {run_inputs.data() + m * runs, step_inputs.data() + m * steps};
      round_row<FORMAT>(x[m], part.k, run_inputs.data() + m * runs, step_inputs.data() + m * steps);
    }
  }
  if constexpr (!in_runs<FORMAT>)
    block_columns<FORMAT, 4, SOME>(inputs.data(), rows, part, out, threads);
  else if (rows <= FEW)
    block_columns<FORMAT, 4, FEW>(inputs.data(), rows, part, out, threads);
  else if (rows <= SOME)
    block_columns<FORMAT, 2, SOME>(inputs.data(), rows, part, out, threads);
  else if (rows <= MANY)
    block_columns<FORMAT, 2, MANY>(inputs.data(), rows, part, out, threads);
  else
    many_rows<FORMAT>(inputs.data(), rows, part, out, threads);
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
