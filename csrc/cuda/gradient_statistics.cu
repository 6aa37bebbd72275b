// gradient_statistics on a CUDA GPU: per pixel, with the gradient g and the feature e (C channels) and the positive value f,
//
//   fisher_map = sum_c g^2 / (f + eps)        square = sum_c (g e)^2        attribution_map = sqrt(square)
//
// forward: the mean of fisher_map and the root of the sum of square over the valid pixels, and the maps where asked; backward, with u and
// v the upstream weights of fisher_map and of square:
//
//   dg = 2 u / (f + eps) g + 2 v g e^2        de = 2 v g^2 e        df = -u sum_c g^2 / (f + eps)^2
//
// Memory: forward reads g, e, f and the mask once and writes three numbers per block, which the last block of each tensor and sample adds
// up, and the maps; backward reads g, e, f and upstream maps once and writes dg, de and df once.
//
// Work: a block takes tiles of pixels of one sample of one tensor, all channels, into shared memory (tile.h); one launch covers all
// tensors. So the backward pass has sum_c (g e)^2, which the gradient of a root needs first, without a second reading. Gradients replace g
// and e in place; what a pixel has once is read and written by neighbouring threads.
//
// Sizes: call.h. A pixel gets as many threads as leave each 160 bytes of shared memory, up to the whole block, so that 1024 threads fit a
// multiprocessor of an A100; a tile has as many pixels as fill that memory, and at least a 32-byte sector of every channel, or fewer where
// that does not fit; a single pixel must.
#include "launch.h"
#include "tile.h"

