// One step on the CPU: new tokens of some sequences, one each or a prompt's, through the whole decoder.
//
// Start at `decode_step`: one parallel region; in it every thread runs `Worker::run`, layer after layer.
// A thread multiplies its share of a matrix's rows by all M inputs; barriers part the phases. What is small
// (norms, residual sums, rounding of inputs) every thread does for itself while rows are few, which is cheaper
// than a barrier; from TOGETHER rows on each does its share of the rows.
//
// Rounds to bf16 wherever the torch reference does (reference.py, linear.py). The sums of a row have one
// order, whatever M and the number of threads are, so a row's logits do not depend on the batch.
//
// M: rows, each a token. S: sequences. T: threads. D: head size. Vectors are GCC's own, which any machine has; only
// dot products have instructions of their own (AVX-512 BF16, VNNI, AVX2, NEON). cpu_decode.py and native.py mirror
// the structs below.
#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <thread>
#include <type_traits>
#include <utility>
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
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef uint16_t bf16;
enum Format : int32_t { BF16, INT8, INT4, E4M3, E5M2, FORMATS };
constexpr int INT4_BYTES = FORMATS, INT8_FLOATS = FORMATS + 1, INT8_BLOCKS = FORMATS + 2, ORDERS = FORMATS + 3;
// What inputs are rounded to. Of E4M3 weights: not at all; E4M3 with a scale for each token, or one for all.
// Of INT8 and INT4 weights: not at all; INT8 with a scale for each token, or for each 32 inputs of it
enum Rounding : int32_t { NONE, TOKEN, STATIC, BLOCKS };

struct Linear {
  const void *weight;     // [out, in]: bf16 | int8 | int4 in pairs, the even column in the low half | 8-bit floats
  const void *scale;      // int8 and 8-bit floats: float [out]; int4: bf16 [out, in / group]
  const bf16 *zero;       // int4: (zero point + 8) / 8 as scale, or null: 1 everywhere
  const int32_t *sums;    // int8: of each row's codes [out]
  const bf16 *bias;       // [out] or null
  int32_t out, in, format, group;
  int32_t rounding;       // of a layer that is not BF16: its inputs'
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
  const void *final_norm;
  const Layer *layers;
  Linear head;
  int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, block_size, threads;
  int32_t turning;  // R
  int32_t norms_in_float32, rope_in_float32, norms_all_heads, gelu;  // 0 or 1
  int32_t experts, chosen;  // how many there are, and how many of them a row goes through
  int32_t shares_sum_to_one, shares_in_float32;  // 0 or 1
  float eps;
  float times_residual, times_attention, logits_by;  // the family's multipliers
};

struct Batch {
  const bf16 *entering;   // [M, hidden]: what enters the first layer
  const int32_t *positions, *slots;  // [M]
  const int32_t *starts;  // [S + 1]: the first row of each sequence
  const int32_t *tables;  // [S, width] cache blocks
  bf16 *logits;           // [S, vocab], after each one's last row
  bf16 *hidden;           // [M, hidden] after the final norm; or null
  int32_t rows, sequences, width;
};

namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));
typedef int8_t C16 __attribute__((vector_size(16)));
typedef int16_t S16 __attribute__((vector_size(32)));

constexpr int TILE = 8;    // rows of a matrix whose results make one vector
// of them that are read together with N inputs: for one input the memory is waited for, and reads one row best
template <int N> constexpr int STREAMS = N == 1 ? 1 : 4;
constexpr int TOGETHER = 16;           // rows from which on threads share what is done for each row
constexpr size_t IN_CACHE = 256 << 10; // bytes of inputs that a tile after tile is multiplied by
constexpr int SPINS = 500; // about 10 us: a thread is later than that only if it lost its core
#define UNROLL _Pragma("GCC unroll 8")

