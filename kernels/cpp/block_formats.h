// How each block format is decoded, a step of LANES / 4 groups of 32 weights at a time.
//
// A step's weights become two vectors of bytes: the first 16 weights of every group, and the other
// 16. Each group then fills four lanes of 32-bit sums, so several groups with scales of their own are
// multiplied, converted and added by one instruction each.
#pragma once

#include "blocks.h"

constexpr int GROUPS = LANES / 4, BYTES = 4 * LANES, STEP = 8 * LANES;

typedef uint8_t QVec __attribute__((vector_size(BYTES)));
typedef int8_t XVec __attribute__((vector_size(BYTES)));
typedef uint64_t WVec __attribute__((vector_size(BYTES)));

// Rounded activations of a step. `sum` is scale times the sum of a lane's four (eight, both vectors
// taken) numbers; `start` and `start_high` are those sums times minus the format's zero.
struct alignas(BYTES) Inputs {
  int8_t low[BYTES], high[BYTES];
  float scale[LANES], sum[LANES];
  int32_t start[LANES], start_high[LANES];
};

// Weights of a step: (q - zero) * scale + other; with Q6_K `other` is the scale of `high`.
struct Weights {
  QVec low, high;
  Vec scale, other;
};

template <int64_t FORMAT>
constexpr int zero_of = FORMAT == Q4_0 ? 8 : FORMAT == Q8_0 ? 128 : FORMAT == Q6_K ? 32 : 0;
template <int64_t FORMAT>
constexpr int most_of = FORMAT == Q8_0 ? 255 : FORMAT == Q6_K ? 63 : 15;
template <int64_t FORMAT>
constexpr bool has_minimum = FORMAT == Q4_1 || FORMAT == Q4_K;

constexpr bool super(int64_t format) { return format == Q4_K || format == Q6_K; }

static inline int64_t steps_of(int64_t format, int64_t k) {
  const int64_t groups = super(format) ? (k + 255) / 256 * 8 : (k + 31) / 32;
  return (groups + GROUPS - 1) / GROUPS;
}

// Bytes of a whole step.
constexpr int step_bytes(int64_t format) {
  const int group = format == Q4_0 ? 18 : format == Q4_1 ? 20 : format == Q8_0 ? 34 : 0;
  return group ? group * GROUPS : (format == Q4_K ? 144 : 210) * GROUPS / 8;
}

// Steps whose groups are all there.
static inline int64_t whole_steps(int64_t format, int64_t k) {
  return super(format) ? steps_of(format, k) : (k + 31) / 32 / GROUPS;
}

// start + the sums of each lane's four products. `MOST`: the largest q.
template <int MOST>
static inline IVec dot(IVec start, QVec q, XVec x) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return (IVec)_mm512_dpbusd_epi32((__m512i)start, (__m512i)q, (__m512i)x);
#elif defined(__AVX512BW__)
  const __m512i a = (__m512i)q, b = (__m512i)x, bytes = _mm512_set1_epi16(255);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a, bytes),
                                         _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
  return start + (IVec)even + (IVec)odd;
#elif defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512F__)
  return (IVec)_mm256_dpbusd_avx_epi32((__m256i)start, (__m256i)q, (__m256i)x);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i a = (__m256i)q, b = (__m256i)x;
  if constexpr (MOST < 128) {  // two products cannot overflow 16 bits
    const __m256i pairs = _mm256_maddubs_epi16(a, b);
    return start + (IVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  } else {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return start + (IVec)even + (IVec)odd;
  }
#else
  for (int i = 0; i < BYTES; i++) start[i / 4] += (int)q[i] * (int)x[i];
  return start;
#endif
}

// A group of activations rounded to whole numbers up to 127 times a scale, and their sum.
struct Rounded {
  float scale;
  int sum;
};