namespace mrf {
namespace cuda {
namespace {

// Over the channels of a pixel, in all threads of its team.
template <class T>
struct Sums {
  T norm, square;  // sum_c g^2, sum_c (g e)^2
};

template <class T>
__device__ Sums<T> sums_of_pixel(const T* g, const T* e, int quads, Team<T>& team) {
  Sums<T> sums = {};
#pragma unroll 1
  for (int k = 0; k < quads; ++k) {
    const int c = 4 * (team.lane() + (k << team.lane_bits));
    const Quad<T> gradient = load_quad(g + c);
    const Quad<T> feature = e ? load_quad(e + c) : Quad<T>{};
    for (int i = 0; i < 4; ++i) {
      const T ge = gradient.at[i] * feature.at[i];
      sums.norm += gradient.at[i] * gradient.at[i];
      sums.square += ge * ge;
    }
  }
  team.sum(sums.norm, sums.square);
  return sums;
}

// What a pixel of a tile has once, in shared memory.
template <class T>
struct PixelRows {
  T *f, *fisher, *attribution;
};

// g and e, if there is any, one after the other, with zeros where the tile has more than the tensor.
template <class T>
__device__ void read_planes(const Array* g, const Array* e, int planes, const Tile& tile, T* values) {
#pragma unroll 1
  for (int i = 0; i < planes; ++i) read_tile<T>(i ? *e : *g, tile, values + i * (tile.width * tile.pitch), T(0));
}
template <class T>
__device__ void write_planes(const Array* g, const Array* e, int planes, const Tile& tile, T* values) {
#pragma unroll 1
  for (int i = 0; i < planes; ++i) write_tile<T>(i ? *e : *g, tile, values + i * (tile.width * tile.pitch));
}

template <class T>
__device__ T read_pixel(const void* data, int64_t at) { return static_cast<const T*>(data)[at]; }

// fisher and attribution (K, B), from the numbers of all blocks of a tensor and sample.
template <class T>
__device__ void write_results(const GradientStatistics& call, const Place& place) {
  const Tiling& tiling = call.tilings[place.tiling];
  const T* partial = static_cast<const T*>(call.partial);
  const int64_t first = tiling.first_block + place.sample * tiling.blocks;
  const int64_t to = (call.first_tensor + place.tiling) * call.batch + place.sample;
  if (threadIdx.x >= 32) return;
  const double fisher = ordered_sum(partial, first, tiling.blocks, 3, 0), square = ordered_sum(partial, first, tiling.blocks, 3, 1);
  const double count = ordered_sum(partial, first, tiling.blocks, 3, 2);
  if (threadIdx.x > 0) return;
  if (call.fisher) static_cast<T*>(call.fisher)[to] = T(count > 0 ? fisher / count : 0);
  if (call.attribution) static_cast<T*>(call.attribution)[to] = T(sqrt(square));
}

template <class T>
__device__ void forward(const GradientStatistics& call) {
  const Place place = place_of_block(call.tilings, call.tensors);
  const int k = place.tiling;
  const Tiling& tiling = call.tilings[k];
  const int plane = tiling.width * tiling.pitch, planes = call.features[k].data ? 2 : 1;
  T *g = shared<T>(), *e = planes == 2 ? g + plane : nullptr, *after = g + planes * plane;
  const PixelRows<T> rows{after, after + tiling.width, after + 2 * tiling.width};
  T* totals = after + 3 * tiling.width;
  Team<T> team{tiling.lanes, tiling.lane_bits, totals + blockDim.x / 32 * 3};
  for (int i = threadIdx.x; i < blockDim.x / 32 * 3; i += blockDim.x) totals[i] = 0;

  for (int i = place.first_tile; i < place.last_tile; ++i) {
    if (i > place.first_tile) __syncthreads();
    const Tile tile = tile_at(tiling, place.sample, i);
    const int64_t row = tile.sample * tiling.pixels + tile.begin;
    read_tile<T>(call.grads[k], tile, g, T(0));  // not read_planes, which takes more registers here
    if (e) read_tile<T>(call.features[k], tile, e, T(0));
#pragma unroll 1
    for (int p = threadIdx.x; p < tile.width; p += blockDim.x)
      rows.f[p] = call.values[k] && p < tile.count ? read_pixel<T>(call.values[k], row + p) : T(1);
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < tile.width; first += team.pixels_at_once()) {
      const int p = first + team.pixel();
      const int at = p * tile.pitch;
      const bool counts = counted(tiling, tile, p);
      const Sums<T> sums = sums_of_pixel(g + at, e ? e + at : nullptr, tiling.quads, team);
      const T fisher = counts ? sums.norm / (rows.f[p] + T(call.eps)) : T(0), square = counts ? sums.square : T(0);
      add_pixels(fisher, team.lanes, totals, 3, 0);
      add_pixels(square, team.lanes, totals, 3, 1);
      add_pixels(T(counts), team.lanes, totals, 3, 2);
      if (team.lane() == 0) rows.fisher[p] = fisher, rows.attribution[p] = square_root(square);
    }
    __syncthreads();
#pragma unroll 1
    for (int p = threadIdx.x; p < tile.count; p += blockDim.x) {
      if (call.fisher_maps[k]) static_cast<T*>(call.fisher_maps[k])[row + p] = rows.fisher[p];
      if (call.attribution_maps[k]) static_cast<T*>(call.attribution_maps[k])[row + p] = rows.attribution[p];
    }
  }
  uint32_t* arrived = call.arrived + k * call.batch + place.sample;
  if (publish(totals, 3, static_cast<T*>(call.partial), arrived, tiling.blocks)) write_results<T>(call, place);
}

// dg and de of a pixel in place of g and e, 0 where it does not count, from 2 u / (f + eps) and 2 v; returns sum_c g^2.
template <class T>
__device__ T gradient_of_pixel(T* g, T* e, int quads, Team<T>& team, bool counts, T u, T v) {
  T norm = 0;
#pragma unroll 1
  for (int k = 0; k < quads; ++k) {
    const int c = 4 * (team.lane() + (k << team.lane_bits));
    Quad<T> gradient = load_quad(g + c), feature = e ? load_quad(e + c) : Quad<T>{};
    for (int i = 0; i < 4; ++i) {
      const T from = gradient.at[i], vg = v * from;
      norm += from * from;
      gradient.at[i] = counts ? u * from + vg * feature.at[i] * feature.at[i] : T(0);
      feature.at[i] = counts ? vg * from * feature.at[i] : T(0);
    }
    store_quad(g + c, gradient);
    if (e) store_quad(e + c, feature);
  }
  team.sum(norm);
  return norm;
}

template <class T>
__device__ void backward(const GradientStatistics& call) {
  const Place place = place_of_block(call.tilings, call.tensors);
  const int k = place.tiling;
  const Tiling& tiling = call.tilings[k];
  const int plane = tiling.width * tiling.pitch, planes = call.features[k].data ? 2 : 1;
  T *g = shared<T>(), *e = planes == 2 ? g + plane : nullptr, *after = g + planes * plane;
  // Of `fisher` first the upstream weight u, then df; of `attribution` the upstream gradient of the map.
  const PixelRows<T> rows{after, after + tiling.width, after + 2 * tiling.width};
  Team<T> team{tiling.lanes, tiling.lane_bits, after + 3 * tiling.width};
  const int64_t weight = (call.first_tensor + k) * call.batch + place.sample;
  const T of_fisher = call.values[k] ? T(call.fisher_weight[weight]) : T(0), of_square = e ? T(call.attribution_weight[weight]) : T(0);

  for (int i = place.first_tile; i < place.last_tile; ++i) {
    if (i > place.first_tile) __syncthreads();
    const int k = recomputed(place.tiling);
    const Tiling& tiling = call.tilings[k];
    const Tile tile = tile_at(tiling, place.sample, i);
    const int64_t row = tile.sample * tiling.pixels + tile.begin;
    read_planes(call.grads + k, call.features + k, planes, tile, g);
#pragma unroll 1
    for (int p = threadIdx.x; p < tile.width; p += blockDim.x) {
      const bool inside = p < tile.count;
      rows.f[p] = (call.values[k] && inside ? read_pixel<T>(call.values[k], row + p) : T(1)) + T(call.eps);
      rows.fisher[p] = of_fisher + (call.fisher_maps[k] && inside ? read_pixel<T>(call.fisher_maps[k], row + p) : T(0));
      rows.attribution[p] = call.attribution_maps[k] && inside ? read_pixel<T>(call.attribution_maps[k], row + p) : T(0);
    }
    __syncthreads();
#pragma unroll 1
    for (int first = 0; first < tile.width; first += team.pixels_at_once()) {
      const int p = first + team.pixel();
      const int at = p * tile.pitch;
      const bool counts = counted(tiling, tile, p);
      T *g_of_pixel = g + at, *e_of_pixel = e ? e + at : nullptr;
      const T f = rows.f[p], u = call.values[k] ? rows.fisher[p] / f : T(0);
      T v = of_square;
      if (call.attribution_maps[k]) {
        const T square = sums_of_pixel(g_of_pixel, e_of_pixel, tiling.quads, team).square;
        v += square == 0 ? T(0) : rows.attribution[p] / (2 * square_root(square));
      }
      const T norm = gradient_of_pixel(g_of_pixel, e_of_pixel, tiling.quads, team, counts, 2 * u, 2 * v);
      __syncwarp();  // all threads of the team have read u
      if (team.lane() == 0) rows.fisher[p] = counts ? -u * norm / f : T(0);
    }
    __syncthreads();
    write_planes(call.to_grads + k, call.to_features + k, planes, tile, g);
#pragma unroll 1
    for (int p = threadIdx.x; p < tile.count; p += blockDim.x)
      if (call.to_values[k]) static_cast<T*>(call.to_values[k])[row + p] = rows.fisher[p];
  }
}

}  // namespace

// At most 64 registers a thread (128 in float64): 1024 of them fit a multiprocessor.
#define MRF_KERNEL(pass, name, type)                                                  \
  extern "C" __global__ void __launch_bounds__(most_threads(sizeof(type)), 1)           \
      gradient_statistics_##pass##_##name(const __grid_constant__ GradientStatistics call) { \
    pass<type>(call);                                                                 \
  }
MRF_KERNEL(forward, float32, float)
MRF_KERNEL(forward, float64, double)
MRF_KERNEL(backward, float32, float)
MRF_KERNEL(backward, float64, double)

const char* launch(const GradientStatistics& call, const Launch& launch, bool backward, bool wide, void* stream) {
  auto* kernel = backward ? (wide ? gradient_statistics_backward_float64 : gradient_statistics_backward_float32)
                          : (wide ? gradient_statistics_forward_float64 : gradient_statistics_forward_float32);
  return run_kernel(kernel, call, launch, stream);
}

}  // namespace cuda
}  // namespace mrf