// Asks for the weights in the order they are stored, though rows are read together. The hardware sees
// those as short streams and stops at the end of each: without this, FP8 of one input takes 2.5 times as long,
// eight inputs 1.1 to 1.5 times (docs/log.md). Slower, too: asking along each row, for a whole tile at once, or
// to keep in the outer caches what is read once.
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
#if defined(__aarch64__)  // halves of vectors
inline float32x4_t low(F8 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
inline float32x4_t high(F8 v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
inline int32x4_t low(I8 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
inline int32x4_t high(I8 v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
inline F8 whole(float32x4_t a, float32x4_t b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7); }
inline I8 whole(int32x4_t a, int32x4_t b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7); }
#endif
#if defined(__ARM_FEATURE_DOTPROD)
// acc plus products of 32 pairs of bytes, four to a lane
inline I8 byte_products(I8 acc, const void *a, const void *b) {
  auto half = [&](int32x4_t sums, int at) {
    return vdotq_s32(sums, vld1q_s8((const int8_t *)a + at), vld1q_s8((const int8_t *)b + at));
  };
  return whole(half(low(acc), 0), half(high(acc), 16));
}
#endif

// a · b + c. Said here, and not left to the compiler (-ffp-contract=off): it joins some products and not others
inline F8 fused(F8 a, F8 b, F8 c) {
#if defined(__FMA__)
  return (F8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return whole(vfmaq_f32(low(c), low(a), low(b)), vfmaq_f32(high(c), high(a), high(b)));
#else
  return a * b + c;
#endif
}
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
    y = fused(y, r, all(c));
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
#elif defined(__aarch64__)
  auto four = [](const F8 *v, auto half) {
    return vpaddq_f32(vpaddq_f32(half(v[0]), half(v[1])), vpaddq_f32(half(v[2]), half(v[3])));
  };
  auto lower = [](F8 v) { return low(v); };
  auto upper = [](F8 v) { return high(v); };
  return whole(vaddq_f32(four(a, lower), four(a, upper)), vaddq_f32(four(a + 4, lower), four(a + 4, upper)));
#else
  F8 sums;  // in the order of the instructions above
  for (int r = 0; r < TILE; ++r) {
    const F8 &v = a[r];
    sums[r] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
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
// Each format has its own order of the inputs, made once per matrix by `arrange`. MOST: inputs that are multiplied
// together, as many as there are registers for.

struct Bf16Dot {
#if defined(__AVX512VL__)
  static constexpr int MOST = 6;
#else
  static constexpr int MOST = 2;
#endif
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
    UNROLL for (int first = 0; first < TILE; first += STREAMS<N>)
      for (int c = 0; c < n; c += 16) {
        if (stream) fetch<STREAMS<N>>(w[first] + c * STREAMS<N>);
        UNROLL for (int r = first; r < first + STREAMS<N>; ++r) {
          U8 both = load<U8>(w[r] + c);
          UNROLL for (int m = 0; m < N; ++m) {
            const Value *at = x + m * stride + c;
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
            acc[m][r] = (F8)_mm256_dpbf16_ps((__m256)acc[m][r], (__m256bh)both, load<__m256bh>(at));
#else
            acc[m][r] = fused((F8)(both << 16), load<F8>(at), acc[m][r]);
            acc[m][r] = fused((F8)(both & 0xffff0000), load<F8>(at + 8), acc[m][r]);
#endif
          }
        }
      }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(acc[m]);
  }
};

struct Int8Dot {
#if defined(__AVX512VL__)
  static constexpr int MOST = 6;
#else
  static constexpr int MOST = 3;
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define DPBUSD _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif
#if defined(DPBUSD)  // takes unsigned times signed: inputs are moved up, 128 times the row's sum comes off
  typedef uint8_t Value;
  static constexpr int OFFSET = 128;
#elif defined(__ARM_FEATURE_DOTPROD)
  typedef int8_t Value;
  static constexpr int OFFSET = 0;
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
    I8 acc[N][TILE];
    UNROLL for (int first = 0; first < TILE; first += STREAMS<N>) {
      I8 part[N][STREAMS<N>] = {};
      for (int c = 0; c < n; c += 32) {
        if (stream) fetch<STREAMS<N>>(w[first] + c * STREAMS<N>);
#if defined(DPBUSD)
        __m256i inputs[N];
        UNROLL for (int m = 0; m < N; ++m) inputs[m] = load<__m256i>(x + m * stride + c);
        UNROLL for (int r = 0; r < STREAMS<N>; ++r) {
          __m256i wide = load<__m256i>(w[first + r] + c);
          // one row of one input: a sum of its own each, or each product waits for the last
          UNROLL for (int m = 0; m < N; ++m)
            if (N == 1) part[m][r] += (I8)DPBUSD(__m256i{}, inputs[m], wide);
            else part[m][r] = (I8)DPBUSD((__m256i)part[m][r], inputs[m], wide);
        }
#elif defined(__AVX2__)
        UNROLL for (int half = 0; half < 32; half += 16) {
          __m256i inputs[N];
          UNROLL for (int m = 0; m < N; ++m) inputs[m] = load<__m256i>(x + m * stride + c + half);
          UNROLL for (int r = 0; r < STREAMS<N>; ++r) {
            __m256i wide = _mm256_cvtepi8_epi16(load<__m128i>(w[first + r] + c + half));
            UNROLL for (int m = 0; m < N; ++m) part[m][r] += (I8)_mm256_madd_epi16(wide, inputs[m]);
          }
        }
#elif defined(__ARM_FEATURE_DOTPROD)
        UNROLL for (int r = 0; r < STREAMS<N>; ++r)
          UNROLL for (int m = 0; m < N; ++m)
            part[m][r] = byte_products(part[m][r], w[first + r] + c, x + m * stride + c);
#else
        for (int r = 0; r < STREAMS<N>; ++r)
          for (int m = 0; m < N; ++m)
            for (int i = 0; i < 32; ++i) part[m][r][i % 8] += w[first + r][c + i] * x[m * stride + c + i];
#endif
      }
      UNROLL for (int m = 0; m < N; ++m)
        UNROLL for (int r = 0; r < STREAMS<N>; ++r) acc[m][first + r] = part[m][r];
    }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(acc[m]);
  }
};

// Products of codes that become floats, or bf16, where they are, with inputs arranged as Bf16Dot's: of 16 neighbours
// Dot's `wide` makes bf16, or its `decoded` floats of those whose byte is the top one of a word.
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
constexpr int MOST_DECODED = 4;
#else
constexpr int MOST_DECODED = 3;
#endif
template <class Dot, int N>
void dot_decoded(const uint8_t *const *w, int n, const typename Dot::Value *x, size_t stride, F8 *out, bool stream) {
  constexpr int RUN = 4;  // sums at once: decoding takes longer than reading
  F8 acc[N][TILE] = {};
  UNROLL for (int first = 0; first < TILE; first += RUN)
    for (int c = 0; c < n; c += 32) {
      if (stream) fetch<RUN>(w[first] + c * RUN);
      UNROLL for (int r = first; r < first + RUN; ++r)
        UNROLL for (int half = 0; half < 32; half += 16) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
          const __m256bh codes = (__m256bh)Dot::template wide<N == 1>(w[r] + c + half);
          UNROLL for (int m = 0; m < N; ++m)
            acc[m][r] = (F8)_mm256_dpbf16_ps((__m256)acc[m][r], codes, load<__m256bh>(x + m * stride + c + half));
#else
          U8 both = __builtin_convertvector(load<H8>(w[r] + c + half), U8);
          F8 even = Dot::decoded(both << 24), odd = Dot::decoded(both << 16);
          UNROLL for (int m = 0; m < N; ++m) {
            const typename Dot::Value *at = x + m * stride + c + half;
            acc[m][r] = fused(even, load<F8>(at), acc[m][r]);
            acc[m][r] = fused(odd, load<F8>(at + 8), acc[m][r]);
          }
#endif
        }
    }
  for (int m = 0; m < N; ++m) out[m] = Dot::made(lane_sums(acc[m]));
}

// INT8 with inputs that are not rounded: floats and bf16 have room for the codes.
struct Int8FloatDot {
  typedef Bf16Dot::Value Value;
  static F8 made(F8 sums) { return sums; }
  static F8 decoded(U8 high) { return __builtin_convertvector((I8)high >> 24, F8); }
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__)
  template <bool alone> static __m256i wide(const uint8_t *codes) {
    const __m512i whole = _mm512_cvtepi8_epi32(load<__m128i>(codes));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)_mm512_cvtepi32_ps(whole), 16));
  }
#endif
  static void expand(const uint8_t *codes, int n, bf16 *to) {
    for (int c = 0; c < n; c += 8) {
      if (c % 32 == 0) fetch<1>(codes + c);
      for (int i = c; i < c + 8; ++i) to[i] = to_bf16(float(int8_t(codes[i])));
    }
  }
};

