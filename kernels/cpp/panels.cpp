// Products with matrices of bfloat16 or int8 in panels of 16 outputs: see blocks.h.
//
// A vector of a panel holds a pair of columns of its 16 outputs, so a product adds into one vector a
// panel and a row of activations, and nothing is summed across lanes. An output is the sum of its pairs
// in the order of k, whatever is beside it. int8 weights are widened, which bfloat16 and float32 hold
// exactly: with few rows as they are read, with many once for all rows.
#include <vector>

#include "blocks.h"

namespace {

constexpr int OUTPUTS = 16, VECTORS = OUTPUTS / LANES;

// Bytes ahead of where a panel is read, as in blocks.cpp.
constexpr int64_t AHEAD = 2048;

#if defined(__AVX512BF16__) && defined(__AVX512F__)
constexpr bool PAIRS = true;
typedef uint16_t Input;  // activations as they are multiplied: bfloat16
#else
constexpr bool PAIRS = false;
typedef float Input;  // the same numbers
#endif

#if (defined(__AVX512BF16__) && defined(__AVX512VBMI__)) || \
    (defined(__AVX2__) && !defined(__AVX512F__))
constexpr bool READS_INT8 = true;  // widened as it is read
#else
constexpr bool READS_INT8 = false;
#endif

// With AVX2 weights of int8 are taken times 2^24 (a shift less for each), their activations times
// 2^-24: products are the same.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int SHIFT = 24;
#else
constexpr int SHIFT = 0;
#endif

// Rows and panels of a tile: as many sums as there are registers for beside what is multiplied. A pass
// over a token and six drafts is one tile where a product takes pairs. With vectors of 8 one row takes
// 4 panels and three take 2: each sum waits for its last product, so there must be 8 of them at least.
constexpr int MOST_ROWS = LANES == 4 ? 2 : 6, PANELS = LANES == 4 ? 1 : 4;
template <bool INT8, int COUNT>
constexpr int TILE_ROWS = PAIRS && LANES == 16 && !INT8 ? 7
                          : LANES == 8 && COUNT == 4    ? 1
                          : LANES == 8 && COUNT == 2    ? 3
                                                        : MOST_ROWS;

// int8 is read anew for each tile up to so many rows (with AVX-512 12 rows: 0.7 of the time).
constexpr int64_t DIRECT_ROWS = LANES == 16 ? 3 * MOST_ROWS : MOST_ROWS;

// Pairs of columns: whole numbers of what is decoded at once.
int64_t pairs_of(int64_t format, int64_t k) {
  return format == INT8_PANELS ? (k + 3) / 4 * 2 : (k + 1) / 2;
}

int64_t panel_bytes(int64_t format, int64_t pairs) {
  return pairs * OUTPUTS * 2 * (format == INT8_PANELS ? 1 : 2);
}

// A float32 rounded to bfloat16, to even; NaN stays NaN.
inline uint16_t to_bfloat(float x) {
  const uint32_t bits = read<uint32_t>(&x);
  if (x != x) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Activations [k] rounded and times `factor`, a power of two that is 1 for bfloat16; zeros after them
// up to 2 * pairs.
void round_row(const float* x, int64_t k, int64_t pairs, float factor, Input* to) {
  int64_t i = 0;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  for (; i + 16 <= k; i += 16) {
    const __m256bh small = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    std::memcpy(to + i, &small, sizeof small);
  }
  if (i < k) {
    float rest[16] = {};
    std::memcpy(rest, x + i, (k - i) * sizeof(float));
    const __m256bh small = _mm512_cvtneps_pbh(_mm512_loadu_ps(rest));
    std::memcpy(to + i, &small, (k - i) * sizeof(uint16_t));
    i = k;
  }
#else
  for (; i + LANES <= k; i += LANES) {
    const Vec v = load(x + i);
    const UVec bits = (UVec)v, even = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    store(to + i, (v == v ? (Vec)even : v) * splat(factor));
  }
  for (; i < k; i++) to[i] = widen(to_bfloat(x[i])) * factor;
#endif
  for (; i < 2 * pairs; i++) to[i] = 0;
}

// int8 lies as a sign and a size, so that the size finds its bfloat16 in a table.
struct Sizes {
  alignas(64) uint8_t low[128], high[128];
  constexpr Sizes() : low(), high() {
    for (int size = 1; size < 128; size++) {
      int power = 0;
      while (size >> (power + 1)) power++;
      const int bits = (127 + power) << 7 | ((size << (7 - power)) & 127);
      low[size] = (uint8_t)bits;
      high[size] = (uint8_t)(bits >> 8);
    }
  }
};
constexpr Sizes SIZES{};

inline uint16_t bfloat_of(uint8_t small) {
  const float size = (float)(small & 127);
  return (uint16_t)(read<uint32_t>(&size) >> 16 | (small & 128) << 8);
}

// As it is multiplied: times 2^SHIFT.
inline uint16_t factor_of(uint8_t small) {
  return small & 127 ? (uint16_t)(bfloat_of(small) + (SHIFT << 7)) : (uint16_t)0;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Two pairs of 8 outputs of a panel, times 2^24: the columns of the first pair, then of the second.
inline void widen_eight(const uint8_t* p, Vec* to) {
  const __m256i small = read<__m256i>(p);
  const __m256i whole = _mm256_sign_epi8(_mm256_and_si256(small, _mm256_set1_epi8(127)), small);
#pragma GCC unroll 4
  for (int column = 0; column < 4; column++) {
    // The column's byte of an output becomes the highest one of its lane.
    const int first = column / 2 * 8 + column % 2;
    const __m256i places = _mm256_add_epi32(
        _mm256_setr_epi32(0x00808080, 0x02808080, 0x04808080, 0x06808080, 0x00808080, 0x02808080,
                          0x04808080, 0x06808080),
        _mm256_set1_epi32(first << 24));
    to[column] = (Vec)_mm256_cvtepi32_ps(_mm256_shuffle_epi8(whole, places));
  }
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
struct Table {
  __m512i low0, low1, high0, high1;
  Table()
      : low0(_mm512_load_si512(SIZES.low)), low1(_mm512_load_si512(SIZES.low + 64)),
        high0(_mm512_load_si512(SIZES.high)), high1(_mm512_load_si512(SIZES.high + 64)) {}
  // Two pairs of a panel.
  void widen(const uint8_t* p, __m512bh* to) const {
    const __m512i small = _mm512_loadu_si512(p);
    const __m512i low = _mm512_permutex2var_epi8(low0, small, low1);
    const __m512i size = _mm512_permutex2var_epi8(high0, small, high1);
    const __m512i high = _mm512_ternarylogic_epi32(size, small, _mm512_set1_epi8(-128), 0xf8);
    to[0] = (__m512bh)_mm512_unpacklo_epi8(low, high);
    to[1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
  }
};
#endif

// A panel of `width` outputs as bfloat16 of 16, the others 0.
void widen_panel(int64_t format, const uint8_t* panel, int64_t pairs, int64_t width, uint16_t* to) {
  if (width < OUTPUTS) {
    for (int64_t i = 0; i < pairs * OUTPUTS * 2; i++) {
      const int64_t output = i / 2 % OUTPUTS, at = (i / (2 * OUTPUTS) * width + output) * 2 + i % 2;
      to[i] = output >= width          ? (uint16_t)0
              : format == INT8_PANELS ? factor_of(panel[at])
                                      : read<uint16_t>(panel + 2 * at);
    }
    return;
  }
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  const Table table;
  for (int64_t i = 0; i < pairs; i += 2) table.widen(panel + 32 * i, (__m512bh*)(to + 32 * i));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  for (int64_t i = 0; i < pairs; i += 2)
    for (int v = 0; v < VECTORS; v++) {
      Vec wide[4];
      widen_eight(panel + 32 * i + 32 * v, wide);
      for (int half = 0; half < 2; half++) {
        const UVec both = (UVec)wide[2 * half] >> 16 | (UVec)wide[2 * half + 1];
        std::memcpy(to + 32 * (i + half) + 16 * v, &both, sizeof both);
      }
    }
#else
  for (int64_t i = 0; i < pairs; i += 2) {
    uint16_t wide[64];
    for (int j = 0; j < 64; j++) wide[j] = bfloat_of(panel[32 * i + j]);
    // 8 numbers of the first pair and 8 of the second one in turn.
    for (int j = 0; j < 8; j++)
      std::memcpy(to + 32 * i + j % 2 * 32 + j / 2 * 8, wide + 8 * j, 16);
  }
#endif
}

// What a pair of columns of one panel adds to the sums of ROWS rows.
template <int ROWS, int STRIDE>
inline void add_pair(Vec (*sum)[STRIDE][VECTORS], int j, const Input* const* x, int64_t pair,
                     const void* w) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  const __m512bh wide = (__m512bh)_mm512_loadu_si512(w);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    const __m512bh both = (__m512bh)_mm512_set1_epi32(read<int32_t>(x[r] + 2 * pair));
    sum[r][j][0] = (Vec)_mm512_dpbf16_ps((__m512)sum[r][j][0], both, wide);
  }
#else
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) {
    const UVec bits = read<UVec>((const uint32_t*)w + v * LANES);
    const Vec even = (Vec)(bits << 16), odd = (Vec)(bits & 0xffff0000u);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const Vec first = multiply_add(splat(x[r][2 * pair]), even, sum[r][j][v]);
      sum[r][j][v] = multiply_add(splat(x[r][2 * pair + 1]), odd, first);
    }
  }
#endif
}

// Sums of ROWS rows with COUNT panels -> out [ROWS][COUNT][16]. `INT8`: panels of int8, widened here.
template <int ROWS, int COUNT, bool INT8>
inline void panel_tile(const Input* const* x, const uint8_t* const* w, int64_t pairs, float* out) {
  Vec sum[ROWS][COUNT][VECTORS] = {};
  if constexpr (INT8) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    const Table table;
    for (int64_t i = 0; i < pairs; i += 2) {
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; j++) {
        // Past the end it is a hint and no access.
        __builtin_prefetch(w[j] + 32 * i + AHEAD, 0, 3);
        __m512bh wide[2];
        table.widen(w[j] + 32 * i, wide);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; r++) {
            const __m512bh both =
                (__m512bh)_mm512_set1_epi32(read<int32_t>(x[r] + 2 * (i + half)));
            sum[r][j][0] = (Vec)_mm512_dpbf16_ps((__m512)sum[r][j][0], both, wide[half]);
          }
      }
    }
