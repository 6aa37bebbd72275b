// exp2, log, sin/cos of full turns, and Philox4x32-10 normals on registers of lanes.
//
// log is within 2 ULP over its range and exp2 within 3 (tests/test_native_elementary.py sweeps them); the polynomials are minimax fits.
// That of exp2 in float is the cheapest that reaches the precision of the type (relative error 2^-23.5): the exponentials are most of
// the arithmetic.
#pragma once

#include <limits>

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
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr float lowest = -126.5f, highest = 128;  // exp2 of less is 0, of more infinity
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float exp2[] = {0.693151311817609790f, 0.240164450039272943f, 0.0557999134252242838f, 0.00901702996252961276f,
                                   0.00186713021195126332f};
  static constexpr float log[] = {0.666666656371125332f, 0.400003372508281584f, 0.285371679602035548f, 0.235849879602600841f};
  // Taylor coefficients of sin x / x and cos x in -x^2
  static constexpr float sine[] = {1, 1 / 6.0f, 1 / 120.0f, 1 / 5040.0f, 1 / 362880.0f, 1 / 39916800.0f};
  static constexpr float cosine[] = {1, 1 / 2.0f, 1 / 24.0f, 1 / 720.0f, 1 / 40320.0f, 1 / 3628800.0f};
};

template <>
struct Constants<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 0x1.8p52, lowest = -1022.5, highest = 1024;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b39p-40;
  static constexpr double exp2[] = {0.69314718055994592842,     0.24022650695906330204,     0.055504108665602253297,
                                    0.0096181290995507955717,   0.0013333558629566755226,   0.00015403512309628660399,
                                    0.000015253175055562795993, 1.3208367288951140366e-6,   1.0253212435721934234e-7,
                                    6.559529322770528367e-9,    6.2634661422960210149e-10};
  static constexpr double log[] = {0.666666666666666609, 0.400000000000063321, 0.285714285690584851, 0.222222226509407813,
                                   0.181817753325132877, 0.153871053788760287, 0.132497870631436695, 0.132543521492970591};
  static constexpr double sine[] = {1,           1 / 6.0,        1 / 120.0,         1 / 5040.0,           1 / 362880.0,
                                    1 / 39916800.0, 1 / 6227020800.0, 1 / 1307674368e3, 1 / 355687428096e3, 1 / 121645100408832e3};
  static constexpr double cosine[] = {1,           1 / 2.0,        1 / 24.0,         1 / 720.0,           1 / 40320.0,
                                      1 / 3628800.0, 1 / 479001600.0, 1 / 87178291200.0, 1 / 20922789888e3, 1 / 6402373705728e3};
};

// 2^(i / 32).
struct Powers {
  alignas(64) float of[32] = {};
  constexpr Powers() {
    double power = 1;
    for (float& x : of) x = float(power), power *= 1.02189714865411668;
  }
};

// 2^x = 2^floor(x) 2^r with r in [0, 1) and 2^r = 1 + r Q(r); NaN stays NaN, below the normal numbers comes 0 (or a denormal), above them
// infinity. AVX-512 in float: 2^r = t (1 + s Q(s)) with t from a table of two registers and s in [0, 1/32), which saves two multiply-adds of five.
template <class T>
MRF_INLINE V<T> exp2(V<T> x) {
  using K = Constants<T>;
#if defined(__AVX512F__)
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  if constexpr (sizeof(T) == 4) {
    static constexpr Powers powers;
    const __m512 low = _mm512_load_ps(powers.of), high = _mm512_load_ps(powers.of + 16);
    const __m512i index = (__m512i)_mm512_add_round_ps((__m512)x, _mm512_set1_ps(0x1.8p18f), down);  // floor(32 x) in the low bits
    const V<T> t = (V<T>)_mm512_permutex2var_ps(low, index, high), s = (V<T>)_mm512_reduce_ps((__m512)x, 5 << 4 | down);
    const V<T> y = t * s * (s * 0.242652699351310730f + 0.693123757839202881f) + t;
    return (V<T>)_mm512_scalef_ps((__m512)y, (__m512)x);
  } else {
    const V<T> r = (V<T>)_mm512_reduce_pd((__m512d)x, down);
    const V<T> y = polynomial<T>(r, K::exp2) * r + T(1);
    return (V<T>)_mm512_scalef_pd((__m512d)y, (__m512d)x);
  }
#else
  x = maximum<T>(broadcast(K::lowest), x);
  x = K::highest < x ? broadcast(K::highest) : x;
  const V<T> shifted = (x - T(0.5)) + K::round;  // nearest to x - 1/2: the floor, or at a whole x perhaps one less
  const V<T> r = x - (shifted - K::round);
  const V<T> y = polynomial<T>(r, K::exp2) * r + T(1);
  return y * (V<T>)(((I<T>)shifted + K::bias) << K::mantissa);  // the exponent field is 0 for the lowest x, full for the highest
#endif
}