// INT8 with inputs of 8 bits, a scale for each 32 of them.
struct Int8BlockDot {
  struct Block {
    int8_t codes[32];
    float scale;  // the largest of them over 127
  };
  static void arrange(const bf16 *x, int n, Block *to) {
    const F8 magic = all(12582912.0f);
    for (int c = 0; c < n; c += 32, ++to) {
      to->scale = largest_of(x + c, 32) / 127.0f;
      if (to->scale == 0.0f) to->scale = 1.0f;
      for (int i = 0; i < 32; i += 8) {
        // not -128, whose negative is no code
        F8 code = larger(smaller((read8(x + c + i) / all(to->scale) + magic) - magic, all(127.0f)), all(-127.0f));
        I8 codes = __builtin_convertvector(code, I8);
        for (int j = 0; j < 8; ++j) to->codes[i + j] = int8_t(codes[j]);
      }
    }
  }
  // 32 products, summed by lane
  static I8 products(const int8_t *w, const Block &x) {
#if defined(__AVX2__)
    // unsigned times signed: the weight's signs go to the inputs. Two products stay below 2^15
    const __m256i codes = load<__m256i>(w), signed_ = _mm256_sign_epi8(load<__m256i>(x.codes), codes);
#if defined(DPBUSD)
    return (I8)DPBUSD(__m256i{}, _mm256_abs_epi8(codes), signed_);
#else
    return (I8)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(codes), signed_), _mm256_set1_epi16(1));
#endif
#elif defined(__ARM_FEATURE_DOTPROD)
    return byte_products(I8{}, w, x.codes);
#else
    I8 sums = {};
    for (int i = 0; i < 32; ++i) sums[i / 4] += w[i] * x.codes[i];
    return sums;
#endif
  }
  static constexpr int MOST = 4;
  template <int N>
  static void dot(const int8_t *const *w, int n, const Block *x, F8 *out, bool stream) {
    constexpr int RUN = STREAMS<N>;
    const int blocks = n / 32;
    F8 total[N][TILE];
    UNROLL for (int first = 0; first < TILE; first += RUN) {
      F8 part[N][RUN] = {};
      for (int b = 0; b < blocks; ++b) {
        if (stream) fetch<RUN>(w[first] + b * 32 * RUN);
        UNROLL for (int r = 0; r < RUN; ++r)
          UNROLL for (int m = 0; m < N; ++m) {
            const Block &at = x[m * blocks + b];
            const F8 sums = __builtin_convertvector(products(w[first + r] + b * 32, at), F8);
            part[m][r] = fused(sums, all(at.scale), part[m][r]);
          }
      }
      UNROLL for (int m = 0; m < N; ++m)
        UNROLL for (int r = 0; r < RUN; ++r) total[m][first + r] = part[m][r];
    }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(total[m]);
  }
};

// 64 codes are 8 lanes of 8 nibbles. Nibble j is masked where it stands, so it counts 16^j times too much,
// which the input makes good: a power of two, nothing is lost. The top one would be a sign and is shifted.
struct Int4Dot {
  // [span][9][8] floats: inputs of nibble j by lane, then -8 times the sums of a scale's inputs
  static constexpr int SPAN = 64, VALUES = 72, MOST = 4;
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
    constexpr int RUN = N == 1 ? 4 : 1;
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
            UNROLL for (int m = 0; m < N; ++m) acc[m][r] = fused(code, load<F8>(x + m * stride + 8 * j), acc[m][r]);
          }
        UNROLL for (int r = 0; r < RUN; ++r) {
          F8 factor = factors(scale[first + r], group, two);
          UNROLL for (int m = 0; m < N; ++m)
            total[m][first + r] = fused(factor, acc[m][r], total[m][first + r]);
        }
      }
    }
    for (int m = 0; m < N; ++m) out[m] = lane_sums(total[m]);
  }
};

