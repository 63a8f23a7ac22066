// One decode step on the CPU: one new token for each of M sequences, through the whole decoder.
//
// Start at `decode_step`: one parallel region; in it every thread runs `Worker::run`, layer after layer.
// A thread multiplies its share of a matrix's rows by all M inputs; barriers part the phases. What is small
// (norms, residual sums, rounding of inputs) every thread does for itself, which is cheaper than a barrier.
//
// Rounds to bf16 wherever the torch reference does (reference.py, linear.py). The sums of a row have one
// order, whatever M and the number of threads are, so a row's logits do not depend on the batch.
//
// M: rows. T: threads. D: head size. Vectors are GCC's own, which any machine has; only dot products have
// instructions of their own (AVX-512 BF16, VNNI, AVX2). cpu_decode.py mirrors the structs below.
#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef uint16_t bf16;
enum Format : int32_t { BF16, INT8, INT4, E4M3, E5M2, FORMATS };
// What inputs of E4M3 weights are rounded to: not at all; E4M3 with a scale for each token, or one for all
enum Rounding : int32_t { NONE, TOKEN, STATIC };

struct Linear {
  const void *weight;     // [out, in]: bf16 | int8 | int4 in pairs, the even column in the low half | 8-bit floats
  const void *scale;      // int8 and 8-bit floats: float [out]; int4: bf16 [out, in / group]
  const bf16 *zero;       // int4: (zero point + 8) / 8 as scale, or null: 1 everywhere
  const int32_t *sums;    // int8: of each row's codes [out]
  const bf16 *bias;       // [out] or null
  int32_t out, in, format, group;
  int32_t rounding;       // of a layer of E4M3: its inputs'
  float input_scale;      // STATIC: theirs
};

// Weights of norms are bf16 or, where they multiply before the rounding, float32; null: no norm
struct Layer {
  const void *input_norm, *attention_out_norm, *post_norm, *mlp_out_norm;  // [hidden]
  const void *q_norm, *k_norm;  // [D], or [heads · D] and [kv_heads · D]: over all heads together
  Linear q, k, v, out, gate, up, down;
  Linear router;          // [experts, hidden]
  const Linear *experts;  // gate, up and down of each, in place of those above; null: one MLP
  bf16 *keys, *values;    // [slots, kv_heads, D]
  const void *cos, *sin;  // [positions, R]: of the first R channels of a head, which turn; bf16 or float32
  int32_t window;         // positions that a token sees, itself included; 0: all
};

struct Model {
  const bf16 *embedding;
  const void *final_norm;
  const Layer *layers;
  Linear head;
  int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, block_size, threads;
  int32_t turning;  // R
  int32_t norms_in_float32, rope_in_float32, norms_all_heads, gelu;  // 0 or 1
  int32_t experts, chosen;  // how many there are, and how many of them a row goes through
  int32_t shares_sum_to_one, shares_in_float32;  // 0 or 1
  float eps;
  float times_embedding, times_residual, times_attention, logits_by;  // the family's multipliers
};

struct Batch {
  const int32_t *tokens, *positions, *slots, *contexts;  // [M]
  const int32_t *tables;  // [M, width] cache blocks
  bf16 *logits;           // [M, vocab]
  int32_t rows, width;
};

namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

constexpr int TILE = 8;    // rows of a matrix whose results make one vector
constexpr int STREAMS = 4; // of them that are read together
#if defined(__AVX512VL__)  // inputs that are multiplied together: as many as there are registers for
constexpr int BLOCK = 4;
#else
constexpr int BLOCK = 3;
#endif
constexpr int SPINS = 500; // about 10 us: a thread is later than that only if it lost its core
#define UNROLL _Pragma("GCC unroll 8")

// Asks for the weights in the order they are stored, though rows are read together. The hardware sees
// those as short streams and stops at the end of each: without this, bf16 takes 1.5 times as long. Slower,
// too: asking along each row, for a whole tile at once, or to keep in the outer caches what is read once.
template <int ROWS> inline void fetch(const void *now) {
  constexpr int AHEAD = 4096;
  UNROLL for (int i = 0; i < 32 * ROWS; i += 64)
    __builtin_prefetch((const char *)now + AHEAD + i, 0, 0);
}

template <class V> inline V load(const void *p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float *p, F8 v) { memcpy(p, &v, sizeof v); }
inline F8 all(float x) { return F8{x, x, x, x, x, x, x, x}; }
inline F8 smaller(F8 a, F8 b) { return a < b ? a : b; }
inline F8 larger(F8 a, F8 b) { return a > b ? a : b; }
inline float sum(F8 v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}
inline float largest(F8 v) {
  float most = v[0];
  for (int i = 1; i < 8; ++i) most = std::max(most, v[i]);
  return most;
}

inline U8 rounded(F8 x) {  // to bf16, ties to even; the result in the upper halves
  U8 bits = (U8)x;
  return bits + 0x7fff + (bits >> 16 & 1);
}
inline F8 round8(F8 x) { return (F8)(rounded(x) & 0xffff0000); }
inline F8 read8(const bf16 *p) { return (F8)(__builtin_convertvector(load<H8>(p), U8) << 16); }
inline void write8(bf16 *p, F8 x) {
  H8 h = __builtin_convertvector(rounded(x) >> 16, H8);
  memcpy(p, &h, sizeof h);
}
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  return load<float>(&bits);
}
inline bf16 to_bf16(float x) {
  uint32_t bits = load<uint32_t>(&x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline F8 exp8(F8 x) {  // Cephes' expf: 2^n times a polynomial; error below 2e-7
  x = larger(smaller(x, all(88.0f)), all(-87.0f));
  const F8 magic = all(12582912.0f);  // 1.5·2^23: adding it rounds to an integer
  F8 n = (x * all(1.44269504f) + magic) - magic;
  F8 r = (x - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
  F8 y = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * r + all(c);
  y = y * r * r + r + all(1.0f);
  return y * (F8)((__builtin_convertvector(n, I8) + 127) << 23);
}

// quantize_tokens_e4m3 of numerics/activations.py, without the scale: steps of an eighth of a power of two
inline F8 to_e4m3(F8 x) {
  I8 exponent = (I8)x & 0x7f800000;
  const I8 least = I8{} + ((127 - 6) << 23);  // below it the steps stay
  exponent = exponent > least ? exponent : least;
  const F8 magic = (F8)(exponent + (20 << 23)) * all(1.5f);
  return larger(smaller((x + magic) - magic, all(448.0f)), all(-448.0f));
}
inline float largest_of(const bf16 *x, int n) {
  F8 most = all(0.0f);
  for (int c = 0; c < n; c += 8) most = larger(most, (F8)((U8)read8(x + c) & 0x7fffffff));
  return largest(most);
}

// ---- Sums of the lanes of TILE vectors ----

inline F8 lane_sums(const F8 *a) {
#if defined(__AVX2__)
  auto four = [](const F8 *v) {
    return _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]),
                          _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  };
  __m256 low = four(a), high = four(a + 4);
  return (F8)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                           _mm256_permute2f128_ps(low, high, 0x31));
#else
  F8 sums;
  for (int r = 0; r < TILE; ++r) sums[r] = sum(a[r]);
  return sums;
#endif
}
inline I8 lane_sums(const I8 *a) {
#if defined(__AVX2__)
  auto four = [](const I8 *v) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)v[0], (__m256i)v[1]),
                             _mm256_hadd_epi32((__m256i)v[2], (__m256i)v[3]));
  };
  __m256i low = four(a), high = four(a + 4);
  return (I8)_mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                              _mm256_permute2x128_si256(low, high, 0x31));
