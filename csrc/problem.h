// What the binding hands to a kernel: raw pointers, element strides and the division of the work into units. No torch here.
#pragma once

#include <cstdint>

namespace mrf {

enum class DType : int { float32, float64, bfloat16, float16 };

// (B, C, P) in memory; strides in elements. Either the pixels are contiguous (pixel_stride 1) or the channels are (channel_stride 1).
struct View {
  void* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0, pixel_stride = 0;
};

// A run of tensors of one shape whose tiles are units of work: a scale of softmax_fisher, a tensor of gradient_statistics.
struct Tiling {
  DType dtype;
  int64_t channels, pixels;
  int64_t tile;        // pixels per unit
  int64_t tiles;       // units per sample
  int64_t first_unit;  // of this tiling; unit = first_unit + sample * tiles + tile index
  const uint8_t* mask = nullptr;  // (B, P) or null: every pixel counts
  // Samples of one pixel each are computed as one sample of that many pixels, so that a register holds as many of them as it has lanes;
  // the sums of softmax_fisher then have a slot per pixel instead of one per unit.
  bool samples_as_pixels = false;
  int64_t first_slot = 0;
};

// How many sums of softmax_fisher belong to one sample.
static inline int64_t slots_per_sample(const Tiling& tiling) { return tiling.samples_as_pixels ? 1 : tiling.tiles; }

struct Unit {
  int tiling;
  int64_t sample, begin, end;  // pixels [begin, end)
};

// Static, not inline: every instruction set must keep a copy of its own.
static inline Unit locate(const Tiling* tilings, int count, int64_t unit) {
  int t = count - 1;
  while (tilings[t].first_unit > unit) --t;
  const int64_t local = unit - tilings[t].first_unit, begin = local % tilings[t].tiles * tilings[t].tile;
  const int64_t end = begin + tilings[t].tile;
  return {t, local / tilings[t].tiles, begin, end < tilings[t].pixels ? end : tilings[t].pixels};
}

constexpr int kMaxModalities = 64;

// What the ops over modalities have in common. The features of cross entropies are their logits.
struct OverModalities {
  int modalities, scales;
  int64_t batch, units;
  int64_t neighbours;         // units that a thread takes at a time
  const Tiling* tilings;      // [scales]
  const View* features;       // [modalities * scales], modality first
  const View* gradients;      // the same, backward only
  const uint8_t* present;     // (B, M) or null
  double eps;
  double* partial;            // [slots][sums of the op], forward only: over the valid pixels of a unit; starts as 0
};

struct SoftmaxFisher : OverModalities {
  int draws;
  const double* sigma;        // [modalities]
  uint64_t seed;
  bool detach_reference;
  const double* weight;       // (M, S, B), backward only: upstream gradient / (valid pixels * draws)
  int64_t* valid;             // [slots], forward only: valid pixels. Sums: I of every modality, over the draws
};

enum class Integer : int { uint8, int8, int16, int32, int64 };

struct ModalityCrossEntropy : OverModalities {
  Integer target_type;
  const void* target;         // (B, P)
  int64_t ignore_index;
  double label_smoothing;
  const double* class_weight; // [channels] or null: 1
  double all_weights;         // sum of the class weights
  // Backward: upstream gradients of the sums.
  const double* to_cross_entropy;  // (M, B)
  const double* to_joint;          // (B)
  const double* to_information;    // (M, B)
  // Forward. Sums: the cross entropy of every modality, the information of every modality, the joint cross entropy, the weights.
  bool* out_of_range;         // set where a target is no class
};

struct GradientStatistics {
  int tensors;
  int64_t batch, units;
  const Tiling* tilings;          // [tensors]
  const View* grads;              // [tensors]
  const View* features;           // [tensors] or null
  const View* values;             // [tensors] or null; (B, P) contiguous
  double eps;
  // Forward.
  double* partial;                // [units][2]: sums of the Fisher and of the squared attribution terms
  int64_t* valid;                 // [units]
  void* const* fisher_maps;       // [tensors] or null; (B, P) in the accumulation type
  void* const* attribution_maps;  // [tensors] or null
  // Backward. The weights of sum_c g^2 / (f + eps) and of sum_c (g e)^2 in the objective, per sample, and per pixel where maps are used.
  const double* fisher_weight;       // [tensors][B]
  const double* attribution_weight;  // [tensors][B]
  void* const* fisher_map_grads;       // [tensors] or null
  void* const* attribution_map_grads;  // [tensors] or null
  const View* to_grads;               // [tensors]
  const View* to_features;            // [tensors] or null
  const View* to_values;              // [tensors] or null
};

// A kernel runs units until none is left. Every thread calls it at once, with one shared counter that starts at 0 and with scratch
// memory of its own, aligned to 64 bytes.
template <class Problem>
using Kernel = void (*)(const Problem&, int64_t* counter, void* scratch);

struct Kernels {
  Kernel<SoftmaxFisher> softmax_fisher_forward, softmax_fisher_backward;
  Kernel<ModalityCrossEntropy> modality_cross_entropy_forward, modality_cross_entropy_backward;
  Kernel<GradientStatistics> gradient_statistics_forward, gradient_statistics_backward;
};

// Bytes of a scratch row, one channel of a group of pixels: at most 32 pixels, in double.
constexpr int64_t kRowBytes = 32 * 8;

// Scratch of softmax_fisher: the statistics of every modality, the sums of a strip of pixels, and the rows of a group.
constexpr int64_t kMostPixels = 256;
constexpr int64_t kModalityBytes = 10 * kRowBytes;
constexpr int64_t strip_bytes(int64_t modalities) { return (5 + 8 * modalities) * kMostPixels * sizeof(double); }
constexpr int64_t softmax_fisher_scratch(int64_t modalities, int64_t channels) {
  return modalities * kModalityBytes + strip_bytes(modalities) + (4 + 2 * modalities) * channels * kRowBytes;
}

// Scratch of modality_cross_entropy: the sums of a strip of pixels and in all, and the rows of a group, as read, as written, and of zeros.
constexpr int64_t modality_cross_entropy_scratch(int64_t modalities, int64_t channels) {
  return (8 + 9 * modalities) * kMostPixels * int64_t(sizeof(double)) + (2 + 2 * modalities) * 64 + (1 + 2 * modalities) * channels * kRowBytes;
}

// Scratch of gradient_statistics: six numbers per pixel of a tile.
constexpr int kGradientStatisticsRows = 6;

}  // namespace mrf
