// Products with Q4_0, Q4_1 and Q8_0 in panels of 16 outputs: see blocks.h.
//
// A lane is an output, so sums stay in lanes, and four activations are the same for all of them. A
// group of 32 columns of a panel takes 8 whole-number products for each row of activations, and then
// one conversion, the scales and the minima. Its order is that of k, whatever is beside it.
#include <vector>

#include "block_formats.h"

namespace {

constexpr int OUTPUTS = 16, VECTORS = OUTPUTS / LANES, QUADS = 8;

// Rows and panels of a tile: as many sums as there are registers for beside the weights of a group.
// More rows come by four, which leaves all weights of a group in registers.
constexpr int FEW_ROWS = LANES == 16 ? 6 : 2, MANY_ROWS = LANES == 16 ? 4 : 2;
constexpr int PANELS = LANES == 16 ? 4 : 1;

// Bytes ahead of where a panel is read, as in blocks.cpp.
constexpr int64_t AHEAD = 3072;

// One row of activations: whole numbers, and of each group its scale, scale times sum, and the sum
// times minus the format's zero.
struct Row {
  const int8_t* q;
  const float *scale, *sum;
  const int32_t* start;
};

// Bytes of a group of a row: its whole numbers, then its scale (and its minimum, of Q4_1).
constexpr int64_t whole_bytes(int64_t format) { return format == Q8_0_PANELS ? 32 : 16; }
constexpr int64_t group_bytes(int64_t format) {
  return format == Q8_0_PANELS ? 34 : format == Q4_1_PANELS ? 20 : 18;
}
// What is taken from each whole number.
constexpr int zero(int64_t format) {
  return format == Q8_0_PANELS ? 128 : format == Q4_1_PANELS ? 0 : 8;
}

// LANES float16 as float32.
inline Vec halves_at(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(read<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(read<__m128i>(p));
#else
  Vec v{};
  for (int i = 0; i < LANES; i++) v[i] = from_half(half_at(p + 2 * i));
  return v;
#endif
}

// What a group of one panel, at `whole`, adds to the sums of ROWS rows.
template <int64_t FORMAT, int ROWS, int STRIDE>
inline void add_group(Vec (*sum)[STRIDE][VECTORS], int j, const Row* x, int64_t group,
                      const uint8_t* whole) {
  constexpr bool eight = FORMAT == Q8_0_PANELS, minimum = FORMAT == Q4_1_PANELS;
  constexpr int most = eight ? 255 : 15;
  const uint8_t* scales = whole + OUTPUTS * whole_bytes(FORMAT);
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) {
    QVec q[QUADS];
#pragma GCC unroll 8
    for (int i = 0; i < QUADS / 2; i++) {
      const QVec packed = read<QVec>(whole + i * OUTPUTS * 4 + v * BYTES);
      q[i] = eight ? packed : nibbles(packed);
      q[4 + i] = eight ? read<QVec>(whole + (4 + i) * OUTPUTS * 4 + v * BYTES)
                       : nibbles((QVec)((UVec)packed >> 4));
    }
    const Vec scale = halves_at(scales + v * 2 * LANES);
    const Vec least = minimum ? halves_at(scales + 2 * (OUTPUTS + v * LANES)) : Vec{};
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      IVec products = zero(FORMAT) ? IVec{} + x[r].start[group] : IVec{};
#pragma GCC unroll 8
      for (int i = 0; i < QUADS; i++) {
        const IVec four = IVec{} + read<int32_t>(x[r].q + group * GROUP + 4 * i);
        products = dot<most>(products, q[i], (XVec)four);
      }
      Vec& to = sum[r][j][v];
      to = multiply_add(__builtin_convertvector(products, Vec), scale * splat(x[r].scale[group]), to);
      if (minimum) to = multiply_add(least, splat(x[r].sum[group]), to);
    }
  }
}

// A matrix; `first` is its first output.
struct Part {
  const uint8_t* data;
  int64_t n, k, groups, first;
  const float* bias;
};