#else
  I8 sums = {};
  for (int r = 0; r < TILE; ++r)
    for (int i = 0; i < 8; ++i) sums[r] += a[r][i];
  return sums;
#endif
}

// ---- Dot products of TILE rows of weights with N inputs: out[N], a lane for each row ----
// Each format has its own order of the inputs, made once per matrix by `arrange`.

struct Bf16Dot {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  typedef bf16 Value;
  static void arrange(const bf16 *x, int n, Value *to) { memcpy(to, x, n * sizeof *x); }
#else
  typedef float Value;  // of 16 neighbours the 8 even ones, then the 8 odd ones
  static void arrange(const bf16 *x, int n, Value *to) {
    for (int c = 0; c < n; c += 16) {
      U8 both = load<U8>(x + c);
      store(to + c, (F8)(both << 16));
      store(to + c + 8, (F8)(both & 0xffff0000));
    }
  }
#endif
  template <int N>
  static void dot(const bf16 *const *w, int n, const Value *x, size_t stride, F8 *out, bool stream) {
        F8 acc[N][TILE] = {};
    UNROLL for (int first = 0; first < TILE; first += STREAMS)
      for (int c = 0; c < n; c += 16) {
        if (stream) fetch<STREAMS>(w[first] + c * STREAMS);
        UNROLL for (int r = first; r < first + STREAMS; ++r) {
          U8 both = load<U8>(w[r] + c);
          UNROLL for (int m = 0; m < N; ++m) {
            const Value *at = x + m * stride + c;
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
            acc[m][r] = (F8)_mm256_dpbf16_ps((__m256)acc[m][r], (__m256bh)both, load<__m256bh>(at));
#else
            acc[m][r] += (F8)(both << 16) * load<F8>(at);
            acc[m][r] += (F8)(both & 0xffff0000) * load<F8>(at + 8);
#endif
          }
        }
      }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(acc[m]);
  }
};

struct Int8Dot {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define DPBUSD _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif
#if defined(DPBUSD)  // takes unsigned times signed: inputs are moved up, 128 times the row's sum comes off
  typedef uint8_t Value;
  static constexpr int OFFSET = 128;
#else
  typedef int16_t Value;
  static constexpr int OFFSET = 0;
#endif
  // quantize_tokens_int8 of numerics/activations.py; returns the scale
  static float arrange(const bf16 *x, int n, Value *to) {
    float scale = largest_of(x, n) / 127.5f;
    if (scale == 0.0f) scale = 1.0f;
    const F8 magic = all(12582912.0f);
    for (int c = 0; c < n; c += 8) {
      F8 code = (read8(x + c) / all(scale) + magic) - magic;
      code = larger(smaller(code, all(127.0f)), all(-128.0f));
      I8 shifted = __builtin_convertvector(code, I8) + OFFSET;
      for (int i = 0; i < 8; ++i) to[c + i] = Value(shifted[i]);
    }
    return scale;
  }
  template <int N>
  static void dot(const int8_t *const *w, int n, const Value *x, size_t stride, I8 *out, bool stream) {
    I8 acc[N][TILE] = {};
    UNROLL for (int first = 0; first < TILE; first += STREAMS)
      for (int c = 0; c < n; c += 32) {
        if (stream) fetch<STREAMS>(w[first] + c * STREAMS);
        UNROLL for (int r = first; r < first + STREAMS; ++r) {
          const int8_t *codes = w[r] + c;
#if defined(DPBUSD)
          __m256i wide = load<__m256i>(codes);
          UNROLL for (int m = 0; m < N; ++m)
            acc[m][r] = (I8)DPBUSD((__m256i)acc[m][r], load<__m256i>(x + m * stride + c), wide);
#elif defined(__AVX2__)
          UNROLL for (int half = 0; half < 32; half += 16) {
            __m256i wide = _mm256_cvtepi8_epi16(load<__m128i>(codes + half));
            UNROLL for (int m = 0; m < N; ++m)
              acc[m][r] += (I8)_mm256_madd_epi16(wide, load<__m256i>(x + m * stride + c + half));
          }
#else
          for (int m = 0; m < N; ++m)
            for (int i = 0; i < 32; ++i) acc[m][r][i % 8] += codes[i] * x[m * stride + c + i];
#endif
        }
      }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(acc[m]);
  }
};

