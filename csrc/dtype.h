// The dtype of a tensor, and of one of integers, for the bindings.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "problem.h"

namespace mrf {

inline DType dtype_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "modreg_fast_native: unexpected dtype"); return DType::float32;
  }
}

inline Integer integer_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Byte: return Integer::uint8;
    case ScalarType::Char: return Integer::int8;
    case ScalarType::Short: return Integer::int16;
    case ScalarType::Int: return Integer::int32;
    case ScalarType::Long: return Integer::int64;
    default: STD_TORCH_CHECK(false, "modreg_fast_native: unexpected dtype of the target"); return Integer::int64;
  }
}

}  // namespace mrf
