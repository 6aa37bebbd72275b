// exp2, log, sin/cos of full turns, and Philox4x32-10 normals on registers of lanes.
//
// log is within 2 ULP over its range and exp2 within 3 (tests/test_native_elementary.py sweeps them); the polynomials are minimax fits.
// That of exp2 in float is the cheapest that reaches the precision of the type (relative error 2^-23.5): the exponentials are most of
// the arithmetic.
#pragma once

#include "vector.h"

namespace mrf {
namespace MRF_ISA {

template <class T, int N>
MRF_INLINE V<T> polynomial(V<T> x, const T (&c)[N]) {  // Horner, c[0] + c[1] x + ...
  V<T> y = broadcast(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

template <class T> struct Constants;

template <>
struct Constants<float> {
  static constexpr int mantissa = 23, bias = 127, trigonometric_terms = 6;
  static constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr float lowest = -126.5f;   // exp2 of less is 0
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float exp2[] = {0.693151311817609790f, 0.240164450039272943f, 0.0557999134252242838f, 0.00901702996252961276f,
                                   0.00186713021195126332f};
  static constexpr float log[] = {0.666666656371125332f, 0.400003372508281584f, 0.285371679602035548f, 0.235849879602600841f};
};

template <>
struct Constants<double> {
  static constexpr int mantissa = 52, bias = 1023, trigonometric_terms = 10;
  static constexpr double round = 0x1.8p52, lowest = -1022.5;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b39p-40;
  static constexpr double exp2[] = {0.69314718055994592842,     0.24022650695906330204,     0.055504108665602253297,
                                    0.0096181290995507955717,   0.0013333558629566755226,   0.00015403512309628660399,
                                    0.000015253175055562795993, 1.3208367288951140366e-6,   1.0253212435721934234e-7,
                                    6.559529322770528367e-9,    6.2634661422960210149e-10};
  static constexpr double log[] = {0.666666666666666609, 0.400000000000063321, 0.285714285690584851, 0.222222226509407813,
                                   0.181817753325132877, 0.153871053788760287, 0.132497870631436695, 0.132543521492970591};
};

// 2^x = 2^floor(x) 2^r with r in [0, 1) and 2^r = 1 + r Q(r); NaN stays NaN, and below the normal numbers comes 0 (or a denormal).
template <class T>
MRF_INLINE V<T> exp2(V<T> x) {
  using K = Constants<T>;
#if defined(__AVX512F__)
  V<T> r;
  if constexpr (sizeof(T) == 4)
    r = (V<T>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  else
    r = (V<T>)_mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const V<T> y = polynomial<T>(r, K::exp2) * r + T(1);
  if constexpr (sizeof(T) == 4)
    return (V<T>)_mm512_scalef_ps((__m512)y, (__m512)x);
  else
    return (V<T>)_mm512_scalef_pd((__m512d)y, (__m512d)x);
#else
  x = maximum<T>(broadcast(K::lowest), x);
  const V<T> shifted = (x - T(0.5)) + K::round;  // nearest to x - 1/2: the floor, or at a whole x perhaps one less
  const V<T> r = x - (shifted - K::round);
  const V<T> y = polynomial<T>(r, K::exp2) * r + T(1);
  return y * (V<T>)(((I<T>)shifted + K::bias) << K::mantissa);  // the exponent field is 0 for the lowest x
#endif
}

// log x for normal x > 0; -inf at 0 (denormals count as 0), NaN below, inf and NaN stay.
// x = 2^n (1 + g) with 1 + g in [sqrt(1/2), sqrt(2)); s = g / (2 + g); log(1 + g) = g - g^2/2 + s (g^2/2 + s^2 R(s^2)).
template <class T>
MRF_INLINE V<T> log(V<T> x) {
  using K = Constants<T>;
  constexpr auto one = typename IntegerOf<sizeof(T)>::type(1);
  constexpr T root_half = T(0.70710678118654752);
  const I<T> bits = (I<T>)x;
  // Subtracting the bits of sqrt(1/2) carries into the exponent exactly where the mantissa reaches sqrt(2).
  const I<T> offset = (I<T>)broadcast(root_half);
  const I<T> n = (bits - offset) >> K::mantissa;
  const V<T> m = (V<T>)(bits - (n << K::mantissa));
  const V<T> g = m - T(1);
  const V<T> s = g / (g + T(2)), z = s * s, half_square = T(0.5) * g * g;
  const V<T> exponent = __builtin_convertvector(n, V<T>);
  const V<T> correction = s * (half_square + z * polynomial<T>(z, K::log)) + exponent * K::ln2_low;
  V<T> y = exponent * K::ln2_high - ((half_square - correction) - g);
  const V<T> infinity = (V<T>)(I<T>{} + ((one * (2 * K::bias + 1)) << K::mantissa));
  y = x < (V<T>)(I<T>{} + (one << K::mantissa)) ? -infinity : y;
  y = x < T(0) ? infinity - infinity : y;
  return x < infinity ? y : x;
}

// sin and cos of `turns` full turns, turns in [0, 1]: the nearest quarter turn, then Taylor series within an eighth of a turn.
template <class T>
MRF_INLINE void sincos_turns(V<T> turns, V<T>& sine, V<T>& cosine) {
  using K = Constants<T>;
  const V<T> shifted = turns * T(4) + K::round;
  const I<T> quarter = (I<T>)shifted;
  const V<T> x = (turns * T(4) - (shifted - K::round)) * T(1.57079632679489661923);
  const V<T> z = -(x * x);
  V<T> s = broadcast(T(1)), c = s;
#pragma GCC unroll 16
  for (int k = K::trigonometric_terms; k > 0; --k) {
    s = T(1) + s * z * (T(1) / T((2 * k) * (2 * k + 1)));
    c = T(1) + c * z * (T(1) / T((2 * k - 1) * (2 * k)));
  }
  s *= x;
  const I<T> odd = (quarter & 1) != 0;
  const V<T> a = odd ? c : s, b = odd ? s : c;
  sine = (quarter & 2) != 0 ? -a : a;
  cosine = ((quarter + 1) & 2) != 0 ? -b : b;
}

// ---- Philox4x32-10 (Salmon et al., SC 2011) ----

// High and low words of the products of 32-bit lanes with a constant.
MRF_INLINE void multiply_wide(Words a, uint32_t constant, Words& high, Words& low) {
  using Wide = VectorOf<uint64_t, kLanes<double>>::type;
  const Wide even = (Wide)a, odd = even >> 32, m = Wide{} + constant;
#if defined(__AVX512F__)
  const Wide pe = (Wide)_mm512_mul_epu32((__m512i)even, (__m512i)m), po = (Wide)_mm512_mul_epu32((__m512i)odd, (__m512i)m);
#elif defined(__AVX2__)
  const Wide pe = (Wide)_mm256_mul_epu32((__m256i)even, (__m256i)m), po = (Wide)_mm256_mul_epu32((__m256i)odd, (__m256i)m);
#elif defined(__x86_64__)
  const Wide pe = (Wide)_mm_mul_epu32((__m128i)even, (__m128i)m), po = (Wide)_mm_mul_epu32((__m128i)odd, (__m128i)m);
#else
  const Wide pe = (even & 0xffffffffu) * m, po = odd * m;
#endif
  high = (Words)((pe >> 32) | (po & 0xffffffff00000000u));
  low = (Words)((pe & 0xffffffffu) | (po << 32));
}

MRF_INLINE void philox4x32(Words (&counter)[4], uint32_t key0, uint32_t key1) {
  Words c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  counter[0] = c0, counter[1] = c1, counter[2] = c2, counter[3] = c3;
}

// Two standard normals from two words (Box-Muller): sqrt(-2 log u) (cos 2 pi v, sin 2 pi v), u in (0, 1], v in [0, 1].
template <class T>
MRF_INLINE void box_muller(const uint32_t* a, const uint32_t* b, T* first, T* second) {
  using Lane = typename VectorOf<uint32_t, kLanes<T>>::unaligned;
  const V<T> u = __builtin_convertvector(*reinterpret_cast<const Lane*>(a), V<T>) * T(0x1p-32) + T(0x1p-33);
  const V<T> v = __builtin_convertvector(*reinterpret_cast<const Lane*>(b), V<T>) * T(0x1p-32);
  V<T> sine, cosine, radius = T(-2) * log<T>(u);
  for (int i = 0; i < kLanes<T>; ++i) radius[i] = sizeof(T) == 4 ? __builtin_sqrtf(radius[i]) : __builtin_sqrt(radius[i]);
  sincos_turns<T>(v, sine, cosine);
  store<T>(first, radius * cosine);
  store<T>(second, radius * sine);
}

}  // namespace MRF_ISA
}  // namespace mrf