// 64 codes are 8 lanes of 8 nibbles. Nibble j is masked where it stands, so it counts 16^j times too much,
// which the input makes good: a power of two, nothing is lost. The top one would be a sign and is shifted.
struct Int4Dot {
  // [span][9][8] floats: inputs of nibble j by lane, then -8 times the sums of a scale's inputs
  static constexpr int SPAN = 64, VALUES = 72;
  typedef float Value;
  static void arrange(const bf16 *x, int n, Value *to) {
    for (int c = 0; c < n; c += SPAN, to += VALUES) {
      F8 total = all(0.0f);
      for (int j = 0; j < 8; ++j) {
        float unit = j < 7 ? 1.0f / float(1u << 4 * j) : 1.0f;
        F8 column;
        for (int lane = 0; lane < 8; ++lane) column[lane] = to_float(x[c + 8 * lane + j]);
        total += column;
        store(to + 8 * j, column * all(unit));
      }
      store(to + 64, all(-8.0f) * total);
    }
  }
  static F8 factors(const bf16 *row, int group, bool two) {
    float a = to_float(row[group]);
    if (!two) return all(a);
    float b = to_float(row[group + 1]);  // groups of 32
    return F8{a, a, a, a, b, b, b, b};
  }
  template <int N>
  static void dot(const Linear &l, const int *rows, const Value *x, size_t stride, F8 *out,
                  bool stream) {
    const size_t groups = l.in / l.group, width = l.in / 2;
    const bool two = l.group < SPAN;
    const uint8_t *w[TILE];
    const bf16 *scale[TILE], *zero[TILE];
    for (int r = 0; r < TILE; ++r) {
      w[r] = (const uint8_t *)l.weight + rows[r] * width;
      scale[r] = (const bf16 *)l.scale + rows[r] * groups;
      zero[r] = l.zero + rows[r] * groups;
    }
    // rows at a time: enough sums at once to hide that each waits for the last, few enough for registers
    constexpr int RUN = N == 1 ? STREAMS : 1;
    F8 total[N][TILE] = {};
    for (int c = 0; c < l.in; c += SPAN, x += VALUES) {
      if (stream) fetch<TILE>(w[0] + c / 2 * TILE);
      const int group = c / l.group;
      UNROLL for (int first = 0; first < TILE; first += RUN) {
        F8 acc[N][RUN];
        UNROLL for (int r = 0; r < RUN; ++r) {
          UNROLL for (int m = 0; m < N; ++m) acc[m][r] = load<F8>(x + m * stride + 64);
          if (!l.zero) continue;
          F8 offset = factors(zero[first + r], group, two);
          UNROLL for (int m = 0; m < N; ++m) acc[m][r] *= offset;
        }
        UNROLL for (int j = 0; j < 8; ++j)
          UNROLL for (int r = 0; r < RUN; ++r) {
            U8 codes = load<U8>(w[first + r] + c / 2);
            codes = j < 7 ? codes & (0xfu << 4 * j) : codes >> 28;
            F8 code = __builtin_convertvector((I8)codes, F8);
            UNROLL for (int m = 0; m < N; ++m) acc[m][r] += code * load<F8>(x + m * stride + 8 * j);
          }
        UNROLL for (int r = 0; r < RUN; ++r) {
          F8 factor = factors(scale[first + r], group, two);
          UNROLL for (int m = 0; m < N; ++m) total[m][first + r] += factor * acc[m][r];
        }
      }
    }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(total[m]);
  }
};

// Codes become floats where they are: a byte's sign and other bits are moved to where a wider float has its
// own, which makes them 2^SMALLER times too small. In float32 subnormal codes are right, too, and half of that
// factor is given to the inputs, half to the result: no sum leaves the range. bf16's products take subnormal
// numbers for zeros: there the exponents are moved up, and subnormal codes, which are rare, looked up.
template <int SHIFT, uint32_t MASK, int SMALLER, int FRACTION> struct Fp8Dot {
  static F8 half_way() { return (F8)(I8{} + ((127 + SMALLER / 2) << 23)); }
  static F8 decoded(U8 high) { return (F8)(((I8)high >> SHIFT) & int32_t(MASK)); }  // a code in the top byte
  // rounded: as E4M3 with this scale first; the scale then belongs to the result
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
  typedef bf16 Value;
  static void arrange(const bf16 *x, int n, bool rounded, float scale, Value *to) {
    const F8 by = all(1.0f / scale);
    for (int c = 0; c < n; c += 8) write8(to + c, rounded ? to_e4m3(read8(x + c) * by) : read8(x + c));
  }
  inline static const auto SUBNORMAL = [] {  // by fraction
    std::array<bf16, 16> values{};
    for (int i = 0; i < 1 << FRACTION; ++i)
      values[i] = to_bf16(std::ldexp(float(i), SMALLER - 126 - FRACTION));
    return values;
  }();
  // alone: for one input, where the memory is waited for, and a branch that is taken now and then costs more
  // than what it skips
  template <bool alone> static __m256i wide(const uint8_t *codes) {
    const __m256i code = _mm256_cvtepi8_epi16(load<__m128i>(codes));  // the sign everywhere above
    __m256i bits = _mm256_and_si256(_mm256_slli_epi16(code, 8 - SHIFT), _mm256_set1_epi16(MASK >> 16));
    bits = _mm256_add_epi16(bits, _mm256_set1_epi16(SMALLER << 7));
    const __mmask16 subnormal = _mm256_testn_epi16_mask(code, _mm256_set1_epi16(0x7f >> FRACTION << FRACTION));
    if (alone || __builtin_expect(subnormal, 0)) {
      __m256i small = _mm256_permutexvar_epi16(code, load<__m256i>(SUBNORMAL.data()));
      small = _mm256_or_si256(small, _mm256_and_si256(code, _mm256_set1_epi16(short(0x8000))));
      bits = _mm256_mask_blend_epi16(subnormal, bits, small);
    }
    return bits;
  }
  static constexpr int MOST = 8;  // inputs that share the decoding
  template <int N>
  static void dot(const uint8_t *const *w, int n, const Value *x, size_t stride, F8 *out, bool stream) {
    constexpr int RUN = N > 4 ? STREAMS / 2 : STREAMS;  // sums at once: as many as there are registers
    F8 acc[N][TILE] = {};
    UNROLL for (int first = 0; first < TILE; first += RUN)
      for (int c = 0; c < n; c += 32) {
        if (stream) fetch<RUN>(w[first] + c * RUN);
        UNROLL for (int r = first; r < first + RUN; ++r)
          UNROLL for (int half = 0; half < 32; half += 16) {
            const __m256bh codes = (__m256bh)wide<N == 1>(w[r] + c + half);
            UNROLL for (int m = 0; m < N; ++m)
              acc[m][r] = (F8)_mm256_dpbf16_ps((__m256)acc[m][r], codes,
                                               load<__m256bh>(x + m * stride + c + half));
          }
      }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(acc[m]);
  }
#else
  static constexpr int MOST = BLOCK;
  typedef float Value;  // of 16 neighbours the 8 even ones, then the 8 odd ones
  static void arrange(const bf16 *x, int n, bool rounded, float scale, Value *to) {
    const F8 by = all(1.0f / scale);
    for (int c = 0; c < n; c += 16) {
      U8 both = load<U8>(x + c);
      F8 even = (F8)(both << 16), odd = (F8)(both & 0xffff0000);
      if (rounded) even = to_e4m3(even * by), odd = to_e4m3(odd * by);
      store(to + c, even * half_way());
      store(to + c + 8, odd * half_way());
    }
  }
  template <int N>
  static void dot(const uint8_t *const *w, int n, const Value *x, size_t stride, F8 *out, bool stream) {
    F8 acc[N][TILE] = {};
    UNROLL for (int first = 0; first < TILE; first += STREAMS)
      for (int c = 0; c < n; c += 32) {
        if (stream) fetch<STREAMS>(w[first] + c * STREAMS);
        UNROLL for (int r = first; r < first + STREAMS; ++r)
          UNROLL for (int half = 0; half < 32; half += 16) {
            U8 both = __builtin_convertvector(load<H8>(w[r] + c + half), U8);
            F8 even = decoded(both << 24), odd = decoded(both << 16);
            UNROLL for (int m = 0; m < N; ++m) {
              const Value *at = x + m * stride + c + half;
              acc[m][r] += even * load<F8>(at);
              acc[m][r] += odd * load<F8>(at + 8);
            }
          }
      }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(acc[m]) * half_way();
  }
#endif
};
typedef Fp8Dot<4, 0x87f00000, 120, 3> E4m3Dot;
typedef Fp8Dot<3, 0x8fe00000, 112, 2> E5m2Dot;