#elif defined(__AVX2__) && !defined(__AVX512F__)
    for (int64_t i = 0; i < pairs; i += 2) {
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; j++) {
        __builtin_prefetch(w[j] + 32 * i + AHEAD, 0, 3);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
          Vec wide[4];
          widen_eight(w[j] + 32 * i + 32 * v, wide);
#pragma GCC unroll 4
          for (int column = 0; column < 4; column++)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
              sum[r][j][v] =
                  multiply_add(splat(x[r][2 * i + column]), wide[column], sum[r][j][v]);
        }
      }
    }
#endif
  } else {
    for (int64_t i = 0; i < pairs; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; j++) {
        __builtin_prefetch(w[j] + 64 * i + AHEAD, 0, 3);
        add_pair<ROWS, COUNT>(sum, j, x, i, w[j] + 64 * i);
      }
    }
  }
  std::memcpy(out, sum, sizeof sum);
}

// One part of a matrix; `first` is its first output, `scale` that of each of its rows or null.
struct Part {
  const uint8_t *data, *scale;
  int64_t n, format, pairs, first;
  const float* bias;

  const uint8_t* panel(int64_t at) const { return data + at * panel_bytes(format, pairs); }
};

// Outputs of COUNT panels, the first of each in `outputs`, of which `width` are there.
template <int ROWS, int COUNT, bool INT8>
inline void place(const Input* const* x, const uint8_t* const* w, const Part& part,
                  const int64_t* outputs, int64_t width, float* const* out) {
  float result[ROWS][COUNT][OUTPUTS];
  panel_tile<ROWS, COUNT, INT8>(x, w, part.pairs, &result[0][0][0]);
  for (int j = 0; j < COUNT; j++) {
    float scale[OUTPUTS] = {}, bias[OUTPUTS] = {};
    if (part.scale) std::memcpy(scale, part.scale + 4 * outputs[j], width * sizeof(float));
    const int64_t to = part.first + outputs[j];
    if (part.bias) std::memcpy(bias, part.bias + to, width * sizeof(float));
    for (int r = 0; r < ROWS; r++) {
      float* values = result[r][j];
      for (int i = 0; i < OUTPUTS; i += LANES)
        store(values + i, part.scale ? multiply_add(load(values + i), load(scale + i), load(bias + i))
                                     : load(values + i) + load(bias + i));
      std::memcpy(out[r] + to, values, width * sizeof(float));
    }
  }
}