// The same with inputs of 8 bits: products in integers, a scale for each 32 inputs.
struct Int4ByteDot {
  static constexpr int SPAN = 64, BLOCK_SIZE = 32;
  struct Span {         // of inputs; a lane is for bytes of the weight, the first half of which are one block's
    uint8_t even[32], odd[32];  // int8 codes of the even and the odd columns
    I8 offset;          // -8 times the sum of a block's codes, in the first lane of its half
    F8 scale;           // of the block, in each lane of its half
  };
  // by_token: one scale for all (quantize_tokens_int8 of numerics/activations.py); otherwise, of each block,
  // its largest over 127
  static void arrange(const bf16 *x, int n, bool by_token, Span *to) {
    float scale = by_token ? largest_of(x, n) / 127.5f : 0.0f;
    const F8 magic = all(12582912.0f);
    for (int c = 0; c < n; c += SPAN, ++to) {
      to->offset = I8{};
      for (int half = 0; half < 2; ++half) {
        const bf16 *block = x + c + BLOCK_SIZE * half;
        if (!by_token) scale = largest_of(block, BLOCK_SIZE) / 127.0f;
        const float by = scale == 0.0f ? 1.0f : scale;
        int total = 0;
        for (int i = 0; i < BLOCK_SIZE; i += 8) {
          F8 code = (read8(block + i) / all(by) + magic) - magic;
          I8 codes = __builtin_convertvector(larger(smaller(code, all(127.0f)), all(-128.0f)), I8);
          for (int j = 0; j < 8; ++j) {
            (j % 2 ? to->odd : to->even)[BLOCK_SIZE / 2 * half + (i + j) / 2] = uint8_t(codes[j]);
            total += codes[j];
          }
        }
        to->offset[4 * half] = -8 * total;
        for (int lane = 0; lane < 4; ++lane) to->scale[4 * half + lane] = by;
      }
    }
  }
  // acc plus the products of 64 codes of a weight's row and an input, by lane
  static I8 products(I8 acc, U8 even, U8 odd, const Span &x) {
#if defined(DPBUSD)
    acc = (I8)DPBUSD((__m256i)acc, (__m256i)even, load<__m256i>(x.even));
    return (I8)DPBUSD((__m256i)acc, (__m256i)odd, load<__m256i>(x.odd));
#elif defined(__AVX2__)
    // two products and two of their sums stay below 2^15
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)even, load<__m256i>(x.even)),
                                     _mm256_maddubs_epi16((__m256i)odd, load<__m256i>(x.odd)));
    return acc + (I8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    return byte_products(byte_products(acc, &even, x.even), &odd, x.odd);
#else
    uint8_t codes[2][32];
    memcpy(codes[0], &even, 32), memcpy(codes[1], &odd, 32);
    for (int i = 0; i < 32; ++i)
      acc[i / 4] += codes[0][i] * int8_t(x.even[i]) + codes[1][i] * int8_t(x.odd[i]);
    return acc;
#endif
  }
  static constexpr int MOST = 4;
  template <int N>
  static void dot(const Linear &l, const int *rows, const Span *x, size_t stride, F8 *out, bool stream) {
    const size_t groups = l.in / l.group, width = l.in / 2;
    const bool two = l.group < SPAN;
    constexpr int RUN = STREAMS<N>;
    F8 total[N][TILE];
    UNROLL for (int first = 0; first < TILE; first += RUN) {
      const uint8_t *w[RUN];
      const bf16 *scale[RUN], *zero[RUN];
      for (int r = 0; r < RUN; ++r) {
        const size_t row = rows[first + r];
        w[r] = (const uint8_t *)l.weight + row * width;
        scale[r] = (const bf16 *)l.scale + row * groups;
        zero[r] = l.zero + row * groups;
      }
      F8 part[N][RUN] = {};
      for (int c = 0, span = 0; c < l.in; c += SPAN, ++span) {
        if (stream) fetch<RUN>(w[0] + c / 2 * RUN);
        const int group = c / l.group;
        UNROLL for (int r = 0; r < RUN; ++r) {
          U8 codes = load<U8>(w[r] + c / 2), even = codes & 0x0f0f0f0f, odd = codes >> 4 & 0x0f0f0f0f;
          const F8 factor = Int4Dot::factors(scale[r], group, two);
          UNROLL for (int m = 0; m < N; ++m) {
            const Span &at = x[m * stride + span];
            F8 sums;
            if (l.zero) {
              sums = __builtin_convertvector(products(I8{}, even, odd, at), F8);
              sums += Int4Dot::factors(zero[r], group, two) * __builtin_convertvector(at.offset, F8);
            } else {
              sums = __builtin_convertvector(products(at.offset, even, odd, at), F8);
            }
            part[m][r] = fused(sums, at.scale * factor, part[m][r]);
          }
        }
      }
      UNROLL for (int m = 0; m < N; ++m)
        UNROLL for (int r = 0; r < RUN; ++r) total[m][first + r] = part[m][r];
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
  static F8 made(F8 sums) { return sums; }  // the result, of sums of codes times arranged inputs
  static void expand(const uint8_t *codes, int n, bf16 *to) {
    for (int c = 0; c < n; c += 32) {
      fetch<1>(codes + c);
      for (int half = c; half < c + 32; half += 16)
        _mm256_storeu_si256((__m256i *)(to + half), wide<true>(codes + half));
    }
  }
#else
  static F8 made(F8 sums) { return sums * half_way(); }
  static void expand(const uint8_t *codes, int n, bf16 *to) {
    for (int c = 0; c < n; c += 16) {
      if (c % 32 == 0) fetch<1>(codes + c);
      S16 code = __builtin_convertvector(load<C16>(codes + c), S16);  // the sign everywhere above
      S16 values = code << (8 - SHIFT) & short(MASK >> 16);
      memcpy(to + c, &values, sizeof values);
    }
  }
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
  T *data() { return (T *)lines.data(); }
  const T *data() const { return (const T *)lines.data(); }
};

// In which order a layer reads its inputs: a format, or one of those that follow them
inline int order_of(const Linear &l) {
  if (l.format == INT4 && l.rounding) return INT4_BYTES;
  if (l.format == INT8 && l.rounding != TOKEN) return l.rounding == BLOCKS ? INT8_BLOCKS : INT8_FLOATS;
  return l.format;
}

// The inputs of a matrix [M, in] in each order that they are read in
struct Input {
  int rows = 0, columns = 0;
  const bf16 *x = nullptr;
  Buffer<Bf16Dot::Value> bf16s;
  Buffer<Int8Dot::Value> int8s;
  Buffer<Int8BlockDot::Block> int8_blocks;
  Buffer<Int4Dot::Value> int4s;
  Buffer<Int4ByteDot::Span> int4_bytes;
  Buffer<E4m3Dot::Value> e4m3s;
  Buffer<E5m2Dot::Value> e5m2s;
  Buffer<float> scales, e4m3_scales;

  void set(const bf16 *values, int m, int n) { x = values, rows = m, columns = n; }
  size_t int4_stride() const { return size_t(columns) / Int4Dot::SPAN * Int4Dot::VALUES; }
  // how many of them stay in the cache while the matrix goes by
  int block_rows() const { return std::max(12, int(IN_CACHE / (sizeof(float) * columns)) / 12 * 12); }
  void reserve(int order) {
    const size_t count = size_t(rows) * columns;
    if (order == BF16 || order == INT8_FLOATS) bf16s.of(count);
    if (order == INT8_BLOCKS) int8_blocks.of(count / 32);
    if (order == INT8) scales.of(rows), int8s.of(count);
    if (order == INT4) int4s.of(rows * int4_stride());
    if (order == INT4_BYTES) int4_bytes.of(count / Int4ByteDot::SPAN);
    if (order == E4M3) e4m3_scales.of(rows), e4m3s.of(count);
    if (order == E5M2) e5m2s.of(count);
  }
  // Rows [first, last), for which there is room
  void arrange(const Linear &l, int first, int last) {
    const size_t n = columns;
    for (int m = first; m < last; ++m) {
      const bf16 *row = x + m * n;
      if (l.format == BF16 || order_of(l) == INT8_FLOATS) Bf16Dot::arrange(row, columns, bf16s.data() + m * n);
      if (order_of(l) == INT8_BLOCKS) Int8BlockDot::arrange(row, columns, int8_blocks.data() + m * n / 32);
      if (order_of(l) == INT8) scales.data()[m] = Int8Dot::arrange(row, columns, int8s.data() + m * n);
      if (l.format == E4M3) {
        float scale = 1.0f;
        if (l.rounding == STATIC) scale = l.input_scale;
        if (l.rounding == TOKEN) scale = largest_of(row, columns) / 448.0f;
        if (scale == 0.0f) scale = 1.0f;
        e4m3_scales.data()[m] = scale;
        E4m3Dot::arrange(row, columns, l.rounding != NONE, scale, e4m3s.data() + m * n);
      }
      if (l.format == E5M2) E5m2Dot::arrange(row, columns, false, 1.0f, e5m2s.data() + m * n);
      if (order_of(l) == INT4) Int4Dot::arrange(row, columns, int4s.data() + m * int4_stride());
      if (order_of(l) == INT4_BYTES)
        Int4ByteDot::arrange(row, columns, l.rounding == TOKEN, int4_bytes.data() + m * n / Int4ByteDot::SPAN);
    }
  }
};

// Calls body(first, count) for blocks of N rows, then smaller ones
template <int N, class Body> void in_blocks(int rows, Body body, int m = 0) {
  for (; m + N <= rows; m += N) body(m, std::integral_constant<int, N>());
  if constexpr (N > 1) in_blocks<(N + 1) / 2>(rows, body, m);
}

inline int tiles(const Linear &l) { return (l.out + TILE - 1) / TILE; }

// Sums of one tile's rows of each format for some inputs. Functions of their own: in one of all formats GCC
// runs out of registers, and one input takes a fifth (bf16) to a third (INT8) longer.
#define APART __attribute__((noinline))

APART void multiply_bf16(const Linear &l, const int *rows, const Bf16Dot::Value *x, int count, F8 *y) {
  const size_t n = l.in;
  const bf16 *w[TILE];
  for (int r = 0; r < TILE; ++r) w[r] = (const bf16 *)l.weight + rows[r] * n;
  in_blocks<Bf16Dot::MOST>(count, [&](int m, auto N) { Bf16Dot::dot<N.value>(w, l.in, x + m * n, n, y + m, !m); });
}

APART void multiply_int8(const Linear &l, const int *rows, const Int8Dot::Value *x, const float *scales, int count,
                         F8 *y) {
  const size_t n = l.in;
  const int8_t *w[TILE];
  F8 scale;
  I8 offset;
  for (int r = 0; r < TILE; ++r) {
    w[r] = (const int8_t *)l.weight + rows[r] * n;
    scale[r] = ((const float *)l.scale)[rows[r]];
    offset[r] = Int8Dot::OFFSET * l.sums[rows[r]];
  }
  in_blocks<Int8Dot::MOST>(count, [&](int m, auto N) {
    I8 product[N.value];
    Int8Dot::dot<N.value>(w, l.in, x + m * n, n, product, !m);
    for (int i = 0; i < N.value; ++i)
      y[m + i] = __builtin_convertvector(product[i] - offset, F8) * all(scales[m + i]) * scale;
  });
}

APART void multiply_int8_blocks(const Linear &l, const int *rows, const Int8BlockDot::Block *x, int count, F8 *y) {
  const size_t n = l.in;
  const int8_t *w[TILE];
  F8 scale;
  for (int r = 0; r < TILE; ++r) {
    w[r] = (const int8_t *)l.weight + rows[r] * n;
    scale[r] = ((const float *)l.scale)[rows[r]];
  }
  in_blocks<Int8BlockDot::MOST>(count, [&](int m, auto N) {
    Int8BlockDot::dot<N.value>(w, l.in, x + m * n / 32, y + m, !m);
  });
  for (int m = 0; m < count; ++m) y[m] = y[m] * scale;
}

// Scales may be null. For many inputs the codes become bf16 once, before: the same products in the same order.
template <class Dot>
APART void multiply_decoded(const Linear &l, const int *rows, const typename Dot::Value *x, const float *scales, int count,
                        F8 *y) {
  const size_t n = l.in;
  const uint8_t *codes[TILE];
  F8 scale;
  for (int r = 0; r < TILE; ++r) {
    codes[r] = (const uint8_t *)l.weight + rows[r] * n;
    scale[r] = ((const float *)l.scale)[rows[r]];
  }
  if (count > MOST_DECODED) {
    static thread_local Buffer<bf16> expanded;
    const bf16 *w[TILE];
    for (int r = 0; r < TILE; ++r) {
      w[r] = expanded.of(TILE * n) + r * n;
      Dot::expand(codes[r], n, expanded.data() + r * n);
    }
    in_blocks<Bf16Dot::MOST>(count, [&](int m, auto N) {
      Bf16Dot::dot<N.value>(w, n, x + m * n, n, y + m, false);
    });
    for (int m = 0; m < count; ++m) y[m] = Dot::made(y[m]);
  } else {
    in_blocks<MOST_DECODED>(count, [&](int m, auto N) {
      dot_decoded<Dot, N.value>(codes, n, x + m * n, n, y + m, !m);
    });
  }
  for (int m = 0; m < count; ++m) y[m] = y[m] * all(scales ? scales[m] : 1.0f) * scale;
}

APART void multiply_int4(const Linear &l, const int *rows, const Int4Dot::Value *x, size_t stride, int count, F8 *y) {
  in_blocks<Int4Dot::MOST>(count, [&](int m, auto N) {
    Int4Dot::dot<N.value>(l, rows, x + m * stride, stride, y + m, !m);
  });
}

APART void multiply_int4_bytes(const Linear &l, const int *rows, const Int4ByteDot::Span *x, int count, F8 *y) {
  const size_t stride = l.in / Int4ByteDot::SPAN;
  in_blocks<Int4ByteDot::MOST>(count, [&](int m, auto N) {
    Int4ByteDot::dot<N.value>(l, rows, x + m * stride, stride, y + m, !m);
  });
}

// Outputs [count] of one tile's rows for the inputs from `from` on, rounded to bf16 unless they are `exact`.
// Rows past the last are the last again.
void multiply(const Linear &l, int tile, const Input &in, int from, int count, F8 *y, bool exact = false) {
  int rows[TILE];
  for (int r = 0; r < TILE; ++r) rows[r] = std::min(tile * TILE + r, l.out - 1);
  const size_t at = size_t(from) * l.in;
  switch (order_of(l)) {
  case BF16: multiply_bf16(l, rows, in.bf16s.data() + at, count, y); break;
  case INT8: multiply_int8(l, rows, in.int8s.data() + at, in.scales.data() + from, count, y); break;
  case E4M3: multiply_decoded<E4m3Dot>(l, rows, in.e4m3s.data() + at, in.e4m3_scales.data() + from, count, y); break;
  case E5M2: multiply_decoded<E5m2Dot>(l, rows, in.e5m2s.data() + at, nullptr, count, y); break;
  case INT8_FLOATS: multiply_decoded<Int8FloatDot>(l, rows, in.bf16s.data() + at, nullptr, count, y); break;
  case INT8_BLOCKS: multiply_int8_blocks(l, rows, in.int8_blocks.data() + at / 32, count, y); break;
  case INT4: {
    const size_t stride = in.int4_stride();
    multiply_int4(l, rows, in.int4s.data() + from * stride, stride, count, y);
    break;
  }
  default: multiply_int4_bytes(l, rows, in.int4_bytes.data() + at / Int4ByteDot::SPAN, count, y);
  }
  if (l.bias) {
    F8 bias;
    for (int r = 0; r < TILE; ++r) bias[r] = to_float(l.bias[rows[r]]);
    // F.linear adds the bias before it rounds, the quantized layers after
    for (int m = 0; m < count; ++m) y[m] = (l.format == BF16 || exact ? y[m] : round8(y[m])) + bias;
  }
  for (int m = 0; m < count && !exact; ++m) y[m] = round8(y[m]);
}

inline void write(bf16 *y, const F8 &x, int lanes) {
  if (lanes == TILE) return write8(y, x);
  for (int r = 0; r < lanes; ++r) y[r] = to_bf16(x[r]);
}
inline void write(float *y, const F8 &x, int lanes) { memcpy(y, &x, lanes * sizeof *y); }

// Outputs of a tile's rows to y [count, width]
template <class T> void write_tile(const Linear &l, int tile, const F8 *out, int count, size_t width, T *y) {
  const int lanes = std::min(TILE, l.out - tile * TILE);
  y += tile * TILE;
  for (int m = 0; m < count; ++m, y += width) write(y, out[m], lanes);
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
#elif defined(__aarch64__)
      __asm__ volatile("yield");
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

// The residual stream [M, hidden], the next matrix's inputs, and what a mixture adds; of each thread, or of all
struct Rows {
  Buffer<bf16> x, y, mixed;
  Input in;
};

// What threads hand each other: [M, ...]
struct Shared {
  bf16 *qkv, *turned, *attended, *delta, *act;  // turned: q after norm and RoPE
  bf16 *routed, *made;  // of the router [M, experts]; of the experts [M · chosen, hidden]
  const int32_t *sequence;  // [M]
  Rows *rows;  // null: each thread has its own
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
  Rows rows;
  Buffer<bf16> z;
  Buffer<Bf16Dot::Value> query;
  Buffer<float> scores;
  Buffer<F8> tile;
  Buffer<size_t> offsets;
  Routing routing;
  Buffer<bf16> gathered;
  Input own;  // of one expert, or of the head
};

// What a norm over n numbers multiplies them with before its weight
float rms_factor(const bf16 *x, int n, float eps) {
  F8 squares = all(0.0f);
  for (int c = 0; c < n; c += 8) squares = fused(read8(x + c), read8(x + c), squares);
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
  Rows &state = shared.rows ? *shared.rows : s.rows;
  const bool together = shared.rows != nullptr;
  const int first_row = together ? int64_t(batch.rows) * thread / threads : 0;
  const int last_row = together ? int64_t(batch.rows) * (thread + 1) / threads : batch.rows;
  bool ready[ORDERS] = {};  // what the state's inputs are arranged for

  void next_input(const bf16 *x, int columns) {
    if (!together || !thread) state.in.set(x, batch.rows, columns);
    if (together) shared.barrier.wait(threads);
    std::fill(ready, ready + ORDERS, false);
  }

  // The state's inputs, as these layers read them
  void prepare(std::initializer_list<const Linear *> parts) {
    bool any = false;
    for (auto *part : parts) {
      if (ready[order_of(*part)]) continue;
      ready[order_of(*part)] = any = true;
      if (!together) state.in.reserve(order_of(*part));
      state.in.arrange(*part, first_row, last_row);
    }
    if (together && any) shared.barrier.wait(threads);
  }

  // Calls body(first, count) for blocks of rows whose inputs stay in the cache
  template <class Body> void in_cache(const Input &in, Body body) const {
    const int most = in.block_rows();
    for (int first = 0; first < in.rows; first += most) body(first, std::min(most, in.rows - first));
  }

  // Calls body(tile) for this thread's share
  template <class Body> void share(int count, Body body) const {
    int end = int64_t(count) * (thread + 1) / threads;
    for (int i = int64_t(count) * thread / threads; i < end; ++i) body(i);
  }

  // y [M, all parts' outputs] of layers that share the input
  void project(std::initializer_list<const Linear *> parts, bf16 *y) {
    prepare(parts);
    project(parts, state.in, y);
  }
  void project(std::initializer_list<const Linear *> parts, const Input &in, bf16 *y) {
    int tiles_of_all = 0;
    size_t width = 0;
    for (auto *part : parts) tiles_of_all += tiles(*part), width += part->out;
    in_cache(in, [&](int first, int count) {
      share(tiles_of_all, [&](int tile) {
        bf16 *to = y + first * width;
        auto part = parts.begin();
        for (; tile >= tiles(**part); ++part) tile -= tiles(**part), to += (*part)->out;
        product(**part, tile, in, first, count, width, to);
      });
    });
  }

  // One tile of a layer's outputs for some rows, to y [count, width]
  void product(const Linear &l, int tile, const Input &in, int first, int count, size_t width, bf16 *y) {
    F8 *out = s.tile.of(count);
    multiply(l, tile, in, first, count, out);
    write_tile(l, tile, out, count, width, y);
  }

  void gate_up(const Layer &layer) {
    prepare({&layer.gate, &layer.up});
    in_cache(state.in, [&](int first, int count) {
      share(tiles(layer.gate), [&](int tile) {
        gated(layer.gate, layer.up, tile, state.in, first, count, shared.act);
      });
    });
  }

  // One tile of what `down` reads, to act [rows, intermediate]
  void gated(const Linear &gate, const Linear &up, int tile, const Input &in, int from, int count, bf16 *act) {
    F8 *first = s.tile.of(2 * count), *second = first + count;
    multiply(gate, tile, in, from, count, first);
    multiply(up, tile, in, from, count, second);
    act += size_t(from) * model.intermediate + tile * TILE;
    for (int m = 0; m < count; ++m, act += model.intermediate) {
      F8 inner = first[m];
      if (model.gelu)  // the tanh form, as a sigmoid
        inner = all(1.5957691216057308f) * (inner + all(0.044715f) * inner * inner * inner);
      F8 active = round8(first[m] / (all(1.0f) + exp8(-inner)));
      write8(act, active * second[m]);
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

  // The rows of an expert's slots as its inputs
  void own_rows(const bf16 *x, int count, int columns, std::initializer_list<const Linear *> readers) {
    s.own.set(x, count, columns);
    bool done[ORDERS] = {};
    for (auto *l : readers) {
      if (done[order_of(*l)]) continue;
      done[order_of(*l)] = true;
      s.own.reserve(order_of(*l));
      s.own.arrange(*l, 0, count);
    }
  }

  void experts(const Layer &layer) {
    const size_t n = model.hidden, inner = model.intermediate;
    project({&layer.router}, shared.routed);
    shared.barrier.wait(threads);
    route();
    const int32_t *rows = s.routing.rows.data();
    share_experts(tiles(layer.experts[0]), [&](int expert, int first, int count) {
      bf16 *x = s.gathered.of(count * n);
      for (int i = 0; i < count; ++i) memcpy(x + i * n, state.in.x + rows[first + i] * n, n * sizeof *x);
      own_rows(x, count, n, {layer.experts + 3 * expert, layer.experts + 3 * expert + 1});
    }, [&](int expert, int first, int tile) {
      const Linear *parts = layer.experts + 3 * expert;
      gated(parts[0], parts[1], tile, s.own, 0, s.own.rows, shared.act + first * inner);
    });
    shared.barrier.wait(threads);
    share_experts(tiles(layer.experts[2]), [&](int expert, int first, int count) {
      own_rows(shared.act + first * inner, count, inner, {layer.experts + 3 * expert + 2});
    }, [&](int expert, int first, int tile) {
      product(layer.experts[3 * expert + 2], tile, s.own, 0, s.own.rows, n, shared.made + first * n);
    });
    shared.barrier.wait(threads);
    mix();
  }

  // The sum of what each row's experts made, times their shares, in the order of their numbers
  void mix() {
    const int n = model.hidden, chosen = model.chosen;
    for (int m = first_row; m < last_row; ++m)
      for (int i = 0; i < chosen; ++i) {
        bf16 *out = state.mixed.data() + size_t(m) * n;
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

  // q of each row turned, k turned and v to their cache slots
  void turn_all(const Layer &layer) {
    const int n = model.head_dim, heads = model.heads, kv_heads = model.kv_heads;
    share(batch.rows * (heads + kv_heads), [&](int task) {
      const int m = task / (heads + kv_heads), head = task % (heads + kv_heads), position = batch.positions[m];
      const bf16 *qkv = shared.qkv + size_t(m) * (heads + 2 * kv_heads) * n;
      if (head < heads) {
        bf16 *q = shared.turned + (size_t(m) * heads + head) * n;
        return turn(layer, qkv, head, heads, layer.q_norm, position, q);
      }
      const int kv = head - heads;
      const size_t at = (size_t(batch.slots[m]) * kv_heads + kv) * n;
      turn(layer, qkv + heads * n, kv, kv_heads, layer.k_norm, position, layer.keys + at);
      memcpy(layer.values + at, qkv + (heads + kv_heads + kv) * n, n * sizeof *qkv);
    });
  }

  void attend(const Layer &layer) {
    // shares of about as many cached tokens; with many rows the heads of a group go together
    const int group = model.heads / model.kv_heads, each = together ? group : 1;
    auto cost = [&](int m) { return int64_t(batch.positions[m]) + 33; };
    int64_t total = 0, before = 0;
    for (int m = 0; m < batch.rows; ++m) total += model.heads / each * cost(m);
    for (int m = 0; m < batch.rows; ++m)
      for (int h = 0; h < model.heads; h += each, before += cost(m)) {
        if ((before + cost(m) / 2) * threads / total != thread) continue;
        in_blocks<3>(each, [&](int first, auto N) { attend<N.value>(layer, m, h + first); });
      }
  }

  // N heads of one group
  template <int N> void attend(const Layer &layer, int m, int head) {
    const int n = model.head_dim, context = batch.positions[m] + 1;
    const int first = layer.window ? std::max(0, context - layer.window) : 0, count = context - first;
    const int padded = (count + 7) / 8 * 8, kv = head / (model.heads / model.kv_heads);
    const size_t *offsets = s.offsets.data() + size_t(shared.sequence[m]) * longest + first;
    auto *query = s.query.of(N * n);
    const bf16 *q = shared.turned + (size_t(m) * model.heads + head) * n;
    for (int h = 0; h < N; ++h) Bf16Dot::arrange(q + h * n, n, query + h * n);
    float *scores = s.scores.of(N * padded);
    for (int i = 0; i < padded; i += TILE) {
      const bf16 *w[TILE];
      for (int r = 0; r < TILE; ++r) w[r] = layer.keys + offsets[std::min(i + r, count - 1)] + kv * n;
      F8 eight[N];
      Bf16Dot::dot<N>(w, n, query, n, eight, false);
      for (int h = 0; h < N; ++h) store(scores + h * padded + i, eight[h]);
    }
    F8 share[N];
    for (int h = 0; h < N; ++h) share[h] = all(1.0f / softmax(scores + h * padded, count));
    bf16 *out = shared.attended + (size_t(m) * model.heads + head) * n;
    auto average = [&](int c, auto width) {
      F8 acc[N][width.value] = {};
      for (int i = 0; i < count; ++i) {
        const bf16 *value = layer.values + offsets[i] + kv * n + c;
        UNROLL for (int j = 0; j < width.value; ++j) {
          F8 eight = read8(value + 8 * j);
          UNROLL for (int h = 0; h < N; ++h) acc[h][j] = fused(all(scores[h * padded + i]), eight, acc[h][j]);
        }
      }
      for (int h = 0; h < N; ++h)
        for (int j = 0; j < width.value; ++j) write8(out + h * n + c + 8 * j, acc[h][j] * share[h]);
    };
    constexpr int WIDTH = N == 1 ? 8 : 4;
    int c = 0;
    for (; c + 8 * WIDTH <= n; c += 8 * WIDTH) average(c, std::integral_constant<int, WIDTH>());
    for (; c < n; c += 16) average(c, std::integral_constant<int, 2>());
  }

  // Scores become their exponentials against the largest; returns their sum
  float softmax(float *scores, int count) const {
    const int padded = (count + 7) / 8 * 8;
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
    return sum(sums);
  }

  // Where each cached token of each sequence is, in a layer's keys and values
  void find_cached() {
    size_t *offsets = s.offsets.of(size_t(batch.sequences) * longest);
    for (int i = 0; i < batch.sequences; ++i)
      for (int at = 0; at <= batch.positions[batch.starts[i + 1] - 1]; ++at) {
        size_t block = batch.tables[size_t(i) * batch.width + at / model.block_size];
        size_t slot = block * model.block_size + at % model.block_size;
        offsets[size_t(i) * longest + at] = slot * model.kv_heads * model.head_dim;
      }
  }

  // x += delta, which goes through the norm `between` first, if any; then its norm, if any, is the next input
  void add_norm(const bf16 *delta, const void *between, const void *weight) {
    const int n = model.hidden;
    const bool wide = model.norms_in_float32;
    bf16 *z = s.z.of(n);
    const F8 times = all(model.times_residual);
    for (int m = first_row; m < last_row; ++m) {
      bf16 *x = state.x.data() + size_t(m) * n, *y = state.y.data() + size_t(m) * n;
      if (delta) {
        const bf16 *d = delta + size_t(m) * n;
        if (between) weighted(d, rms_factor(d, n, model.eps), between, 0, wide, n, z), d = z;
        for (int i = 0; i < n; i += 8) write8(x + i, read8(x + i) + round8(read8(d + i) * times));
      }
      if (weight) weighted(x, rms_factor(x, n, model.eps), weight, 0, wide, n, y);
    }
    next_input(weight ? state.y.data() : state.x.data(), n);
  }

  void run() {
    const size_t n = model.hidden;
    find_cached();
    if (!together) {
      state.x.of(batch.rows * n), state.y.of(batch.rows * n);
      if (model.experts) state.mixed.of(batch.rows * n);
    }
    const bf16 *delta = nullptr;  // what the last MLP adds
    for (int m = first_row; m < last_row; ++m)
      std::copy_n(batch.entering + m * n, n, state.x.data() + m * n);
    for (int i = 0; i < model.num_layers; ++i) {
      const Layer &layer = model.layers[i];
      add_norm(delta, i ? model.layers[i - 1].mlp_out_norm : nullptr, layer.input_norm);
      project({&layer.q, &layer.k, &layer.v}, shared.qkv);
      shared.barrier.wait(threads);
      turn_all(layer);
      shared.barrier.wait(threads);
      attend(layer);
      shared.barrier.wait(threads);
      next_input(shared.attended, model.heads * model.head_dim);
      project({&layer.out}, shared.delta);
      shared.barrier.wait(threads);
      add_norm(shared.delta, layer.attention_out_norm, layer.post_norm);
      if (layer.experts) {
        experts(layer);
        delta = state.mixed.data();
        continue;
      }
      gate_up(layer);
      shared.barrier.wait(threads);
      next_input(shared.act, model.intermediate);
      project({&layer.down}, shared.delta);
      shared.barrier.wait(threads);
      delta = shared.delta;
    }
    add_norm(delta, model.layers[model.num_layers - 1].mlp_out_norm, model.final_norm);
    head();
  }

  // Logits after the last row of each sequence, and all rows' hidden states where they are asked for
  void head() {
    const size_t n = model.hidden, vocab = model.head.out;
    const bf16 *y = state.in.x;
    if (batch.hidden)
      for (int m = first_row; m < last_row; ++m)
        if (together || !thread) memcpy(batch.hidden + m * n, y + m * n, n * sizeof *y);
    bf16 *last = s.gathered.of(batch.sequences * n);
    for (int i = 0; i < batch.sequences; ++i) memcpy(last + i * n, y + (batch.starts[i + 1] - 1) * n, n * sizeof *y);
    own_rows(last, batch.sequences, n, {&model.head});
    project({&model.head}, s.own, batch.logits);
    if (model.logits_by == 1) return;
    shared.barrier.wait(threads);
    for (int m = thread; m < batch.sequences; m += threads)  // whole rows are shared out
      for (size_t i = 0; i < vocab; ++i) {
        bf16 *logit = batch.logits + m * vocab + i;
        *logit = to_bf16(to_float(*logit) / model.logits_by);
      }
  }

  static void scaled(const bf16 *x, F8 times, size_t n, bf16 *y) {
    for (size_t i = 0; i < n; i += 8) write8(y + i, read8(x + i) * times);
  }
};

// Room for the rows of all threads: every format that a layer reads, and its widest inputs
void reserve(const Model &model, int rows, Rows &state) {
  const size_t n = model.hidden;
  state.x.of(rows * n), state.y.of(rows * n);
  if (model.experts) state.mixed.of(rows * n);
  for (int i = 0; i < model.num_layers; ++i) {
    const Layer &layer = model.layers[i];
    for (auto *l : {&layer.q, &layer.k, &layer.v, &layer.out, &layer.gate, &layer.up, &layer.down, &layer.router}) {
      state.in.set(nullptr, rows, l->in);
      if (l->weight) state.in.reserve(order_of(*l));
    }
  }
}

}  // namespace

extern "C" void decode_step(const Model *model, const Batch *batch) {
  static thread_local Buffer<bf16> buffers[7];
  static thread_local Buffer<int32_t> sequence;
  static thread_local Rows rows;
  const size_t m = batch->rows, d = model->head_dim, paths = m * std::max(1, model->chosen);
  const bool together = m >= TOGETHER;
  if (together) reserve(*model, m, rows);
  int longest = 0;
  for (int i = 0; i < batch->sequences; ++i) {
    std::fill(sequence.of(m) + batch->starts[i], sequence.of(m) + batch->starts[i + 1], i);
    longest = std::max(longest, batch->positions[batch->starts[i + 1] - 1] + 1);
  }
  Shared shared{
      buffers[0].of(m * (model->heads + 2 * model->kv_heads) * d), buffers[1].of(m * model->heads * d),
      buffers[2].of(m * model->heads * d), buffers[3].of(m * model->hidden),
      buffers[4].of(paths * model->intermediate), buffers[5].of(m * model->experts),
      buffers[6].of(model->experts ? paths * model->hidden : 0), sequence.data(),
      together ? &rows : nullptr, {}};
#pragma omp parallel num_threads(model->threads)
  {
    static thread_local Scratch scratch;
    Worker{*model, *batch, shared, scratch, omp_get_thread_num(), omp_get_num_threads(), longest}.run();
  }
}

// Maps memory in pages of 2 MB where the system can; reading all weights misses a small page's entry 65
// thousand times a step. What cannot be moved stays as it is. It takes two seconds for each GB, so a thread does
// it, one that Python does not know: the interpreter may end, and the weights may go, while it works.
extern "C" void use_huge_pages(const uintptr_t *begins, const int64_t *bytes, int32_t count) {
#if defined(__linux__)
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (int i = 0; i < count; ++i) ranges.emplace_back(begins[i], begins[i] + bytes[i]);
  std::thread([ranges] {
    constexpr uintptr_t PAGE = 2 << 20, COLLAPSE = 25;  // MADV_COLLAPSE, Linux 6.1
    for (const auto &[begin, end] : ranges)
      for (uintptr_t at = begin / PAGE * PAGE; at < end; at += PAGE) madvise((void *)at, PAGE, COLLAPSE);
  }).detach();
#endif
}

// y [rows, out] = x [rows, in] through one layer, with the products and sums of a step; bf16, or float if exact
extern "C" void multiply_rows(const Linear *l, const bf16 *x, int32_t rows, void *y, int32_t exact, int32_t threads) {
  static thread_local Input inputs;
  Input &in = inputs;
  in.set(x, rows, l->in);
  in.reserve(order_of(*l));
  const int most = in.block_rows(), blocks = (rows + most - 1) / most;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer<F8> out;
#pragma omp for
    for (int m = 0; m < rows; ++m) in.arrange(*l, m, m + 1);
#pragma omp for schedule(static)
    for (int task = 0; task < blocks * tiles(*l); ++task) {
      const int first = task / tiles(*l) * most, tile = task % tiles(*l), count = std::min(most, rows - first);
      const size_t at = size_t(first) * l->out;
      multiply(*l, tile, in, first, count, out.of(count), exact);
      if (exact) write_tile(*l, tile, out.data(), count, l->out, (float *)y + at);
      else write_tile(*l, tile, out.data(), count, l->out, (bf16 *)y + at);
    }
  }
}