// ---- A linear layer ----

struct alignas(64) Line {
  char bytes[64];
};
// Memory that is kept from step to step
template <class T> struct Buffer {
  std::vector<Line> lines;
  T *of(size_t count) {
    size_t need = (count * sizeof(T) + 63) / 64;
    if (lines.size() < need) lines.resize(need);
    return (T *)lines.data();
  }
  const T *data() const { return (const T *)lines.data(); }
};

// The inputs of a matrix [M, in] in the order of each format that reads them
struct Input {
  int rows = 0, columns = 0;
  const bf16 *x = nullptr;
  bool ready[FORMATS] = {};
  Buffer<Bf16Dot::Value> bf16s;
  Buffer<Int8Dot::Value> int8s;
  Buffer<Int4Dot::Value> int4s;
  Buffer<E4m3Dot::Value> e4m3s;
  Buffer<E5m2Dot::Value> e5m2s;
  Buffer<float> scales, e4m3_scales;

  void set(const bf16 *values, int m, int n) {
    x = values, rows = m, columns = n;
    std::fill(ready, ready + FORMATS, false);
  }
  size_t int4_stride() const { return size_t(columns) / Int4Dot::SPAN * Int4Dot::VALUES; }
  void prepare(const Linear &l) {
    if (ready[l.format]) return;
    ready[l.format] = true;
    size_t n = columns;
    for (int m = 0; m < rows; ++m) {
      const bf16 *row = x + m * n;
      if (l.format == BF16) Bf16Dot::arrange(row, columns, bf16s.of(rows * n) + m * n);
      if (l.format == INT8)
        scales.of(rows)[m] = Int8Dot::arrange(row, columns, int8s.of(rows * n) + m * n);
      if (l.format == E4M3) {
        float scale = 1.0f;
        if (l.rounding == STATIC) scale = l.input_scale;
        if (l.rounding == TOKEN) scale = largest_of(row, columns) / 448.0f;
        if (scale == 0.0f) scale = 1.0f;
        e4m3_scales.of(rows)[m] = scale;
        E4m3Dot::arrange(row, columns, l.rounding != NONE, scale, e4m3s.of(rows * n) + m * n);
      }
      if (l.format == E5M2) E5m2Dot::arrange(row, columns, false, 1.0f, e5m2s.of(rows * n) + m * n);
      if (l.format == INT4)
        Int4Dot::arrange(row, columns, int4s.of(rows * int4_stride()) + m * int4_stride());
    }
  }
};

// Calls body(first, count) for blocks of N rows, then smaller ones
template <int N, class Body> void in_blocks(int rows, Body body, int m = 0) {
  for (; m + N <= rows; m += N) body(m, std::integral_constant<int, N>());
  if constexpr (N > 1) in_blocks<(N + 1) / 2>(rows, body, m);
}

inline int tiles(const Linear &l) { return (l.out + TILE - 1) / TILE; }