template <int COUNT, bool INT8, int ROWS = TILE_ROWS<INT8, COUNT>>
inline void some_rows(int64_t rows, const Input* const* x, const uint8_t* const* w,
                      const Part& part, const int64_t* outputs, int64_t width, float* const* out) {
  if (rows == ROWS)
    place<ROWS, COUNT, INT8>(x, w, part, outputs, width, out);
  else if constexpr (ROWS > 1)
    some_rows<COUNT, INT8, ROWS - 1>(rows, x, w, part, outputs, width, out);
}

// All rows, in blocks of nearly equal size.
template <int COUNT, bool INT8>
void all_rows(int64_t rows, const Input* const* x, const uint8_t* const* w, const Part& part,
              const int64_t* outputs, int64_t width, float* const* out) {
  constexpr int most = TILE_ROWS<INT8, COUNT>;
  for (int64_t left = (rows + most - 1) / most; left > 0; left--) {
    const int64_t now = (rows + left - 1) / left;
    some_rows<COUNT, INT8>(now, x, w, part, outputs, width, out);
    x += now, out += now, rows -= now;
  }
}

// COUNT panels from `first` on, `apart` panels apart; the last one of a matrix may be narrow.
template <int COUNT>
void panels(int64_t rows, const Input* const* x, const Part& part, int64_t first, int64_t apart,
            float* const* out) {
  static thread_local std::vector<uint16_t> wide;
  const uint8_t* w[COUNT];
  int64_t outputs[COUNT];
  for (int j = 0; j < COUNT; j++) {
    outputs[j] = (first + j * apart) * OUTPUTS;
    w[j] = part.panel(first + j * apart);
  }
  const int64_t left = part.n - outputs[0], width = left < OUTPUTS ? left : OUTPUTS;
  const bool small = part.format == INT8_PANELS;
  if constexpr (READS_INT8)
    if (small && rows <= DIRECT_ROWS && width == OUTPUTS)
      return all_rows<COUNT, true>(rows, x, w, part, outputs, width, out);
  if (small || width < OUTPUTS) {
    const int64_t size = part.pairs * OUTPUTS * 2;
    if ((int64_t)wide.size() < COUNT * size + 32) wide.resize(COUNT * size + 32);
    // Vectors are written to and read from whole lines.
    uint16_t* at = (uint16_t*)(((uintptr_t)wide.data() + 63) / 64 * 64);
    for (int j = 0; j < COUNT; j++, at += size) {
      widen_panel(part.format, w[j], part.pairs, width, at);
      w[j] = (const uint8_t*)at;
    }
  }
  all_rows<COUNT, false>(rows, x, w, part, outputs, width, out);
}

