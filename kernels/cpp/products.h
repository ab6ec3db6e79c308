// Products of a few rows with a weight, as decoding needs them: out[m][n] = sum_k x[m][k] w[n][k].
//
// One row reads every weight once and is bound by memory; a library's product of 2 to 16 rows packs
// its operands first, which costs more than the product. Here a tile of rows and outputs is kept in
// registers, and weights are read in the order in which torch holds them, once for all rows.
//
// The sum of one output is taken in the same order, by the same instructions, whatever rows and
// outputs are beside it and however many there are, so a token's result depends on nothing else in
// its pass. Here weights are float32; those of bfloat16 and int8 lie in panels (panels.cpp), blocks of
// quantised ones (blocks.h) take activations that are rounded to 8 bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "threads.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCUMULATORS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 8;
#else
constexpr int LANES = 4, ACCUMULATORS = 8;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t UVec __attribute__((vector_size(LANES * 4)));
typedef int8_t BVec __attribute__((vector_size(LANES)));

// INT8 of keys and values alone: weights of bfloat16 and int8 are BLOCKS, in panels.
enum Storage : int64_t { FLOAT32 = 0, INT8 = 2, BLOCKS = 3 };

// A weight [n, k] of float32, row after row; `bias` [n] or null. With BLOCKS `data` is an array of parts,
// see blocks.h.
struct Matrix {
  const void* data;
  const float* bias;
  int64_t n, k;
  int64_t storage;
};

template <typename V, typename T>
static inline V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline Vec load(const float* p) { return read<Vec>(p); }

static inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(read<BVec>(p), IVec), Vec);
#endif
}

static inline float widen(float w) { return w; }
static inline float widen(int8_t w) { return w; }
static inline float widen(uint16_t w) {
  const uint32_t bits = (uint32_t)w << 16;
  return read<float>(&bits);
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline Vec splat(float x) { return Vec{} + x; }

// a * b + c with one rounding where the processor has that: named, so that no compiler decides it
// anew for another number of rows.
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// Two vectors become one of half sums: of each run of 2 * HALF lanes, the lower and the upper half
// are added; the runs of `a` come first.
template <int HALF, int... I>
static inline Vec fold(Vec a, Vec b, std::integer_sequence<int, I...>) {
  constexpr int runs = LANES / (2 * HALF);
#define LOWER(i) ((i / HALF < runs ? 0 : LANES) + (i / HALF % runs) * 2 * HALF + i % HALF)
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LOWER(I)...) +
         __builtin_shufflevector(a, b, (LOWER(I) + HALF)...);
#else
  return __builtin_shuffle(a, b, (IVec){LOWER(I)...}) +
         __builtin_shuffle(a, b, (IVec){(LOWER(I) + HALF)...});
#endif
#undef LOWER
}

// Sums of COUNT <= LANES vectors, one a lane; lanes from COUNT on are unused.
template <int COUNT, int HALF = LANES / 2>
static inline Vec sums(const Vec* v) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    constexpr int half = (COUNT + 1) / 2;
    Vec folded[half];
#pragma GCC unroll 16
    for (int i = 0; i < half; i++)
      folded[i] = fold<HALF>(v[2 * i], 2 * i + 1 < COUNT ? v[2 * i + 1] : Vec{},
                             std::make_integer_sequence<int, LANES>{});
    return sums<half, HALF / 2>(folded);
  }
}

// Products of ROWS rows x with OUTPUTS rows of a weight.
template <int ROWS, int OUTPUTS, typename W>
static inline void tile(const float* const* x, const W* const* w, int64_t k, float* out) {
  constexpr int count = ROWS * OUTPUTS;
  Vec acc[count] = {};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    Vec wide[OUTPUTS];
#pragma GCC unroll 16
    for (int j = 0; j < OUTPUTS; j++) {
      wide[j] = load(w[j] + i);
      // The next tile's row: with several rows of x the processor is busy here for longer than it
      // looks ahead (13 rows: 0.74 of the time without). Past the end it is a hint and no access.
      if (ROWS >= 3) __builtin_prefetch(w[j] + i + k, 0, 3);
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
      const Vec row = load(x[m] + i);
#pragma GCC unroll 16
      for (int j = 0; j < OUTPUTS; j++) {
        Vec& sum = acc[m * OUTPUTS + j];
        sum = multiply_add(row, wide[j], sum);
      }
    }
  }
  constexpr int step = count < LANES ? count : LANES;