// Outputs of one tile's rows for each input, rounded to bf16. Rows past the last are the last again.
void multiply(const Linear &l, int tile, const Input &in, F8 *y) {
  int rows[TILE];
  for (int r = 0; r < TILE; ++r) rows[r] = std::min(tile * TILE + r, l.out - 1);
  const size_t n = l.in;
  auto each = [&](auto value) {
    F8 values;
    for (int r = 0; r < TILE; ++r) values[r] = value(rows[r]);
    return values;
  };
  if (l.format == BF16) {
    const bf16 *w[TILE];
    for (int r = 0; r < TILE; ++r) w[r] = (const bf16 *)l.weight + rows[r] * n;
    in_blocks<BLOCK>(in.rows, [&](int m, auto N) {
      Bf16Dot::dot<N.value>(w, l.in, in.bf16s.data() + m * n, n, y + m, !m);
    });
  } else if (l.format == INT8) {
    const int8_t *w[TILE];
    for (int r = 0; r < TILE; ++r) w[r] = (const int8_t *)l.weight + rows[r] * n;
    const F8 scale = each([&](int row) { return ((const float *)l.scale)[row]; });
    in_blocks<BLOCK>(in.rows, [&](int m, auto N) {
      I8 product[N.value];
      Int8Dot::dot<N.value>(w, l.in, in.int8s.data() + m * n, n, product, !m);
      for (int i = 0; i < N.value; ++i) {
        if (Int8Dot::OFFSET)
          for (int r = 0; r < TILE; ++r) product[i][r] -= Int8Dot::OFFSET * l.sums[rows[r]];
        y[m + i] = __builtin_convertvector(product[i], F8) * all(in.scales.data()[m + i]) * scale;
      }
    });
  } else if (l.format == E4M3 || l.format == E5M2) {
    const uint8_t *w[TILE];
    for (int r = 0; r < TILE; ++r) w[r] = (const uint8_t *)l.weight + rows[r] * n;
    const F8 scale = each([&](int row) { return ((const float *)l.scale)[row]; });
    in_blocks<E4m3Dot::MOST>(in.rows, [&](int m, auto N) {
      if (l.format == E5M2)
        E5m2Dot::dot<N.value>(w, l.in, in.e5m2s.data() + m * n, n, y + m, !m);
      else
        E4m3Dot::dot<N.value>(w, l.in, in.e4m3s.data() + m * n, n, y + m, !m);
      for (int i = 0; i < N.value; ++i)
        y[m + i] = y[m + i] * all(l.format == E4M3 ? in.e4m3_scales.data()[m + i] : 1.0f) * scale;
    });
  } else {
    in_blocks<4>(in.rows, [&](int m, auto N) {
      const size_t stride = in.int4_stride();
      Int4Dot::dot<N.value>(l, rows, in.int4s.data() + m * stride, stride, y + m, !m);
    });
  }
  if (l.bias) {
    const F8 bias = each([&](int row) { return to_float(l.bias[row]); });
    // F.linear adds the bias before it rounds, the quantized layers after
    for (int m = 0; m < in.rows; ++m) y[m] = (l.format == BF16 ? y[m] : round8(y[m])) + bias;
  }
  for (int m = 0; m < in.rows; ++m) y[m] = round8(y[m]);
}

// ---- The step ----

// Spins, and sleeps once that took too long: another program then has a core, and takes the sleeper's
// in place of the one that the last thread needs
struct Barrier {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
  std::atomic<int> asleep{0};
  void wait(int threads) {
    int now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1) + 1 == threads) {
      arrived.store(0);
      round.store(now + 1);
      if (asleep.load()) wake();
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == now; ++spins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spins > SPINS) sleep(now);
    }
  }
#if defined(__linux__)
  void wake() { syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
  void sleep(int now) {
    asleep.fetch_add(1);
    syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
    asleep.fetch_sub(1);
  }
#else
  void wake() {}
  void sleep(int) { sched_yield(); }
#endif
};

// What threads hand each other: [M, ...]
struct Shared {
  bf16 *qkv, *attended, *delta, *act;
  bf16 *routed, *made;  // of the router [M, experts]; of the experts [M · chosen, hidden]
  Barrier barrier;
};

// Which experts each row goes through. A slot is a row and one of its experts, sorted by expert, then by row
struct Routing {
  Buffer<int32_t> picks, slots;  // [M, chosen]: experts in rising order, and where each one's slot is
  Buffer<float> shares;          // [M, chosen]
  Buffer<int32_t> rows, begun;   // the row of each slot; [experts + 1] the first slot of each expert
  Buffer<float> likely;
};

struct Scratch {
  Buffer<bf16> x, y, z, q, k;
  Buffer<Bf16Dot::Value> query;
  Buffer<float> scores;
  Buffer<F8> tile;
  Buffer<size_t> offsets;
  Input in;
  Routing routing;
  Buffer<bf16> gathered, mixed;
  Input own;  // of one expert
};

// What a norm over n numbers multiplies them with before its weight
float rms_factor(const bf16 *x, int n, float eps) {
  F8 squares = all(0.0f);
  for (int c = 0; c < n; c += 8) squares += read8(x + c) * read8(x + c);
  return 1.0f / std::sqrt(sum(squares) / float(n) + eps);
}

// y = x · factor · weight[first..first + n]; a float32 weight multiplies before the rounding
void weighted(const bf16 *x, float factor, const void *weight, int first, bool wide, int n, bf16 *y) {
  if (wide) {
    const float *w = (const float *)weight + first;
    for (int c = 0; c < n; c += 8) write8(y + c, read8(x + c) * all(factor) * load<F8>(w + c));
  } else {
    const bf16 *w = (const bf16 *)weight + first;
    for (int c = 0; c < n; c += 8) write8(y + c, round8(read8(x + c) * all(factor)) * read8(w + c));
  }
}

struct Worker {
  const Model &model;
  const Batch &batch;
  Shared &shared;
  Scratch &s;
  const int thread, threads, longest;  // the last: cached tokens of any sequence

  // Calls body(tile) for this thread's share
  template <class Body> void share(int count, Body body) const {
    int end = int64_t(count) * (thread + 1) / threads;
    for (int i = int64_t(count) * thread / threads; i < end; ++i) body(i);
  }

  // y [M, all parts' outputs] of layers that share the input
  void project(std::initializer_list<const Linear *> parts, bf16 *y) {
    int count = 0;
    size_t width = 0;
    for (auto *part : parts) s.in.prepare(*part), count += tiles(*part), width += part->out;
    share(count, [&](int tile) {
      bf16 *to = y;
      auto part = parts.begin();
      for (; tile >= tiles(**part); ++part) tile -= tiles(**part), to += (*part)->out;
      product(**part, tile, s.in, width, to);
    });
  }

  // One tile of a layer's outputs, to y [rows, width]
  void product(const Linear &l, int tile, const Input &in, size_t width, bf16 *y) {
    F8 *out = s.tile.of(2 * batch.rows);
    multiply(l, tile, in, out);
    const int valid = std::min(TILE, l.out - tile * TILE);
    y += tile * TILE;
    for (int m = 0; m < in.rows; ++m, y += width)
      if (valid == TILE) write8(y, out[m]);
      else
        for (int r = 0; r < valid; ++r) y[r] = to_bf16(out[m][r]);
  }

