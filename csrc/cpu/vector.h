// One register of lanes, in GCC/Clang vector extensions: the compiler maps the same source to AVX-512, AVX2, SSE2 or NEON.
//
// This header and everything that includes it is compiled once per instruction set, in a namespace of its own (MRF_ISA), and uses no
// inline function of the standard library: the linker could otherwise keep the AVX-512 copy of it for every processor.
#pragma once

#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MRF_INLINE inline __attribute__((always_inline))

namespace mrf {
namespace MRF_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T>
constexpr int kLanes = kRegisterBytes / sizeof(T);

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <int Bytes> struct IntegerOf;
template <> struct IntegerOf<4> { using type = int32_t; };
template <> struct IntegerOf<8> { using type = int64_t; };

// V<T>: one register of float or double. I<T>: integers of the same width, as bits, or as a mask (0 or -1 per lane).
template <class T> using V = typename VectorOf<T, kLanes<T>>::type;
template <class T> using I = typename VectorOf<typename IntegerOf<sizeof(T)>::type, kLanes<T>>::type;
using Words = VectorOf<uint32_t, kLanes<float>>::type;

template <class T> MRF_INLINE V<T> broadcast(T x) { return x - V<T>{}; }
template <class T> MRF_INLINE V<T> load(const T* p) { return *reinterpret_cast<const typename VectorOf<T, kLanes<T>>::unaligned*>(p); }
template <class T> MRF_INLINE void store(T* p, V<T> x) { *reinterpret_cast<typename VectorOf<T, kLanes<T>>::unaligned*>(p) = x; }
template <class T> MRF_INLINE V<T> select(I<T> mask, V<T> a, V<T> b) { return mask ? a : b; }
template <class T> MRF_INLINE V<T> maximum(V<T> a, V<T> b) { return a > b ? a : b; }  // b where either is NaN

template <class T>
MRF_INLINE bool all_lanes(I<T> mask) {
  typename IntegerOf<sizeof(T)>::type all = -1;
  for (int i = 0; i < kLanes<T>; ++i) all &= mask[i];
  return all != 0;
}

template <class T>
MRF_INLINE bool any_greater(V<T> a, V<T> b) {  // not where either is NaN
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_epi8((__m256i)(a > b)) != 0;
#else
  return !all_lanes<T>(~(I<T>)(a > b));
#endif
}

// x as it is, rounded to T: the compiler may not fuse the product that it is with what comes after.
template <class T>
MRF_INLINE V<T> rounded(V<T> x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// a * b + c, rounded once where the instruction set can, and everywhere in the same way: the compiler's own choice of what it fuses could
// differ between two sums that must come out equal.
template <class T>
MRF_INLINE V<T> fused(V<T> a, V<T> b, V<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (V<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (V<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 4) return (V<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (V<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return rounded<T>(a * b) + c;
#endif
}

template <class T>
MRF_INLINE T sum_of_lanes(V<T> x) {  // in a fixed order
  T lanes[kLanes<T>];
  store<T>(lanes, x);
  for (int step = kLanes<T> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// ---- storage types: widened once when loaded, narrowed once (to nearest even) when stored ----

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class T> using HalfWords = typename VectorOf<uint16_t, kLanes<T>>::unaligned;

template <class T, class Storage> struct Convert;

template <class T>
struct Convert<T, T> {
  static MRF_INLINE V<T> load(const T* p) { return MRF_ISA::load(p); }
  static MRF_INLINE void store(T* p, V<T> x) { MRF_ISA::store(p, x); }
};

template <>
struct Convert<float, bfloat16> {
  static MRF_INLINE V<float> load(const bfloat16* p) {
#if defined(__AVX512F__)
    return (V<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    return (V<float>)(__builtin_convertvector(*reinterpret_cast<const HalfWords<float>*>(p), Words) << 16);
#endif
  }
  static MRF_INLINE void store(bfloat16* p, V<float> x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words quiet_nan = (bits >> 16) | 0x40u;
    *reinterpret_cast<HalfWords<float>*>(p) = __builtin_convertvector(x == x ? rounded : quiet_nan, HalfWords<float>);
  }
};

template <>
struct Convert<float, float16> {
  static MRF_INLINE V<float> load(const float16* p) {
#if defined(__AVX512F__)
    return (V<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (V<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    // Shift exponent and mantissa into place and rescale by 2^112: exact, also for denormals; then mend infinity and NaN.
    const Words bits = __builtin_convertvector(*reinterpret_cast<const HalfWords<float>*>(p), Words);
    const V<float> scaled = (V<float>)((bits & 0x7fffu) << 13) * 0x1p112f;
    const Words special = (Words)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (V<float>)((Words)scaled | special | (bits & 0x8000u) << 16);
#endif
  }
  static MRF_INLINE void store(float16* p, V<float> x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    const Words bits = (Words)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal: round the mantissa to 10 bits. Denormal: adding 0.5 leaves the mantissa in units of 2^-24, rounded by the adder.
    const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const Words denormal = (Words)((V<float>)magnitude + 0.5f) - 0x3f000000u;
    Words half = magnitude < (113u << 23) ? denormal : normal;
    half = magnitude >= 0x477ff000u ? (Words)(Words{} + 0x7c00u) : half;
    half = magnitude > 0x7f800000u ? (Words)(Words{} + 0x7e00u) : half;
    *reinterpret_cast<HalfWords<float>*>(p) = __builtin_convertvector(half | sign, HalfWords<float>);
#endif
  }
};

// Stores around the caches, for results that nobody reads soon: saves reading the line first. `p` is aligned to the size of the data.
template <class T, class Storage>
MRF_INLINE void stream(Storage* p, V<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Storage) == sizeof(T)) {
    _mm512_stream_si512((__m512i*)p, (__m512i)x);
  } else {
    alignas(32) Storage narrow[kLanes<T>];
    Convert<T, Storage>::store(narrow, x);
    _mm256_stream_si256((__m256i*)p, *(const __m256i*)narrow);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Storage) == sizeof(T)) {
    _mm256_stream_si256((__m256i*)p, (__m256i)x);
  } else {
    alignas(16) Storage narrow[kLanes<T>];
    Convert<T, Storage>::store(narrow, x);
    _mm_stream_si128((__m128i*)p, *(const __m128i*)narrow);
  }
#else
  Convert<T, Storage>::store(p, x);
#endif
}

// Makes streamed stores visible to the thread that reads the result.
MRF_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

MRF_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- transpose of an N x N block of registers, in place ----

// Pieces of 16 bytes, which most shuffles do not cross. Of two registers, element by element: the low or the high halves of their pieces,
// interleaved; or their even or odd pieces, one after the other.
template <class T> constexpr int kPiece = 16 / sizeof(T);

template <class T, int High, int... K>
MRF_INLINE V<T> interleave_halves(V<T> a, V<T> b, std::integer_sequence<int, K...>) {
  constexpr int piece = kPiece<T>;
  return __builtin_shufflevector(a, b, (K / piece * piece + High * piece / 2 + K % piece / 2 + K % 2 * kLanes<T>)...);
}
template <class T, int Odd, int... K>
MRF_INLINE V<T> alternate_pieces(V<T> a, V<T> b, std::integer_sequence<int, K...>) {
  constexpr int piece = kPiece<T>;
  return __builtin_shufflevector(a, b, ((2 * (K / piece) + Odd) * piece + K % piece)...);
}

// Each round exchanges a bit of the register's number with one of the lane's: first those within a piece, the higher ones first, then those
// of the piece, the lower ones first.
template <class T>
MRF_INLINE void transpose(V<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, n>{};
  const auto exchange = [&](int step, auto low, auto high) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int k = 0; k < n / 2; ++k) {
      V<T>&a = rows[k / step * 2 * step + k % step], &b = rows[k / step * 2 * step + k % step + step];
      const V<T> first = low(a, b);
      b = high(a, b), a = first;
    }
  };
#pragma GCC unroll 4
  for (int step = kPiece<T> / 2; step >= 1; step /= 2)
    exchange(step, [&](V<T> a, V<T> b) { return interleave_halves<T, 0>(a, b, lanes); },
             [&](V<T> a, V<T> b) { return interleave_halves<T, 1>(a, b, lanes); });
#pragma GCC unroll 4
  for (int step = kPiece<T>; step < n; step *= 2)
    exchange(step, [&](V<T> a, V<T> b) { return alternate_pieces<T, 0>(a, b, lanes); },
             [&](V<T> a, V<T> b) { return alternate_pieces<T, 1>(a, b, lanes); });
}

}  // namespace MRF_ISA
}  // namespace mrf