// All panels of a part, COUNT at a time: far apart with `few` rows, each a stream of its own; with many
// they follow one another.
template <int COUNT>
void all_panels(int64_t rows, const Input* const* x, const Part& part, bool few, float* const* out,
                int threads) {
  const int64_t groups = part.n / OUTPUTS / COUNT, every = (part.n + OUTPUTS - 1) / OUTPUTS;
  parallel(threads, groups, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      panels<COUNT>(rows, x, part, few ? group : group * COUNT, few ? groups : 1, out);
  });
  for (int64_t rest = groups * COUNT; rest < every; rest++) panels<1>(rows, x, part, rest, 1, out);
}

}  // namespace

void panel_product(const float* const* x, int64_t rows, const BlockPart& blocks, int64_t k,
                   int64_t first, const float* bias, float* const* out, int threads,
                   bool rounded) {
  static thread_local std::vector<Input> inputs;
  static thread_local std::vector<const Input*> starts;
  const int64_t pairs = pairs_of(blocks.format, k);
  const bool small = blocks.format == INT8_PANELS;
  if (!rounded) {
    const float factor = small ? 1.0f / (1 << SHIFT) : 1.0f;
    if ((int64_t)inputs.size() < rows * 2 * pairs) inputs.resize(rows * 2 * pairs);
    starts.resize(rows);
    for (int64_t m = 0; m < rows; m++) {
      Input* row = inputs.data() + m * 2 * pairs;
      round_row(x[m], k, pairs, factor, row);
      starts[m] = row;
    }
  }
  const uint8_t* scale = small ? blocks.data + blocks.n * 2 * pairs : nullptr;
  const Part part{blocks.data, scale, blocks.n, blocks.format, pairs, first, bias};
  const Input* const* from = starts.data();
  const bool few = rows <= (small || LANES == 8 ? MOST_ROWS : TILE_ROWS<false, PANELS>);
  if constexpr (LANES == 8) {
    if (rows > 3) return all_panels<1>(rows, from, part, few, out, threads);
    if (rows > 1) return all_panels<2>(rows, from, part, few, out, threads);
  }
  all_panels<PANELS>(rows, from, part, few, out, threads);
}

void widen_panel_row(const BlockPart& part, int64_t k, int64_t row, float* out) {
  const int64_t pairs = pairs_of(part.format, k), first = row / OUTPUTS * OUTPUTS;
  const int64_t width = part.n - first < OUTPUTS ? part.n - first : OUTPUTS, at = row - first;
  const uint8_t* panel = part.data + row / OUTPUTS * panel_bytes(part.format, pairs);
  const bool small = part.format == INT8_PANELS;
  const float scale = small ? read<float>(part.data + part.n * 2 * pairs + 4 * row) : 1.0f;
  for (int64_t i = 0; i < k; i++) {
    const int64_t pair = i / 2;
    int64_t place = (pair * width + at) * 2 + i % 2;
    if (small && width == OUTPUTS)  // 4 outputs of the first pair and 4 of the second one in turn
      place = pair / 2 * 64 + at / 4 * 16 + pair % 2 * 8 + at % 4 * 2 + i % 2;
    out[i] = small ? widen(bfloat_of(panel[place])) * scale
                   : widen(read<uint16_t>(panel + 2 * place));
  }
}