  void gate_up(const Layer &layer) {
    s.in.prepare(layer.gate), s.in.prepare(layer.up);
    share(tiles(layer.gate), [&](int tile) { gated(layer.gate, layer.up, tile, s.in, shared.act); });
  }

  // One tile of what `down` reads, to act [rows, intermediate]
  void gated(const Linear &gate, const Linear &up, int tile, const Input &in, bf16 *act) {
    F8 *first = s.tile.of(2 * batch.rows), *second = first + batch.rows;
    multiply(gate, tile, in, first);
    multiply(up, tile, in, second);
    for (int m = 0; m < in.rows; ++m) {
      F8 inner = first[m];
      if (model.gelu)  // the tanh form, as a sigmoid
        inner = all(1.5957691216057308f) * (inner + all(0.044715f) * inner * inner * inner);
      F8 active = round8(first[m] / (all(1.0f) + exp8(-inner)));
      write8(act + size_t(m) * model.intermediate + tile * TILE, active * second[m]);
    }
  }

  // ---- A mixture of experts (reference.through_experts) ----

  // Shares and places of all rows, from what the router says; every thread for itself
  void route() {
    const int rows = batch.rows, experts = model.experts, chosen = model.chosen;
    Routing &r = s.routing;
    int32_t *picks = r.picks.of(rows * chosen), *slots = r.slots.of(rows * chosen);
    int32_t *begun = r.begun.of(experts + 1), *row_of = r.rows.of(rows * chosen);
    float *shares = r.shares.of(rows * chosen), *likely = r.likely.of(experts);
    std::fill(begun, begun + experts + 1, 0);
    for (int m = 0; m < rows; ++m) {
      const bf16 *logits = shared.routed + size_t(m) * experts;
      float most = -INFINITY, total = 0.0f, sum = 0.0f;
      for (int e = 0; e < experts; ++e) most = std::max(most, to_float(logits[e]));
      for (int e = 0; e < experts; ++e) total += likely[e] = std::exp(to_float(logits[e]) - most);
      int32_t *own = picks + m * chosen;
      for (int i = 0; i < chosen; ++i) {  // of equal ones the first
        int best = -1;
        for (int e = 0; e < experts; ++e)
          if (std::find(own, own + i, e) == own + i && (best < 0 || likely[e] > likely[best])) best = e;
        own[i] = best;
      }
      std::sort(own, own + chosen);
      for (int i = 0; i < chosen; ++i) sum += shares[m * chosen + i] = likely[own[i]] / total;
      for (int i = 0; i < chosen; ++i) {
        if (model.shares_sum_to_one) shares[m * chosen + i] /= sum;
        ++begun[own[i] + 1];
      }
    }
    for (int e = 0; e < experts; ++e) begun[e + 1] += begun[e];
    for (int m = 0; m < rows; ++m)
      for (int i = 0; i < chosen; ++i) {  // begun[e] moves to the first slot of the next one, and back below
        slots[m * chosen + i] = begun[picks[m * chosen + i]]++;
        row_of[slots[m * chosen + i]] = m;
      }
    for (int e = experts; e > 0; --e) begun[e] = begun[e - 1];
    begun[0] = 0;
  }

  // Calls prepare(expert, first slot, count) and then body(expert, first slot, tile) for this thread's share
  // of the tiles of all experts that any row chose
  template <class Prepare, class Body> void share_experts(int each, Prepare prepare, Body body) {
    const int32_t *begun = s.routing.begun.data();
    int used = 0, expert = -1, at = -1;
    for (int e = 0; e < model.experts; ++e) used += begun[e + 1] > begun[e];
    share(used * each, [&](int task) {
      while (at < task / each) {
        do ++expert;
        while (begun[expert + 1] == begun[expert]);
        if (++at == task / each) prepare(expert, begun[expert], begun[expert + 1] - begun[expert]);
      }
      body(expert, begun[expert], task % each);
    });
  }

  void experts(const Layer &layer) {
    const size_t n = model.hidden, inner = model.intermediate;
    project({&layer.router}, shared.routed);
    shared.barrier.wait(threads);
    route();
    const int32_t *rows = s.routing.rows.data();
    share_experts(tiles(layer.experts[0]), [&](int expert, int first, int count) {
      bf16 *x = s.gathered.of(count * n);
      for (int i = 0; i < count; ++i) memcpy(x + i * n, s.in.x + rows[first + i] * n, n * sizeof *x);
      s.own.set(x, count, n);
      s.own.prepare(layer.experts[3 * expert]), s.own.prepare(layer.experts[3 * expert + 1]);
    }, [&](int expert, int first, int tile) {
      const Linear *parts = layer.experts + 3 * expert;
      gated(parts[0], parts[1], tile, s.own, shared.act + first * inner);
    });
    shared.barrier.wait(threads);
    share_experts(tiles(layer.experts[2]), [&](int expert, int first, int count) {
      s.own.set(shared.act + first * inner, count, inner);
      s.own.prepare(layer.experts[3 * expert + 2]);
    }, [&](int expert, int first, int tile) {
      product(layer.experts[3 * expert + 2], tile, s.own, n, shared.made + first * n);
    });
    shared.barrier.wait(threads);
    mix();
  }

  // The sum of what each row's experts made, times their shares, in the order of their numbers: s.mixed
  void mix() {
    const int n = model.hidden, chosen = model.chosen;
    bf16 *out = s.mixed.of(size_t(batch.rows) * n);
    for (int m = 0; m < batch.rows; ++m, out += n)
      for (int i = 0; i < chosen; ++i) {
        const bf16 *made = shared.made + size_t(s.routing.slots.data()[m * chosen + i]) * n;
        float share = s.routing.shares.data()[m * chosen + i];
        if (!model.shares_in_float32) share = to_float(to_bf16(share));
        for (int c = 0; c < n; c += 8) {
          F8 part = round8(read8(made + c) * all(share));
          write8(out + c, i ? read8(out + c) + part : part);
        }
      }
  }