// log x for normal x > 0; -inf at 0 (denormals count as 0), NaN below, inf and NaN stay.
// x = 2^n (1 + g) with 1 + g in [sqrt(1/2), sqrt(2)); s = g / (2 + g); log(1 + g) = g - g^2/2 + s (g^2/2 + s^2 R(s^2)).
template <class T>
MRF_INLINE V<T> log(V<T> x) {
  using K = Constants<T>;
  constexpr auto one = typename IntegerOf<sizeof(T)>::type(1);
  constexpr T root_half = T(0.70710678118654752);
  constexpr auto largest = std::numeric_limits<typename IntegerOf<sizeof(T)>::type>::max();
  const I<T> bits = (I<T>)x & largest;  // without the sign, so that nothing below overflows
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

// log(1 + x) for x >= 0 without what the sum rounds away; NaN stays NaN.
template <class T>
MRF_INLINE V<T> log_of_1_plus(V<T> x) {
  const V<T> sum = x + T(1), gained = sum - T(1);
  return gained == T(0) ? x : log<T>(sum) * (x / gained);
}

// sin and cos of `turns` full turns, turns in [0, 1]: the nearest quarter turn, then Taylor series within an eighth of a turn.
template <class T>
MRF_INLINE void sincos_turns(V<T> turns, V<T>& sine, V<T>& cosine) {
  using K = Constants<T>;
  const V<T> shifted = turns * T(4) + K::round;
  const I<T> quarter = (I<T>)shifted;
  const V<T> x = (turns * T(4) - (shifted - K::round)) * T(1.57079632679489661923);
  const V<T> z = -(x * x), s = polynomial<T>(z, K::sine) * x, c = polynomial<T>(z, K::cosine);
  const I<T> odd = (quarter & 1) != 0;
  const V<T> a = odd ? c : s, b = odd ? s : c;
  sine = (quarter & 2) != 0 ? -a : a;
  cosine = ((quarter + 1) & 2) != 0 ? -b : b;
}

// ---- Philox4x32-10 (Salmon et al., SC 2011) ----

using Wide = VectorOf<uint64_t, kLanes<double>>::type;

// The 64-bit product of the low words of the lanes.
MRF_INLINE Wide multiply_low_words(Wide a, uint32_t constant) {
  const Wide m = Wide{} + constant;
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)m);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)m);
#elif defined(__x86_64__)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)m);
#else
  return (a & 0xffffffffu) * m;
#endif
}

// Ten rounds on the low words of the lanes; what stands in the high words does not matter.
MRF_INLINE void philox_rounds(Wide (&c)[4], uint32_t key0, uint32_t key1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Wide first = multiply_low_words(c[0], 0xD2511F53u), second = multiply_low_words(c[2], 0xCD9E8D57u);
    c[0] = (second >> 32) ^ c[1] ^ key0;
    c[1] = second;
    c[2] = (first >> 32) ^ c[3] ^ key1;
    c[3] = first;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

MRF_INLINE void philox4x32(Words (&counter)[4], uint32_t key0, uint32_t key1) {
  Wide even[4], odd[4];
  for (int w = 0; w < 4; ++w) even[w] = (Wide)counter[w], odd[w] = (Wide)counter[w] >> 32;
  philox_rounds(even, key0, key1);
  philox_rounds(odd, key0, key1);
  for (int w = 0; w < 4; ++w) counter[w] = (Words)((even[w] & 0xffffffffu) | (odd[w] << 32));
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