// Rounds numbers x[0..GROUP), those from `count` on taken as 0; the scale is NaN unless all are finite.
static inline Rounded round_group(const float* x, int64_t count, int8_t* to) {
  constexpr float most_finite = 3.4028234664e38f, least = 1e-30f;
  constexpr int vectors = GROUP / LANES;
  float rest[GROUP] = {};
  if (count < GROUP) {
    if (count > 0) std::memcpy(rest, x, count * sizeof(float));
    x = rest;
  }
  Vec most{};
  IVec finite = IVec{} - 1;
  for (int i = 0; i < vectors; i++) {
    const Vec v = load(x + i * LANES), size = v < 0.0f ? -v : v;
    most = size > most ? size : most;
    finite &= size <= splat(most_finite);
  }
  float largest = 0.0f;
  bool valid = true;
#if defined(__AVX512F__)
  largest = _mm512_reduce_max_ps((__m512)most);
  valid = _mm512_cmpneq_epi32_mask((__m512i)finite, _mm512_set1_epi32(-1)) == 0;
#else
  for (int i = 0; i < LANES; i++) {
    largest = most[i] > largest ? most[i] : largest;
    valid = valid && finite[i];
  }
#endif
  const bool some = valid && largest > least;
  const float inverse = some ? 127.0f / largest : 0.0f;
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  IVec sums{};
  for (int i = 0; i < vectors; i++) {
    const Vec v = some ? load(x + i * LANES) * splat(inverse) : Vec{};
    const IVec whole = __builtin_convertvector((v + shift) - shift, IVec);
    const BVec small = __builtin_convertvector(whole, BVec);
    std::memcpy(to + i * LANES, &small, sizeof small);
    sums += whole;
  }
  int sum = 0;
#if defined(__AVX512F__)
  sum = _mm512_reduce_add_epi32((__m512i)sums);
#else
  for (int i = 0; i < LANES; i++) sum += sums[i];
#endif
  return {valid ? (some ? largest / 127.0f : 0.0f) : std::nanf(""), sum};
}

static inline float from_half(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31;
  const uint32_t rest = half & 1023;
  if (exponent == 0) {
    const float small = (float)rest * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | rest << 13;
  return read<float>(&bits);
#endif
}

static inline uint16_t half_at(const uint8_t* p) { return read<uint16_t>(p); }

// 16 bytes of every group, at p + at(group); groups from `count` on become 0.
template <typename At>
static inline QVec pick(const uint8_t* p, int count, At at) {
#if defined(__AVX512F__)
  __m512i v = _mm512_zextsi128_si512(_mm_loadu_si128((const __m128i*)(p + at(0))));
  if (count > 1) v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + at(1))), 1);
  if (count > 2) v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + at(2))), 2);
  if (count > 3) v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + at(3))), 3);
  return (QVec)v;
#elif defined(__AVX2__)
  __m256i v = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)(p + at(0))));
  if (count > 1) v = _mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)(p + at(1))), 1);
  return (QVec)v;
#else
  QVec v{};
  for (int g = 0; g < count; g++) std::memcpy((char*)&v + 16 * g, p + at(g), 16);
  return v;
#endif
}

// A float16 of every group, at p + group * stride, in the group's four lanes.
static inline Vec halves(const uint8_t* p, int64_t stride, int count) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
  constexpr uint64_t four = 0x0001000100010001;
  const auto group = [&](int g) { return g < count ? (long long)(half_at(p + g * stride) * four) : 0LL; };
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_set_epi64x(group(3), group(2), group(1), group(0)));
#else
  return (Vec)_mm256_cvtph_ps(_mm_set_epi64x(group(1), group(0)));
#endif
#else
  Vec v{};
  for (int i = 0; i < 4 * count; i++) v[i] = from_half(half_at(p + i / 4 * stride));
  return v;
#endif
}

// Byte at(group) of p, signed if `SIGNED`, in the group's four lanes.
template <bool SIGNED, typename At>
static inline Vec bytes(const uint8_t* p, At at) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const __m128i read_bytes = _mm_loadl_epi64((const __m128i*)p);
#define FOUR(g) (char)at(g), (char)at(g), (char)at(g), (char)at(g)
#if defined(__AVX512F__)
  const __m128i spread = _mm_shuffle_epi8(read_bytes, _mm_setr_epi8(FOUR(0), FOUR(1), FOUR(2), FOUR(3)));
  return (Vec)_mm512_cvtepi32_ps(SIGNED ? _mm512_cvtepi8_epi32(spread) : _mm512_cvtepu8_epi32(spread));
#else
  const __m128i spread = _mm_shuffle_epi8(
      read_bytes, _mm_setr_epi8(FOUR(0), FOUR(1), -1, -1, -1, -1, -1, -1, -1, -1));
  return (Vec)_mm256_cvtepi32_ps(SIGNED ? _mm256_cvtepi8_epi32(spread) : _mm256_cvtepu8_epi32(spread));
#endif
#undef FOUR
#else
  Vec v{};
  for (int i = 0; i < LANES; i++) v[i] = SIGNED ? (float)(int8_t)p[at(i / 4)] : (float)p[at(i / 4)];
  return v;