  // Norm, if any, and RoPE of one of the heads [count, D]
  void turn(const Layer &layer, const bf16 *heads, int head, int count, const void *norm, int position,
            bf16 *y) const {
    const int n = model.head_dim, turning = model.turning;
    const bf16 *x = heads + head * n;
    if (norm) {
      const bool all_heads = model.norms_all_heads;
      float factor = all_heads ? rms_factor(heads, count * n, model.eps) : rms_factor(x, n, model.eps);
      weighted(x, factor, norm, all_heads ? head * n : 0, model.norms_in_float32, n, y), x = y;
    }
    const size_t at = size_t(position) * turning;
    if (model.rope_in_float32) {
      const float *cos = (const float *)layer.cos + at, *sin = (const float *)layer.sin + at;
      rotate(x, [&](int c) { return load<F8>(cos + c); }, [&](int c) { return load<F8>(sin + c); },
             [](F8 v) { return v; }, y);
    } else {
      const bf16 *cos = (const bf16 *)layer.cos + at, *sin = (const bf16 *)layer.sin + at;
      rotate(x, [&](int c) { return read8(cos + c); }, [&](int c) { return read8(sin + c); }, round8, y);
    }
    if (y != x)
      for (int c = turning; c < n; c += 8) write8(y + c, read8(x + c));
  }

  // Halves of the first R channels turn against each other; each product is rounded by `rounded`
  template <class Cos, class Sin, class Rounded>
  void rotate(const bf16 *x, Cos cos, Sin sin, Rounded rounded, bf16 *y) const {
    const int half = model.turning / 2;
    for (int c = 0; c < half; c += 8) {
      F8 a = read8(x + c), b = read8(x + half + c);
      write8(y + c, rounded(a * cos(c)) - rounded(b * sin(c)));
      write8(y + half + c, rounded(b * cos(half + c)) + rounded(a * sin(half + c)));
    }
  }

  void attend(const Layer &layer) {
    // shares of about as many cached tokens
    int64_t total = 0, before = 0;
    for (int m = 0; m < batch.rows; ++m) total += int64_t(model.heads) * (batch.contexts[m] + 32);
    for (int m = 0; m < batch.rows; ++m)
      for (int h = 0; h < model.heads; ++h) {
        int64_t cost = batch.contexts[m] + 32;
        if ((before + cost / 2) * threads / total == thread) attend(layer, m, h);
        before += cost;
      }
  }

  void attend(const Layer &layer, int m, int head) {
    const int n = model.head_dim, kv = head / (model.heads / model.kv_heads);
    const int context = batch.contexts[m], position = batch.positions[m];
    const bf16 *qkv = shared.qkv + size_t(m) * (model.heads + 2 * model.kv_heads) * n;
    bf16 *q = s.q.of(n), *k = s.k.of(n);
    const bf16 *v = qkv + (model.heads + model.kv_heads + kv) * n;
    turn(layer, qkv, head, model.heads, layer.q_norm, position, q);
    // each head of a group turns the key again, so that none waits for another to write the cache
    turn(layer, qkv + model.heads * n, kv, model.kv_heads, layer.k_norm, position, k);
    const size_t row = size_t(model.kv_heads) * n;
    if (head % (model.heads / model.kv_heads) == 0) {
      memcpy(layer.keys + batch.slots[m] * row + kv * n, k, n * sizeof *k);
      memcpy(layer.values + batch.slots[m] * row + kv * n, v, n * sizeof *v);
    }
    const int first = layer.window ? std::max(0, context - layer.window) : 0, last = context - 1;
    const size_t *offsets = s.offsets.of(0) + size_t(m) * longest;
    auto cached = [&](const bf16 *cache, const bf16 *newest, int at) {
      return at < last ? cache + offsets[at] + kv * n : newest;
    };
    auto *query = s.query.of(n);
    Bf16Dot::arrange(q, n, query);
    const int count = context - first, padded = (count + 7) / 8 * 8;
    float *scores = s.scores.of(padded);
    for (int i = 0; i < padded; i += TILE) {
      const bf16 *w[TILE];
      for (int r = 0; r < TILE; ++r) w[r] = cached(layer.keys, k, first + i + r);
      F8 eight;
      Bf16Dot::dot<1>(w, n, query, 0, &eight, false);
      store(scores + i, eight);
    }
    for (int i = count; i < padded; ++i) scores[i] = -INFINITY;
    F8 most = load<F8>(scores);
    for (int i = 8; i < padded; i += 8) most = larger(most, load<F8>(scores + i));
    const F8 peak = all(largest(most)), scale = all(model.times_attention);
    F8 sums = all(0.0f);
    for (int i = 0; i < padded; i += 8) {
      F8 weight = exp8((load<F8>(scores + i) - peak) * scale);
      store(scores + i, weight);
      for (int j = count - i; j < 8; ++j) weight[j] = 0.0f;
      sums += weight;
    }
    bf16 *out = shared.attended + (size_t(m) * model.heads + head) * n;
    const F8 share = all(1.0f / sum(sums));
    auto average = [&](int c, auto width) {
      F8 acc[width.value] = {};
      for (int i = 0; i < count; ++i) {
        const bf16 *value = cached(layer.values, v, first + i) + c;
        UNROLL for (int j = 0; j < width.value; ++j) acc[j] += all(scores[i]) * read8(value + 8 * j);
      }
      for (int j = 0; j < width.value; ++j) write8(out + c + 8 * j, acc[j] * share);
    };
    int c = 0;
    for (; c + 64 <= n; c += 64) average(c, std::integral_constant<int, 8>());
    for (; c < n; c += 16) average(c, std::integral_constant<int, 2>());
  }

  // Where each cached token of each sequence is, in a layer's keys and values
  void find_cached() {
    size_t *offsets = s.offsets.of(size_t(batch.rows) * longest);
    for (int m = 0; m < batch.rows; ++m)
      for (int at = 0; at < batch.contexts[m]; ++at) {
        size_t block = batch.tables[size_t(m) * batch.width + at / model.block_size];
        size_t slot = block * model.block_size + at % model.block_size;
        offsets[size_t(m) * longest + at] = slot * model.kv_heads * model.head_dim;
      }
  }

