// What the host hands to a CUDA kernel, by value, and the division of a launch into blocks. Plain C++: no CUDA and no torch here.
//
// The caller describes tensors and results; plan() fills the fields marked "plan". A table fits the 4 KiB of a kernel's parameters; a call
// with more scales or tensors takes several launches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../problem.h"

namespace mrf {
namespace cuda {

// (B, C, P) in memory, strides in elements. A line is what lies side by side: the pixels of a channel, or the channels of a pixel.
struct Array {
  void* data;
  int64_t sample_stride, line_stride;
  DType dtype;
  uint8_t pixel_lines;
  uint8_t vector;  // plan: every line is whole pieces of 16 aligned bytes; in tiles of a warp: every line starts at one
  // plan: 2^across neighbouring threads share a line, 2^down of those groups go down the lines (tile.h).
  uint8_t across, down;
};

// A run of tensors of one shape: a scale of softmax_fisher, a tensor of gradient_statistics.
struct Tiling {
  int64_t channels, pixels;
  const uint8_t* mask;       // (B, P) or null: every pixel counts
  int64_t first_block;       // plan; block = first_block + sample * blocks + part of the sample
  int64_t blocks;            // plan: per sample
  int32_t tiles_per_block;   // plan
  int32_t width;             // plan: pixels of a tile, a power of two
  int32_t pitch;             // plan: from pixel to pixel of a tile in shared memory, in elements; in tiles of a warp from line to line, in bytes
  int32_t lanes, lane_bits;  // plan: threads that share a pixel, 2^lane_bits
  int32_t quads;             // plan: groups of four channels of a pixel that a thread has
};

constexpr int kMostScales = 8, kMostArrays = 48, kMostTensors = 14;
// What a lane reads from a tile of a warp at once (warp_tile.h): a pixel or two of 16 bits; where channels lie side by side 16 bytes of
// them, or one or two of 16 bits. Or there are no tiles of warps, but those of a block (tile.h).
enum class Unit : int { pixels, piece, single, none };

// Threads of a block with tiles of its own: few, because they meet at barriers between its stages, and other blocks fill the gaps; more
// where a pixel or its tile needs them.
constexpr int kThreads = 64, kMostThreads = 512;
// Groups of four channels of a pixel that a thread of softmax_fisher keeps in registers, at most: [in float64][backward][with noise].
constexpr int kMostQuads[2][2][2] = {{{4, 4}, {2, 2}}, {{2, 1}, {1, 1}}};

struct SoftmaxFisher {
  int32_t modalities, scales;          // modalities * scales <= kMostArrays
  int32_t first_scale, all_scales;     // of the call, of which this launch may be a part
  int32_t draws, detach_reference;
  Unit unit;                           // plan: of all scales
  int32_t warp_bytes;                  // plan: shared memory of a warp
  int64_t batch;
  double eps;
  const uint8_t* present;              // (B, M) or null
  const int64_t* seed;
  void* information;                   // (M, all_scales, B) in the accumulation type
  int64_t* counts;                     // (all_scales, B)
  void* partial;                       // [blocks][modalities + 1] in the accumulation type
  uint32_t* arrived;                   // [scales][B], 0 before and after a launch
  const double* weight;                // (M, all_scales, B), backward only: upstream gradient / (valid pixels * draws)
  Tiling tilings[kMostScales];
  double sigma[kMostArrays];           // [modalities]
  Array features[kMostArrays];         // [modalities][scales]
  Array gradients[kMostArrays];        // the same, backward only
};

struct GradientStatistics {
  int32_t tensors, first_tensor;
  Unit unit;                           // plan: of all tensors
  int32_t warp_bytes;                  // plan: shared memory of a warp
  int64_t batch;
  double eps;
  void *fisher, *attribution;          // (all tensors, B) in the accumulation type, or null
  void* partial;                       // [blocks][3] in the accumulation type
  uint32_t* arrived;                   // [tensors][B], 0 before and after a launch
  const double *fisher_weight, *attribution_weight;  // (all tensors, B), backward only, of sum_c g^2 / (f + eps) and of sum_c (g e)^2
  Tiling tilings[kMostTensors];
  Array grads[kMostTensors], features[kMostTensors];        // features: data null where there are none
  Array to_grads[kMostTensors], to_features[kMostTensors];  // backward only
  // (B, P) in the accumulation type, or null. Maps: results in the forward pass, upstream gradients in the backward pass.
  void *values[kMostTensors], *to_values[kMostTensors], *fisher_maps[kMostTensors], *attribution_maps[kMostTensors];
};

struct ModalityCrossEntropy {
  int32_t modalities;
  Integer target_type;
  int64_t batch, ignore_index;
  double eps, label_smoothing;
  const void* target;                  // (B, P)
  const double* class_weight;          // (C) or null: 1
  const uint8_t* present;              // (B, M) or null
  void *cross_entropy, *information;   // (M, B) in the accumulation type
  void *joint, *weights;               // (B)
  void* partial;                       // [blocks][2 modalities + 2] in the accumulation type
  uint32_t* arrived;                   // [B], 0 before and after a launch
  const double *to_cross_entropy, *to_joint, *to_information;  // upstream gradients, backward only
  Unit unit;                           // plan
  int32_t warp_bytes, numbers;         // plan: shared memory of a warp, and where in it numbers of its lanes stand
  Tiling tiling;                       // of all logits; its tiles are those of warps, its pitch is in bytes
  Array logits[kMostArrays];           // all of one type and layout
  Array gradients[kMostArrays];        // the same, backward only
};

static_assert(sizeof(SoftmaxFisher) <= 4096 && sizeof(GradientStatistics) <= 4096 && sizeof(ModalityCrossEntropy) <= 4096,
              "fits the parameters of a kernel");

struct Launch {
  int64_t blocks = 0;
  int32_t threads = 32, shared_bytes = 0;  // shared_bytes -1: a tile does not fit
};

// The least n with 2^n >= x.
inline int bits_of(int64_t x) {
  int bits = 0;
  while ((int64_t(1) << bits) < x) ++bits;
  return bits;
}

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Blocks of a launch, at most, about four times as many as an H100 holds at once: beyond, a block takes several tiles one after the other,
// so that its start pays off and the last block has fewer results to add up.
constexpr int64_t kMostBlocks = 2048;
// Shared memory for each thread, at least for a quad: then an A100 holds 1024 threads, half of its limit.
constexpr int64_t kBytesPerThread = 160;
constexpr int64_t kSectorBytes = 32;

// Numbers for each warp that a team exchanges (tile.h).
constexpr int64_t kTeamRows = 4;

// Quads of a thread: every thread has as many; pitch: and pixels start in different banks.
inline void set_lanes(Tiling& t, int64_t lanes) {
  t.lanes = int32_t(lanes);
  t.quads = int32_t(((t.channels + 3) / 4 + lanes - 1) / lanes);
  t.pitch = int32_t(4 * (t.quads * lanes | 1));
}

// Width and lanes of the tiles of one tiling whose arrays have elements of `least_bytes` or more, `planes` of them in shared memory; a
// thread has at most `quads_of_thread` groups of four channels.
inline void plan_tile(Tiling& t, int64_t planes, int64_t accumulator_bytes, int64_t least_bytes, bool pixel_lines, int64_t quads_of_thread,
                      int64_t limit) {
  const int64_t quads = (t.channels + 3) / 4, fit = std::max<int64_t>(1, kBytesPerThread / (4 * accumulator_bytes * planes));
  int64_t lanes = 1, width = 1;
  while (lanes < kMostThreads && lanes * std::min(fit, quads_of_thread) < quads) lanes *= 2;
  set_lanes(t, lanes);
  const int64_t least = std::max<int64_t>(32 / lanes, 1), sectors = pixel_lines ? 2 * kSectorBytes / least_bytes : 1;
  const int64_t of_pixel = t.pitch * planes * accumulator_bytes;
  while (width < t.pixels && (width < std::max(kThreads / lanes, sectors) || 2 * width * of_pixel <= kThreads * kBytesPerThread)) width *= 2;
  width = std::max(width, least);
  while (width > least && width * of_pixel > limit) width /= 2;
  t.width = int32_t(width);
}

// Tiles first, then the threads, shared memory and blocks of the launch. `rows`: numbers per warp and (per pixel) per tile beside it.
inline Launch plan_launch(Tiling* tilings, int count, int64_t batch, int64_t planes, int64_t accumulator_bytes, int64_t rows,
                          int64_t most_blocks) {
  Launch launch;
  int64_t tiles = 0;
  for (int k = 0; k < count; ++k) {
    const Tiling& t = tilings[k];
    tiles += batch * ((t.pixels + t.width - 1) / t.width);
    int32_t threads = std::max(kThreads, t.lanes);
    const int64_t bytes = t.width * t.pitch * planes * accumulator_bytes;
    while (threads < kMostThreads && threads * kBytesPerThread < bytes) threads *= 2;
    launch.threads = std::max(launch.threads, std::min(t.width * t.lanes, threads));
  }
  const int64_t warp_rows = launch.threads / 32 * (rows + kTeamRows);
  for (int k = 0; k < count; ++k) {
    Tiling& t = tilings[k];
    const int64_t of_sample = (t.pixels + t.width - 1) / t.width;
    t.tiles_per_block = int32_t((tiles + most_blocks - 1) / most_blocks);
    t.blocks = (of_sample + t.tiles_per_block - 1) / t.tiles_per_block;
    t.first_block = launch.blocks;
    launch.blocks += batch * t.blocks;
    int64_t lanes = t.lanes;
    while (t.width * lanes < launch.threads) lanes *= 2;  // all threads have a pixel, and meet at the team's barriers
    set_lanes(t, lanes);
    t.lane_bits = bits_of(lanes);
    const int64_t elements = t.width * (int64_t(t.pitch) * planes + 3) + warp_rows;
    launch.shared_bytes = int32_t(std::max<int64_t>(launch.shared_bytes, std::min<int64_t>(elements * accumulator_bytes, INT32_MAX)));
  }
  return launch;
}

// How the threads of a block copy an array between memory and its tiles: a thread takes pieces of four lines at once, and 64 bytes of a line
// of pixels are read together: whole sectors, and few conflicts between the banks in which pixels start.
inline void plan_copy(Array& x, const Tiling& t, int threads) {
  const int64_t bytes = size_of(x.dtype), length = x.pixel_lines ? t.pixels : t.channels, channels = 4 * t.quads * t.lanes;
  x.vector = !((reinterpret_cast<uintptr_t>(x.data) | x.sample_stride * bytes | x.line_stride * bytes | length * bytes) & 15) &&
             !(x.pixel_lines && t.width * bytes < 16);
  const int64_t n = x.vector ? 16 / bytes : 1;
  const int across = bits_of(x.pixel_lines ? t.width / n : (channels + n - 1) / n), down = bits_of((x.pixel_lines ? channels : t.width) / 4);
  x.across = uint8_t(std::min(across, x.pixel_lines && x.vector ? 2 : bits_of(threads)));
  x.down = uint8_t(std::min(down, bits_of(threads) - x.across));
}

inline bool noisy(const SoftmaxFisher& call) {
  return std::any_of(call.sigma, call.sigma + call.modalities, [](double sigma) { return sigma > 0; });
}

inline Launch plan_general(SoftmaxFisher& call, bool backward, int64_t accumulator_bytes, int64_t limit, int64_t most_blocks) {
  const int64_t planes = call.modalities, reserve = 4096 + 64 * call.modalities * accumulator_bytes;
  const auto& most_quads = kMostQuads[accumulator_bytes == 8];
  bool fits = true;
  for (int s = 0; s < call.scales; ++s) {
    int64_t least_bytes = 8;
    bool pixel_lines = false;
    for (int m = 0; m < call.modalities; ++m) {
      const Array& x = call.features[m * call.scales + s];
      least_bytes = std::min(least_bytes, size_of(x.dtype));
      pixel_lines |= x.pixel_lines;
    }
    plan_tile(call.tilings[s], planes, accumulator_bytes, least_bytes, pixel_lines, most_quads[backward][noisy(call)], limit - reserve);
    fits &= call.tilings[s].channels <= 4 * most_quads[true][true] * kMostThreads;  // also the backward pass
  }
  Launch launch = plan_launch(call.tilings, call.scales, call.batch, planes, accumulator_bytes, call.modalities + 1, (backward ? 4 : 1) * most_blocks);
  if (launch.shared_bytes > limit || !fits) launch.shared_bytes = -1;
  for (int i = 0; i < call.modalities * call.scales; ++i) {
    plan_copy(call.features[i], call.tilings[i % call.scales], launch.threads);
    if (backward) plan_copy(call.gradients[i], call.tilings[i % call.scales], launch.threads);
  }
  return launch;
}

// ---- tiles of a warp (warp_tile.h) ----

// Shared memory for the tiles of a warp, at most: then a dozen warps fit a multiprocessor, which together wait for several times the bytes
// that its share of the memory's bandwidth delivers within its latency. And of a block.
constexpr int64_t kWarpBytes = 20 << 10, kBlockBytes = 64 << 10;
// The same of softmax_fisher: float32, which is bound by memory, has more warps with smaller tiles; in 16 bits, where instructions bind,
// few lanes to a pixel spare some. And of gradient_statistics, bound by memory.
constexpr int64_t fisher_bytes(int64_t element_bytes) { return element_bytes == 2 ? 20 << 10 : 13 << 10; }
constexpr int64_t kStatisticsBytes = 10 << 10;
// Modalities whose numbers a thread holds in registers together.
constexpr int kGroup = 4;

inline bool starts_pieces(const Array& x, int64_t line_bytes) {
  const int64_t bytes = size_of(x.dtype);
  return !((reinterpret_cast<uintptr_t>(x.data) | x.sample_stride * bytes | line_bytes) & 15);
}

// Whether arrays of so many channels have tiles of a warp, and their unit.
inline Unit unit_of(const Array& x, int64_t channels) {
  const int64_t bytes = size_of(x.dtype);
  return x.pixel_lines ? Unit::pixels : bytes < 8 && channels * bytes % 16 == 0 ? Unit::piece : Unit::single;
}
// Pixels of a lane: of a unit, or one after the other.
inline int64_t pixels_of(const Array& x, int64_t channels) { return size_of(x.dtype) == 2 && unit_of(x, channels) != Unit::piece ? 2 : 1; }

// A tiling of arrays like x, `planes` of them to a tile, with `lane_numbers` more for each lane, and `unit_numbers` for each unit of it.
// Lanes for each pixel, the fewest with which the tile of a warp is small enough, where pixels lie side by side up to those that leave
// whole sectors, and where there are few pixels as many as leave no lane without one. `one_line`: rows follow one on the other in all
// arrays. Returns the bytes of a warp without those numbers, and with them.
inline std::pair<int64_t, int64_t> plan_warp_tile(Tiling& t, const Array& x, int64_t planes, bool one_line, int64_t unit_numbers,
                                                  int64_t lane_numbers, int64_t accumulator_bytes, int64_t most_bytes, int64_t limit) {
  const int64_t bytes = size_of(x.dtype), channel_bytes = t.channels * bytes, pixels = pixels_of(x, t.channels);
  const Unit kind = unit_of(x, t.channels);
  const int64_t unit_channels = kind == Unit::piece ? 16 / bytes : kind == Unit::single && bytes == 2 ? 2 : 1;
  for (t.lane_bits = 0;; ++t.lane_bits) {
    t.lanes = 1 << t.lane_bits;
    const int64_t groups = 32 / t.lanes;
    t.width = int32_t(groups * pixels);
    if (x.pixel_lines) {
      t.pitch = int32_t(t.width * bytes);
    } else if (one_line && t.width * channel_bytes % 16 == 0) {
      t.pitch = int32_t(channel_bytes);
    } else {  // lanes that read together read from different banks
      const int64_t unit = std::max<int64_t>(unit_channels * bytes, 4), rows = std::max<int64_t>(128 / unit / groups, 1);
      t.pitch = int32_t(unit * rows * (((channel_bytes + unit - 1) / unit + rows - 1) / rows | 1));
    }
    const int64_t plane = ((x.pixel_lines ? t.channels : t.width) * t.pitch + 15) / 16 * 16;
    const int64_t units = (t.channels + t.lanes * unit_channels - 1) / t.lanes + (unit_channels == 2 ? 2 : 0);  // with half of one
    const int64_t tile_bytes = planes * plane + 32 * units * unit_numbers * accumulator_bytes;
    const int64_t warp_bytes = tile_bytes + 32 * lane_numbers * accumulator_bytes;
    const bool spread = t.width >= 2 * t.pixels && groups > 1, small = warp_bytes <= most_bytes, fits = warp_bytes <= limit;
    const bool sectors = x.pixel_lines && t.pitch <= kSectorBytes;
    if (t.lane_bits == 5 || (!spread && fits && (small || sectors))) return {tile_bytes, warp_bytes};
  }
}

inline bool one_line(const Array& x, const Tiling& t) { return unit_of(x, t.channels) == Unit::single && x.line_stride == t.channels; }
inline void plan_warp_copy(Array& x, const Tiling& t) {
  const int64_t bytes = size_of(x.dtype), channel_bytes = t.channels * bytes;
  const bool line = one_line(x, t) && t.pitch == channel_bytes;
  const bool whole = unit_of(x, t.channels) == Unit::single ? line && t.width * channel_bytes % 16 == 0 : t.pitch % 16 == 0;
  x.vector = whole && starts_pieces(x, line ? 0 : x.line_stride * bytes);
}

// Warps of a block that have so much shared memory each, at most as many as there are tiles.
inline int32_t warps_of(int64_t warp_bytes, int64_t tiles, int64_t limit) {
  return int32_t(std::max<int64_t>(1, std::min({std::min(kBlockBytes, limit) / warp_bytes, tiles, int64_t(8)})));
}
inline int64_t tiles_of(const Tiling& t) { return (t.pixels + t.width - 1) / t.width; }
// The blocks of `count` tilings.
inline void plan_warp_blocks(Launch& launch, Tiling* tilings, int count, int64_t batch, int32_t warps, bool backward, int64_t most_blocks) {
  int64_t tiles = 0;
  for (int k = 0; k < count; ++k) tiles += batch * tiles_of(tilings[k]);
  // Forward, fewer blocks leave less to add up; backward, more of them end more evenly.
  const int64_t most = (backward ? 4 : 1) * most_blocks, rounds = (tiles + warps * most - 1) / (warps * most);
  launch.threads = 32 * warps;
  for (int k = 0; k < count; ++k) {
    Tiling& t = tilings[k];
    t.tiles_per_block = int32_t(warps * rounds);
    t.blocks = (tiles_of(t) + t.tiles_per_block - 1) / t.tiles_per_block;
    t.first_block = launch.blocks;
    launch.blocks += batch * t.blocks;
  }
}
// Left to a block beside its tiles, for the sums of its warps, and in modality_cross_entropy also for class weights.
constexpr int64_t kRows = 1024, kReserve = 40960;

inline Launch plan(ModalityCrossEntropy& call, bool backward, int64_t accumulator_bytes, int64_t limit, int64_t most_blocks = kMostBlocks) {
  Tiling& t = call.tiling;
  const Array& first = call.logits[0];
  call.unit = unit_of(first, t.channels);
  bool rows_follow = true;
  for (int m = 0; m < call.modalities; ++m) rows_follow &= one_line(call.logits[m], t) && starts_pieces(call.logits[m], 0);
  // Numbers of a lane beside the tile: sums, or for a group of modalities gradients at y and with smoothing more; of a unit: the mean.
  const int64_t pixels = first.pixel_lines ? pixels_of(first, t.channels) : 1, of_unit = call.modalities > kGroup ? pixels : 0;
  const int64_t of_lane = !backward ? 2 * call.modalities + 2 : (call.label_smoothing > 0 ? 3 : 1) * kGroup * pixels;
  const auto [numbers, warp_bytes] =
      plan_warp_tile(t, first, call.modalities, rows_follow, of_unit, of_lane, accumulator_bytes, kWarpBytes, limit - kReserve);
  call.numbers = int32_t(std::min<int64_t>(numbers, INT32_MAX / 2));
  call.warp_bytes = int32_t(std::min<int64_t>(warp_bytes, INT32_MAX / 2));
  for (int m = 0; m < call.modalities; ++m) {
    plan_warp_copy(call.logits[m], t);
    if (backward) plan_warp_copy(call.gradients[m], t);
  }
  Launch launch;
  const int32_t warps = warps_of(call.warp_bytes, tiles_of(t), limit - kReserve);
  plan_warp_blocks(launch, &t, 1, call.batch, warps, backward, most_blocks);
  const int64_t weights = call.label_smoothing > 0 ? (t.channels + 3) / 4 * 4 * accumulator_bytes : 0;
  const int64_t rows = backward ? 0 : warps * (2 * call.modalities + 2) * accumulator_bytes;
  const int64_t shared = warps * int64_t(call.warp_bytes) + weights + rows;
  launch.shared_bytes = shared <= limit ? int32_t(shared) : -1;
  return launch;
}

// Of a scale: tiles of warps where a few modalities lie alike, in 32 or 16 bits, and there is no noise.
inline Unit unit_of(const SoftmaxFisher& call, const Array* features, int64_t scales, int64_t channels) {
  bool alike = call.modalities <= kGroup && !noisy(call) && features[0].dtype != DType::float64;
  for (int m = 1; m < call.modalities; ++m) alike &= features[m * scales].pixel_lines == features[0].pixel_lines;
  return alike ? unit_of(features[0], channels) : Unit::none;
}

// `limit`: the shared memory that a block may have on the device. The scales are of one type and unit.
inline Launch plan(SoftmaxFisher& call, bool backward, int64_t accumulator_bytes, int64_t limit, int64_t most_blocks = kMostBlocks) {
  call.unit = accumulator_bytes == 4 ? unit_of(call, call.features, call.scales, call.tilings[0].channels) : Unit::none;
  if (call.unit == Unit::none) return plan_general(call, backward, accumulator_bytes, limit, most_blocks);
  const int64_t room = limit - kRows;
  int64_t most_bytes = 0, most_tiles = 0;
  for (int s = 0; s < call.scales; ++s) {
    Tiling& t = call.tilings[s];
    bool rows_follow = true;
    for (int m = 0; m < call.modalities; ++m) {
      const Array& x = call.features[m * call.scales + s];
      rows_follow &= one_line(x, t) && starts_pieces(x, 0);
    }
    const int64_t planes = call.modalities > 2 ? call.modalities : 2;
    most_bytes = std::max(most_bytes, plan_warp_tile(t, call.features[s], planes, rows_follow, 0, 0, 4, fisher_bytes(size_of(call.features[s].dtype)), room).second);
    most_tiles = std::max(most_tiles, tiles_of(t));
    for (int m = 0; m < call.modalities; ++m) {
      plan_warp_copy(call.features[m * call.scales + s], t);
      if (backward) plan_warp_copy(call.gradients[m * call.scales + s], t);
    }
  }
  Launch launch;
  const int32_t warps = warps_of(most_bytes, most_tiles, room);
  plan_warp_blocks(launch, call.tilings, call.scales, call.batch, warps, backward, most_blocks);
  call.warp_bytes = int32_t(std::min<int64_t>(most_bytes, INT32_MAX / 2));
  const int64_t shared = warps * (most_bytes + (call.modalities + 1) * 4);
  launch.shared_bytes = shared <= limit ? int32_t(shared) : -1;
  return launch;
}

// The tensors are of one type and unit; gradient and feature of each lie alike.
inline Launch plan(GradientStatistics& call, bool backward, int64_t accumulator_bytes, int64_t limit, int64_t most_blocks = kMostBlocks) {
  call.unit = unit_of(call.grads[0], call.tilings[0].channels);
  const int64_t room = limit - kRows;
  int64_t most_bytes = 0, most_tiles = 0;
  for (int k = 0; k < call.tensors; ++k) {
    Tiling& t = call.tilings[k];
    const bool e = call.features[k].data;
    Array* const arrays[] = {call.grads, call.features, call.to_grads, call.to_features};
    bool rows_follow = true;
    for (int i = 0; i < (e ? 2 : 1); ++i) rows_follow &= one_line(arrays[i][k], t) && starts_pieces(arrays[i][k], 0);
    most_bytes = std::max(most_bytes, plan_warp_tile(t, call.grads[k], e ? 2 : 1, rows_follow, 0, 0, accumulator_bytes,
                                                     kStatisticsBytes, room).second);
    most_tiles = std::max(most_tiles, tiles_of(t));
    for (int i = 0; i < (backward ? 4 : 2); ++i)
      if (arrays[i][k].data) plan_warp_copy(arrays[i][k], t);
  }
  Launch launch;
  const int32_t warps = warps_of(most_bytes, most_tiles, room);
  plan_warp_blocks(launch, call.tilings, call.tensors, call.batch, warps, backward, most_blocks);
  call.warp_bytes = int32_t(std::min<int64_t>(most_bytes, INT32_MAX / 2));
  const int64_t shared = warps * (most_bytes + 3 * accumulator_bytes);
  launch.shared_bytes = shared <= limit ? int32_t(shared) : -1;
  return launch;
}

}  // namespace cuda
}  // namespace mrf