#endif
}

// Each group's bytes shifted right by shift(group) bits; only bits that stay in their byte are used.
template <typename Shift>
static inline QVec shifted(QVec v, Shift shift) {
  WVec counts{};
  for (int i = 0; i < BYTES / 8; i++) counts[i] = shift(i / 2);
  return (QVec)((WVec)v >> counts);
}

static inline QVec nibbles(QVec v) { return v & (uint8_t)15; }

// Weights of one step of a row. `FULL`: all its groups are there, else the first `count`.
template <int64_t FORMAT, bool FULL>
static inline Weights decode(const uint8_t* row, int64_t step, int count) {
  Weights w;
  w.other = Vec{};
  if constexpr (FULL) count = GROUPS;
  if constexpr (FORMAT == Q4_0 || FORMAT == Q4_1) {
    constexpr int size = FORMAT == Q4_0 ? 18 : 20;
    const uint8_t* p = row + step * GROUPS * size;
    const QVec packed = pick(p + size - 16, count, [](int g) { return g * size; });
    w.scale = halves(p, size, count);
    if (FORMAT == Q4_1) w.other = halves(p + 2, size, count);
    w.low = nibbles(packed);
    w.high = nibbles(shifted(packed, [](int) { return 4; }));
  } else if constexpr (FORMAT == Q8_0) {
    const uint8_t* p = row + step * GROUPS * 34;
    const QVec sign = QVec{} + (uint8_t)128;
    w.low = pick(p + 2, count, [](int g) { return g * 34; }) ^ sign;
    w.high = pick(p + 18, count, [](int g) { return g * 34; }) ^ sign;
    w.scale = halves(p, 34, count);
  } else if constexpr (FORMAT == Q4_K) {
    const int64_t first = step * GROUPS % 8;  // of the groups of a block
    const uint8_t* p = row + step * GROUPS / 8 * 144;
    const uint8_t* q = p + 16 + first / 2 * 32;
    const int64_t odd = GROUPS > 1 ? 0 : first % 2, of = GROUPS > 2 ? 0 : first % 4;
    const auto shift = [odd](int g) { return (int)(odd + g) % 2 * 4; };
    w.low = nibbles(shifted(pick(q, GROUPS, [](int g) { return g / 2 * 32; }), shift));
    w.high = nibbles(shifted(pick(q + 16, GROUPS, [](int g) { return g / 2 * 32; }), shift));
    // Six bits each: 8 scales and 8 minima in 12 bytes.
    const uint32_t a = read<uint32_t>(p + 4), b = read<uint32_t>(p + 8), c = read<uint32_t>(p + 12);
    constexpr uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
    const uint32_t scales = first < 4 ? a & six : (c & four) | (a >> 6 & two) << 4;
    const uint32_t minima = first < 4 ? b & six : (c >> 4 & four) | (b >> 6 & two) << 4;
    const uint64_t all = scales | (uint64_t)minima << 32;
    const Vec d = splat(from_half(half_at(p))), least = splat(from_half(half_at(p + 2)));
    w.scale = d * bytes<false>((const uint8_t*)&all, [of](int g) { return of + g; });
    w.other = -(least * bytes<false>((const uint8_t*)&all, [of](int g) { return of + 4 + g; }));
  } else {
    const int64_t first = step * GROUPS % 8, half = first / 4;
    const int64_t of = GROUPS > 2 ? 0 : first % 4;
    const uint8_t* p = row + step * GROUPS / 8 * 210;
    const uint8_t *low = p + half * 64, *high = p + 128 + half * 32, *scales = p + 192 + half * 8;
    const auto place = [of](int g) { return (of + g) % 2 * 32; };
    const auto nibble = [of](int g) { return (int)(of + g) / 2 * 4; };
    const auto pair = [of](int g) { return (int)(of + g) * 2; };
    const auto whole = [&](int at) {
      const QVec four = nibbles(shifted(pick(low + at, GROUPS, place), nibble));
      const QVec two = shifted(pick(high + at, GROUPS, [](int) { return 0; }), pair);
      return four | ((two & (uint8_t)3) << 4);
    };
    w.low = whole(0);
    w.high = whole(16);
    const Vec d = splat(from_half(half_at(p + 208)));
    w.scale = d * bytes<true>(scales, [of](int g) { return 2 * (of + g); });
    w.other = d * bytes<true>(scales, [of](int g) { return 2 * (of + g) + 1; });
  }
  return w;
}