// Outputs of COUNT panels, the first of each in `outputs`, of which `width` are there.
template <int64_t FORMAT, int ROWS, int COUNT>
inline void place(const Row* x, const uint8_t* const* w, const Part& part, const int64_t* outputs,
                  int64_t width, float* const* out) {
  constexpr int64_t here = OUTPUTS * group_bytes(FORMAT);
  Vec sum[ROWS][COUNT][VECTORS] = {};
  for (int64_t group = 0; group < part.groups; group++) {
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; j++) {
      const uint8_t* at = w[j] + group * here;
      // Past the end it is a hint and no access.
      for (int line = 0; line < here; line += 64) __builtin_prefetch(at + AHEAD + line, 0, 3);
      add_group<FORMAT, ROWS, COUNT>(sum, j, x, group, at);
    }
  }
  for (int j = 0; j < COUNT; j++) {
    const int64_t to = part.first + outputs[j];
    float bias[OUTPUTS] = {};
    if (part.bias) std::memcpy(bias, part.bias + to, width * sizeof(float));
    for (int r = 0; r < ROWS; r++) {
      float values[OUTPUTS];
      for (int v = 0; v < VECTORS; v++) store(values + v * LANES, sum[r][j][v] + load(bias + v * LANES));
      std::memcpy(out[r] + to, values, width * sizeof(float));
    }
  }
}

template <int64_t FORMAT, int COUNT, int ROWS = FEW_ROWS>
inline void some_rows(int64_t rows, const Row* x, const uint8_t* const* w, const Part& part,
                      const int64_t* outputs, int64_t width, float* const* out) {
  if (rows == ROWS)
    place<FORMAT, ROWS, COUNT>(x, w, part, outputs, width, out);
  else if constexpr (ROWS > 1)
    some_rows<FORMAT, COUNT, ROWS - 1>(rows, x, w, part, outputs, width, out);
}

// A panel of `width` outputs as one of 16, the others 0.
void widen_panel(int64_t format, const uint8_t* panel, int64_t groups, int64_t width, uint8_t* to) {
  const auto spread = [&](int64_t bytes, int64_t times) {
    for (; times > 0; times--, panel += width * bytes, to += OUTPUTS * bytes) {
      std::memcpy(to, panel, width * bytes);
      std::memset(to + width * bytes, 0, (OUTPUTS - width) * bytes);
    }
  };
  for (int64_t group = 0; group < groups; group++) {
    spread(4, whole_bytes(format) / 4);
    spread(2, (group_bytes(format) - whole_bytes(format)) / 2);
  }
}

// COUNT panels from `first` on, `apart` panels apart; the last one of a matrix may be narrow.
template <int64_t FORMAT, int COUNT>
void panels(int64_t rows, const Row* x, const Part& part, int64_t first, int64_t apart,
            float* const* out) {
  static thread_local std::vector<uint8_t> wide;
  const int64_t size = part.groups * group_bytes(FORMAT) * OUTPUTS;
  const uint8_t* w[COUNT];
  int64_t outputs[COUNT];
  for (int j = 0; j < COUNT; j++) {
    outputs[j] = (first + j * apart) * OUTPUTS;
    w[j] = part.data + (first + j * apart) * size;
  }
  const int64_t left = part.n - outputs[0], width = left < OUTPUTS ? left : OUTPUTS;
  if (width < OUTPUTS) {
    if ((int64_t)wide.size() < size) wide.resize(size);
    widen_panel(FORMAT, w[0], part.groups, width, wide.data());
    w[0] = wide.data();
  }
  const int most = rows <= FEW_ROWS ? FEW_ROWS : MANY_ROWS;
  for (int64_t blocks = (rows + most - 1) / most; blocks > 0; blocks--) {
    const int64_t now = (rows + blocks - 1) / blocks;
    some_rows<FORMAT, COUNT>(now, x, w, part, outputs, width, out);
    x += now, out += now, rows -= now;
  }
}

// Items of one part: groups of COUNT panels, and each panel that is left.
template <int COUNT>
int64_t items_of(const Part& part) {
  return part.n / OUTPUTS / COUNT + part.n / OUTPUTS % COUNT + (part.n % OUTPUTS > 0);
}

// All parts in one loop: starting and ending one takes as long as a few panels.
template <int64_t FORMAT, int COUNT>
void multiply_by(int64_t rows, const Row* x, const std::vector<Part>& parts, float* const* out,
                 int threads) {
  // With few rows the panels are far apart, each a stream of its own; with many they follow one
  // another.
  const bool few = rows <= 2 * MANY_ROWS;
  int64_t all = 0;
  for (const Part& part : parts) all += items_of<COUNT>(part);
  parallel(threads, all, [&](int64_t begin, int64_t end) {
    for (const Part& part : parts) {
      const int64_t items = items_of<COUNT>(part), groups = part.n / OUTPUTS / COUNT;
      for (int64_t item = begin < 0 ? 0 : begin; item < end && item < items; item++)
        if (item < groups)
          panels<FORMAT, COUNT>(rows, x, part, few ? item : item * COUNT, few ? groups : 1, out);
        else
          panels<FORMAT, 1>(rows, x, part, groups * COUNT + item - groups, 1, out);
      begin -= items, end -= items;
    }
  });
}

