// The inner functions of one instruction set over arrays, for the tests: plain pointers, lengths in multiples of 64 elements.
#pragma once

#include "../problem.h"

namespace mrf {

struct Inner {
  void (*exp2_float)(const float* x, float* y, int64_t n);
  void (*exp2_double)(const double* x, double* y, int64_t n);
  void (*log_float)(const float* x, float* y, int64_t n);
  void (*log_double)(const double* x, double* y, int64_t n);
  void (*sincos_turns_float)(const float* x, float* sine, float* cosine, int64_t n);
  void (*sincos_turns_double)(const double* x, double* sine, double* cosine, int64_t n);
  void (*philox)(const uint32_t* counters, uint32_t* words, uint32_t key0, uint32_t key1, int64_t n);  // [4][n] each
  void (*widen_bfloat16)(const uint16_t* x, float* y, int64_t n);
  void (*narrow_bfloat16)(const float* x, uint16_t* y, int64_t n);
  void (*widen_float16)(const uint16_t* x, float* y, int64_t n);
  void (*narrow_float16)(const float* x, uint16_t* y, int64_t n);
  Kernel<SoftmaxFisher> softmax_fisher_forward, softmax_fisher_backward;
};

}  // namespace mrf
