// Standard normals from Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller; the key and the counter are those of docs/math.md.
#pragma once

#include "tile.h"

namespace mrf {
namespace cuda {

__device__ inline uint4 philox4x32(uint4 c, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = {high1 ^ c.y ^ key.x, low1, high0 ^ c.w ^ key.y, low0};
    key = {key.x + 0x9E3779B9u, key.y + 0xBB67AE85u};
  }
  return c;
}

// The logarithm of a number between 2^-33 and 1: 2^k m with m around 1, and a polynomial of m - 1, whose error of 2^-24 is relative also
// where the logarithm is near 0. Without the numbers that the library's function has to expect it takes a third of the instructions.
__device__ inline float logarithm_below_1(float x) {
  const int bits = __float_as_int(x), k = (bits - 0x3f2aaaab) & 0xff800000;
  const float m = __int_as_float(bits - k) - 1;
  float y = -0.130310059f;
  y = fmaf(y, m, 0.140869141f), y = fmaf(y, m, -0.121483512f), y = fmaf(y, m, 0.139814854f), y = fmaf(y, m, -0.166846126f);
  y = fmaf(y, m, 0.200120345f), y = fmaf(y, m, -0.249996200f), y = fmaf(y, m, 0.333331972f), y = fmaf(y, m, -0.5f);
  return fmaf(float(k), kLn2<float> * 0x1p-23f, fmaf(y * m, m, m));
}

// The angle is taken from -pi to pi, where the fast sine and cosine keep an absolute error of 2^-20.9.
__device__ inline void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  float radius;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(-2 * logarithm_below_1(fmaf(float(a), 0x1p-32f, 0x1p-33f))));
  const float angle = float(int32_t(b)) * 0x1p-31f;
  first = radius * __cosf(angle * 3.14159265358979f);
  second = radius * __sinf(angle * 3.14159265358979f);
}
__device__ inline void box_muller(uint32_t a, uint32_t b, double& first, double& second) {
  const double radius = sqrt(-2 * log(fma(double(a), 0x1p-32, 0x1p-33))), angle = double(int32_t(b)) * 0x1p-31;
  sincospi(angle, &second, &first);
  first *= radius, second *= radius;
}

// The four channels of block g of a tensor's noise.
template <class T>
__device__ inline Quad<T> normals(uint64_t seed, uint64_t g, uint32_t tensor, uint32_t draw) {
  const uint2 key = {recomputed(uint32_t(seed)), recomputed(uint32_t(seed >> 32))};  // the keys of all rounds: many registers
  const uint4 words = philox4x32({uint32_t(g), uint32_t(g >> 32), tensor, draw}, key);
  Quad<T> x;
  box_muller(words.x, words.y, x.at[0], x.at[1]);
  box_muller(words.z, words.w, x.at[2], x.at[3]);
  return x;
}

}  // namespace cuda
}  // namespace mrf