  // x += delta, which goes through the norm `between` first, if any; then its norm, if any, is the next input
  void add_norm(const bf16 *delta, const void *between, const void *weight) {
    const int n = model.hidden;
    const bool wide = model.norms_in_float32;
    bf16 *x = s.x.of(size_t(batch.rows) * n), *y = s.y.of(size_t(batch.rows) * n), *z = s.z.of(n);
    const F8 times = all(model.times_residual);
    for (int m = 0; m < batch.rows; ++m, x += n, y += n) {
      if (delta) {
        const bf16 *d = delta + size_t(m) * n;
        if (between) weighted(d, rms_factor(d, n, model.eps), between, 0, wide, n, z), d = z;
        for (int i = 0; i < n; i += 8) write8(x + i, read8(x + i) + round8(read8(d + i) * times));
      }
      if (weight) weighted(x, rms_factor(x, n, model.eps), weight, 0, wide, n, y);
    }
    s.in.set(weight ? s.y.of(0) : s.x.of(0), batch.rows, n);
  }

  void run() {
    const size_t n = model.hidden;
    find_cached();
    const bf16 *delta = nullptr;  // what the last MLP adds
    bf16 *x = s.x.of(batch.rows * n);
    for (int m = 0; m < batch.rows; ++m)
      scaled(model.embedding + batch.tokens[m] * n, all(model.times_embedding), n, x + m * n);
    for (int i = 0; i < model.num_layers; ++i) {
      const Layer &layer = model.layers[i];
      add_norm(delta, i ? model.layers[i - 1].mlp_out_norm : nullptr, layer.input_norm);
      project({&layer.q, &layer.k, &layer.v}, shared.qkv);
      shared.barrier.wait(threads);
      attend(layer);
      shared.barrier.wait(threads);
      s.in.set(shared.attended, batch.rows, model.heads * model.head_dim);
      project({&layer.out}, shared.delta);
      shared.barrier.wait(threads);
      add_norm(shared.delta, layer.attention_out_norm, layer.post_norm);
      if (layer.experts) {
        experts(layer);
        delta = s.mixed.data();
        continue;
      }
      gate_up(layer);
      shared.barrier.wait(threads);
      s.in.set(shared.act, batch.rows, model.intermediate);
      project({&layer.down}, shared.delta);
      shared.barrier.wait(threads);
      delta = shared.delta;
    }
    add_norm(delta, model.layers[model.num_layers - 1].mlp_out_norm, model.final_norm);
    project({&model.head}, batch.logits);
    if (model.logits_by == 1) return;
    shared.barrier.wait(threads);
    const size_t vocab = model.head.out;  // rows are shared out, whole ones
    for (int m = thread; m < batch.rows; m += threads)
      for (size_t i = 0; i < vocab; ++i) {
        bf16 *logit = batch.logits + m * vocab + i;
        *logit = to_bf16(to_float(*logit) / model.logits_by);
      }
  }

  static void scaled(const bf16 *x, F8 times, size_t n, bf16 *y) {
    for (size_t i = 0; i < n; i += 8) write8(y + i, read8(x + i) * times);
  }
};

}  // namespace

extern "C" void decode_step(const Model *model, const Batch *batch) {
  static thread_local Buffer<bf16> buffers[6];
  const size_t m = batch->rows, d = model->head_dim, paths = m * std::max(1, model->chosen);
  Shared shared{
      buffers[0].of(m * (model->heads + 2 * model->kv_heads) * d), buffers[1].of(m * model->heads * d),
      buffers[2].of(m * model->hidden), buffers[3].of(paths * model->intermediate),
      buffers[4].of(m * model->experts), buffers[5].of(model->experts ? paths * model->hidden : 0), {}};
#pragma omp parallel num_threads(model->threads)
  {
    static thread_local Scratch scratch;
    Worker{*model, *batch, shared, scratch, omp_get_thread_num(), omp_get_num_threads(),
           *std::max_element(batch->contexts, batch->contexts + batch->rows)}.run();
  }
}

// Maps memory in pages of 2 MB where the system can; reading all weights misses a small page's entry 65
// thousand times a step. What cannot be moved stays as it is.
extern "C" void use_huge_pages(const void *begin, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20, COLLAPSE = 25;  // MADV_COLLAPSE, Linux 6.1
  for (uintptr_t at = uintptr_t(begin) / PAGE * PAGE; at < uintptr_t(begin) + bytes; at += PAGE)
    madvise((void *)at, PAGE, COLLAPSE);
#endif
}

// A weight [out, in] of 8-bit floats in bf16: code · scale, rounded once. scale: [out]
extern "C" void expand_fp8(const uint8_t *codes, const float *scale, int32_t is_e5m2, int32_t rows,
                           int32_t columns, bf16 *out, int32_t threads) {
  const F8 up = is_e5m2 ? E5m2Dot::half_way() * E5m2Dot::half_way() : E4m3Dot::half_way() * E4m3Dot::half_way();
#pragma omp parallel for num_threads(threads)
  for (int32_t r = 0; r < rows; ++r)
    for (int32_t c = 0; c < columns; c += 8) {
      uint64_t eight = load<uint64_t>(codes + size_t(r) * columns + c);
      typedef uint8_t B8 __attribute__((vector_size(8)));
      U8 high = __builtin_convertvector(load<B8>(&eight), U8) << 24;
      F8 value = is_e5m2 ? E5m2Dot::decoded(high) : E4m3Dot::decoded(high);
      write8(out + size_t(r) * columns + c, value * up * all(scale[r]));
    }
}

// An INT4 weight [out, in] in bf16: code · scale, rounded once
extern "C" void expand_int4(const uint8_t *pairs, const bf16 *scale, const bf16 *zero, int32_t rows,
                            int32_t columns, int32_t group, bf16 *out, int32_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int32_t r = 0; r < rows; ++r) {
    const size_t groups = columns / group;
    for (size_t g = 0; g < groups; ++g) {
      const float step = to_float(scale[r * groups + g]);
      const float middle = zero ? 8.0f * to_float(zero[r * groups + g]) : 8.0f;
      float values[16];
      for (int code = 0; code < 16; ++code) values[code] = (float(code) - middle) * step;
      for (int32_t c = 0; c < group; c += 2) {
        const size_t at = (size_t(r) * columns + g * group + c) / 2;
        out[2 * at] = to_bf16(values[pairs[at] & 15]);
        out[2 * at + 1] = to_bf16(values[pairs[at] >> 4]);
      }
    }
  }
}
