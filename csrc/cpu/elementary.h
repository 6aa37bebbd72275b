// exp, log, sin/cos of full turns, and Philox4x32-10 normals on registers of lanes.
//
// exp and log are within 2 ULP over their range (tests/test_native_elementary.py sweeps it); the polynomials are minimax fits of
// relative error below 2^-28 (float) and 2^-57 (double).
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
  static constexpr float lowest = -88.0f;    // exp of less is 0
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float exp[] = {0.499999934477964869f, 0.166665206317094977f, 0.0416683880453139829f, 0.00836871687972806895f,
                                  0.00138145986466644037f};
  static constexpr float log[] = {0.666666656371125332f, 0.400003372508281584f, 0.285371679602035548f, 0.235849879602600841f};
};

template <>
struct Constants<double> {
  static constexpr int mantissa = 52, bias = 1023, trigonometric_terms = 10;
  static constexpr double round = 0x1.8p52, lowest = -709.0;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b39p-40;
  static constexpr double exp[] = {0.500000000000000004,   0.166666666666666834,   0.0416666666666660943,   0.00833333333331703438,
                                   0.0013888888889115634,  0.000198412698963835372, 0.0000248015869266205751, 2.75572348621610985e-6,
                                   2.75575818593379385e-7, 2.51120367668374273e-8, 2.08266236276166948e-9};
  static constexpr double log[] = {0.666666666666666609, 0.400000000000063321, 0.285714285690584851, 0.222222226509407813,
                                   0.181817753325132877, 0.153871053788760287, 0.132497870631436695, 0.132543521492970591};
};

// e^x for x <= 88 (float) or 709 (double); 0 below Constants::lowest, NaN stays NaN.
// x = n ln2 + r with |r| <= ln2 / 2; e^r = 1 + r + r^2 Q(r); times 2^n, whose exponent field is 0 for the lowest n.
template <class T>
MRF_INLINE V<T> exp(V<T> x) {
  using K = Constants<T>;
  x = x < K::lowest ? broadcast(K::lowest) : x;
  const V<T> shifted = x * T(0x1.71547652b82fep0) + K::round;
  const V<T> n = shifted - K::round;
  const V<T> r = (x - n * K::ln2_high) - n * K::ln2_low;
  const V<T> y = (polynomial<T>(r, K::exp) * r + T(1)) * r + T(1);
  const V<T> scale = (V<T>)(((I<T>)shifted + K::bias) << K::mantissa);
  return y * scale;
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