#pragma GCC unroll 4
  for (int at = 0; at < count; at += step) {
    float parts[LANES];
    store(parts, sums<step>(acc + at));
    std::memcpy(out + at, parts, step * sizeof(float));
  }
  for (int m = 0; i < k && m < ROWS; m++)
    for (int j = 0; j < OUTPUTS; j++)
      for (int64_t r = i; r < k; r++)  // one rounding, as in the lanes
        out[m * OUTPUTS + j] = std::fma(x[m][r], widen(w[j][r]), out[m * OUTPUTS + j]);
}

// `rows`: of the weight, those of outputs column, column + apart, ...
template <int ROWS, int OUTPUTS, typename W>
static inline void place(const float* const* x, const W* const* rows, const Matrix& w,
                         int64_t column, int64_t apart, float* const* out) {
  float result[ROWS * OUTPUTS];
  tile<ROWS, OUTPUTS, W>(x, rows, w.k, result);
  for (int j = 0; j < OUTPUTS; j++) {
    const int64_t n = column + j * apart;
    const float bias = w.bias ? w.bias[n] : 0.0f;
    for (int m = 0; m < ROWS; m++) out[m][n] = result[m * OUTPUTS + j] + bias;
  }
}

// Rows of x taken at once: as many as there are registers for.
template <int OUTPUTS>
constexpr int most_rows = ACCUMULATORS / OUTPUTS > 4 ? 4 : ACCUMULATORS / OUTPUTS;

// One column of tiles for `rows` rows of x, in blocks of nearly equal size.
template <int OUTPUTS, typename W>
static inline void blocks_of_tiles(const float* const* x, int64_t rows, const W* const* of,
                                   const Matrix& w, int64_t column, int64_t apart,
                                   float* const* out) {
  constexpr int most = most_rows<OUTPUTS>;
  int64_t blocks = (rows + most - 1) / most;
  while (rows > 0) {
    const int64_t now = (rows + blocks - 1) / blocks;
    if constexpr (most >= 4) {
      if (now == 4) place<4, OUTPUTS, W>(x, of, w, column, apart, out);
      if (now == 3) place<3, OUTPUTS, W>(x, of, w, column, apart, out);
    }
    if constexpr (most >= 2)
      if (now == 2) place<2, OUTPUTS, W>(x, of, w, column, apart, out);
    if (now == 1) place<1, OUTPUTS, W>(x, of, w, column, apart, out);
    x += now, out += now, rows -= now, blocks -= 1;
  }
}

template <int OUTPUTS>
static inline void column_of_tiles(const float* const* x, int64_t rows, const Matrix& w,
                                   int64_t column, int64_t apart, float* const* out) {
  const float* of[OUTPUTS];
  for (int j = 0; j < OUTPUTS; j++) of[j] = (const float*)w.data + (column + j * apart) * w.k;
  blocks_of_tiles<OUTPUTS, float>(x, rows, of, w, column, apart, out);
}

// Outputs are taken OUTPUTS at a time, far apart: as many streams read the weight at once, which
// fills the memory's bandwidth better than one does.
template <int OUTPUTS>
static void product_of(const float* const* x, int64_t rows, const Matrix& w, float* const* out,
                       int threads) {
  const int64_t apart = w.n / OUTPUTS;
  parallel(threads, apart, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column++)
      column_of_tiles<OUTPUTS>(x, rows, w, column, apart, out);
  });
  for (int64_t column = apart * OUTPUTS; column < w.n; column++)
    column_of_tiles<1>(x, rows, w, column, 1, out);
}

// Inputs of one product, rows times width: as long as they stay in the second-level cache this is as
// fast as a library's product, beyond it is not. More rows are taken one such block after another.
constexpr int64_t MOST_INPUTS = 1 << 17, FEW_ROWS = 32;

static inline int64_t rows_at_once(int64_t width) {
  return MOST_INPUTS / width > FEW_ROWS ? MOST_INPUTS / width : FEW_ROWS;
}

// As `product`, of a matrix in blocks: blocks.cpp.
void block_product(const float* const* x, int64_t rows, const Matrix& w, float* const* out,
                   int threads);

// Rows x[m] [k] times the transpose of a weight, with its bias -> rows out[m] [n].
static void product(const float* const* x, int64_t rows, const Matrix& w, float* const* out,
                    int threads) {
  const int64_t most = rows_at_once(w.k);
  for (; rows > 0; x += most, out += most, rows -= most) {
    const int64_t now = rows < most ? rows : most;
    if (w.storage == BLOCKS)
      block_product(x, now, w, out, threads);
    else if (now * 8 <= ACCUMULATORS)
      product_of<8>(x, now, w, out, threads);
    else
      product_of<4>(x, now, w, out, threads);
  }
}