template <int64_t FORMAT>
void multiply(int64_t rows, const Row* x, const std::vector<Part>& parts, float* const* out,
              int threads) {
  int64_t outputs = 0;
  for (const Part& part : parts) outputs += part.n;
  // Of a small matrix threads get equal shares only in small items, which cost few rows nothing.
  if (threads > 1 && rows <= 2 * MANY_ROWS && outputs < 16 * PANELS * OUTPUTS * threads)
    return multiply_by<FORMAT, (PANELS + 1) / 2>(rows, x, parts, out, threads);
  multiply_by<FORMAT, PANELS>(rows, x, parts, out, threads);
}

}  // namespace

void block_panel_product(const float* const* x, int64_t rows, const BlockPart* blocks,
                         int64_t count, int64_t k, int64_t first, const float* bias,
                         float* const* out, int threads, bool rounded) {
  static thread_local std::vector<int8_t> whole;
  static thread_local std::vector<float> scales;
  static thread_local std::vector<int32_t> starts;
  static thread_local std::vector<Row> inputs;
  static thread_local std::vector<Part> own;
  std::vector<Part>& parts = own;  // the caller's, whichever thread reads it
  const int64_t groups = (k + GROUP - 1) / GROUP;
  if (!rounded) {
    if ((int64_t)whole.size() < rows * groups * GROUP) whole.resize(rows * groups * GROUP);
    if ((int64_t)scales.size() < rows * groups * 2) scales.resize(rows * groups * 2);
    if ((int64_t)starts.size() < rows * groups) starts.resize(rows * groups);
    inputs.resize(rows);
    for (int64_t m = 0; m < rows; m++) {
      int8_t* q = whole.data() + m * groups * GROUP;
      float *scale = scales.data() + m * groups * 2, *sum = scale + groups;
      int32_t* start = starts.data() + m * groups;
      for (int64_t group = 0; group < groups; group++) {
        const Rounded made = round_group(x[m] + group * GROUP, k - group * GROUP, q + group * GROUP);
        scale[group] = made.scale;
        sum[group] = made.scale * (float)made.sum;
        start[group] = -zero(blocks->format) * made.sum;
      }
      inputs[m] = {q, scale, sum, start};
    }
  }
  parts.clear();
  for (int64_t i = 0; i < count; first += blocks[i++].n)
    parts.push_back({blocks[i].data, blocks[i].n, k, groups, first, bias});
  switch (blocks->format) {
    case Q4_0_PANELS: return multiply<Q4_0_PANELS>(rows, inputs.data(), parts, out, threads);
    case Q4_1_PANELS: return multiply<Q4_1_PANELS>(rows, inputs.data(), parts, out, threads);
    default: return multiply<Q8_0_PANELS>(rows, inputs.data(), parts, out, threads);
  }
}

void widen_block_panel_row(const BlockPart& part, int64_t k, int64_t row, float* out) {
  const int64_t groups = (k + GROUP - 1) / GROUP, first = row / OUTPUTS * OUTPUTS, at = row - first;
  const int64_t width = part.n - first < OUTPUTS ? part.n - first : OUTPUTS;
  const uint8_t* panel = part.data + first * groups * group_bytes(part.format);
  for (int64_t i = 0; i < k; i++) {
    const int64_t group = i / GROUP, quad = i % GROUP / 4, lane = at * 4 + i % 4;
    const uint8_t* whole = panel + group * width * group_bytes(part.format);
    const uint8_t* scale = whole + width * whole_bytes(part.format);
    const int byte = whole[quad * 4 % whole_bytes(part.format) * width + lane];
    const int q = part.format == Q8_0_PANELS ? byte : quad < 4 ? byte & 15 : byte >> 4;
    const float value = from_half(half_at(scale + 2 * at)) * (float)(q - zero(part.format));
    out[i] = part.format == Q4_1_PANELS ? value + from_half(half_at(scale + 2 * (width + at))) : value;
  }
}
