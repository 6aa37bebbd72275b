#include "inner.h"

#include "../cpu/elementary.h"

namespace mrf {
namespace MRF_ISA {

extern const Kernel<SoftmaxFisher> softmax_fisher_forward, softmax_fisher_backward;

namespace {

template <class T, V<T> (*F)(V<T>)>
void map(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store<T>(y + i, F(load<T>(x + i)));
}

template <class T>
void sincos(const T* x, T* sine, T* cosine, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    V<T> s, c;
    sincos_turns<T>(load<T>(x + i), s, c);
    store<T>(sine + i, s);
    store<T>(cosine + i, c);
  }
}

void philox(const uint32_t* counters, uint32_t* words, uint32_t key0, uint32_t key1, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    Words block[4];
    for (int w = 0; w < 4; ++w) __builtin_memcpy(&block[w], counters + w * n + i, sizeof block[w]);
    philox4x32(block, key0, key1);
    for (int w = 0; w < 4; ++w) __builtin_memcpy(words + w * n + i, &block[w], sizeof block[w]);
  }
}

template <class Storage>
void widen(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) store<float>(y + i, Convert<float, Storage>::load((const Storage*)x + i));
}

template <class Storage>
void narrow(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) Convert<float, Storage>::store((Storage*)y + i, load<float>(x + i));
}

}  // namespace

extern const Inner inner = {
    map<float, exp2<float>>, map<double, exp2<double>>, map<float, log<float>>, map<double, log<double>>, sincos<float>, sincos<double>,
    philox, widen<bfloat16>, narrow<bfloat16>, widen<float16>, narrow<float16>, softmax_fisher_forward, softmax_fisher_backward,
};

}  // namespace MRF_ISA
}  // namespace mrf
