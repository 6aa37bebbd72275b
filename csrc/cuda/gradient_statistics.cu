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
// Work: a warp takes tiles of up to 32 pixels (64 of 16 bits where pixels lie side by side) of one sample of one tensor, all channels of g
// and e (warp_tile.h); one launch covers all tensors of one type and layout. So the backward pass has sum_c (g e)^2, which the gradient of a
// root needs first, without a second reading. Gradients replace g and e in place.
//
// Sizes: call.h.
#include "launch.h"
#include "warp_tile.h"

namespace mrf {
namespace cuda {
namespace {

template <class T, class Storage, int Pixels_, int Channels_>
class StatisticsTile : WarpTile<T, Storage, Pixels_, Channels_> {
  using Tile = WarpTile<T, Storage, Pixels_, Channels_>;
  static constexpr int Pixels = Tile::Pixels, n = Tile::n, kStep = n < 4 ? 4 / n : 1;
  using Tile::groups, Tile::part, Tile::tiling;

 public:
  T fisher = 0, square = 0;  // of the calling lane, forward: sums over its pixels
  int counted = 0;

  __device__ StatisticsTile(const GradientStatistics& call, const Place& at, unsigned char* memory)
      : Tile(call.tilings[at.tiling]),
        call_(call),
        k_(at.tiling),
        sample_(at.sample),
        has_e_(call.features[at.tiling].data != nullptr),
        g_(shared_address(memory)),
        e_(g_ + Tile::plane_bytes()) {}

  __device__ void forward(int64_t begin) {
    bring(begin);
#pragma unroll 1
    for (int turn = 0; turn < Tile::turns; ++turn) forward_turn(begin, turn);
  }

  __device__ void backward(int64_t begin) {
    bring(begin);
#pragma unroll 1
    for (int turn = 0; turn < Tile::turns; ++turn) backward_turn(begin, turn);
    __syncwarp();
    Tile::take(call_.to_grads[k_], sample_, begin, g_, true);
    if (has_e_) Tile::take(call_.to_features[k_], sample_, begin, e_, true);
  }

 private:
  __device__ void forward_turn(int64_t begin, int turn) {
    read(begin, turn);
    find_sums();
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      const T of_fisher = valid_[p] ? norm_[p] / f_[p] : T(0), of_square = valid_[p] ? square_[p] : T(0);
      if (part != 0 || !inside_[p]) continue;
      fisher += of_fisher, square += of_square, counted += valid_[p];
      if (call_.fisher_maps[k_]) at<T>(call_.fisher_maps[k_], p) = of_fisher;
      if (call_.attribution_maps[k_]) at<T>(call_.attribution_maps[k_], p) = square_root(of_square);
    }
  }

  __device__ void backward_turn(int64_t begin, int turn) {
    read(begin, turn);
    T u[Pixels], v[Pixels];
    const int64_t weight = (call_.first_tensor + k_) * call_.batch + sample_;
    const T of_fisher = call_.values[k_] ? T(call_.fisher_weight[weight]) : T(0), of_square = has_e_ ? T(call_.attribution_weight[weight]) : T(0);
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      u[p] = of_fisher + (call_.fisher_maps[k_] && inside_[p] ? at<T>(call_.fisher_maps[k_], p) : T(0));
      u[p] = call_.values[k_] ? u[p] / f_[p] : T(0), v[p] = of_square;
    }
    if (call_.attribution_maps[k_]) {
      find_sums();
#pragma unroll
      for (int p = 0; p < Pixels; ++p)
        if (inside_[p] && square_[p] != 0) v[p] += at<T>(call_.attribution_maps[k_], p) / (2 * square_root(square_[p]));
    }
    write_gradients(u, v);
#pragma unroll
    for (int p = 0; p < Pixels; ++p)
      if (part == 0 && inside_[p] && call_.to_values[k_]) at<T>(call_.to_values[k_], p) = valid_[p] ? -u[p] * norm_[p] / f_[p] : T(0);
  }

  template <class X>
  __device__ X& at(void* data, int p) const { return static_cast<X*>(data)[first_ + p]; }

  __device__ void bring(int64_t begin) {
    __syncwarp();  // all lanes have done with the tile before
    Tile::bring(call_.grads[k_], sample_, begin, g_);
    if (has_e_) Tile::bring(call_.features[k_], sample_, begin, e_);
  }

  __device__ void read(int64_t begin, int turn) {
    Tile::start(turn);
    const int64_t pixel = begin + Tile::first;
    first_ = sample_ * tiling.pixels + pixel;
#pragma unroll
    for (int p = 0; p < Pixels; ++p) {
      inside_[p] = pixel + p < tiling.pixels;
      valid_[p] = inside_[p] && (tiling.mask == nullptr || tiling.mask[first_ + p]);
      f_[p] = (call_.values[k_] && inside_[p] ? at<T>(call_.values[k_], p) : T(1)) + T(call_.eps);
    }
    if (turn == 0) wait_for_copies();
  }

  // f over the lanes of each pixel.
  __device__ void combine(T (&x)[Pixels]) const {
#pragma unroll 1
    for (int o = groups; o < 32; o *= 2)
#pragma unroll
      for (int p = 0; p < Pixels; ++p) x[p] += __shfl_xor_sync(kWarp, x[p], o);
  }

  // f(g, e) of the elements of a step, which f may change: then they are stored.
  template <bool Store, class F>
  __device__ void each_element(F f) {
    Tile::template each_step<kStep>([&](auto elements, int, int, int at) {
      constexpr int count = decltype(elements)::value;
      T g[count], e[count] = {};
      Tile::load(g_ + at, g);
      if (has_e_) Tile::load(e_ + at, e);
#pragma unroll
      for (int i = 0; i < count; ++i) f(g[i], e[i], i % Pixels);
      if constexpr (Store) {
        Tile::store(g_ + at, g);
        if (has_e_) Tile::store(e_ + at, e);
      }
    });
  }

  __device__ void find_sums() {
#pragma unroll
    for (int p = 0; p < Pixels; ++p) norm_[p] = square_[p] = 0;
    each_element<false>([&](T g, T e, int p) {
      const T ge = g * e;
      norm_[p] = fused(g, g, norm_[p]), square_[p] = fused(ge, ge, square_[p]);
    });
    combine(norm_), combine(square_);
  }

  // dg and de in place of g and e, 0 where a pixel does not count; and sum_c g^2.
  __device__ void write_gradients(const T (&u)[Pixels], const T (&v)[Pixels]) {
#pragma unroll
    for (int p = 0; p < Pixels; ++p) norm_[p] = 0;
    each_element<true>([&](T& g, T& e, int p) {
      const T from = g, vg = 2 * v[p] * from;
      norm_[p] = fused(from, from, norm_[p]);
      g = valid_[p] ? fused(vg * e, e, 2 * u[p] * from) : T(0), e = valid_[p] ? vg * from * e : T(0);
    });
    combine(norm_);
  }

  const GradientStatistics& call_;
  const int k_;
  const int64_t sample_;
  const bool has_e_;
  const unsigned g_, e_;
  int64_t first_;  // the number of this lane's first pixel
  // Of this lane's pixels.
  bool inside_[Pixels], valid_[Pixels];
  T f_[Pixels], norm_[Pixels], square_[Pixels];  // f + eps, sum_c g^2, sum_c (g e)^2
};

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

template <class T, class Storage, int Pixels, int Channels, bool Backward>
__device__ void run(const GradientStatistics& call) {
  const Place place = place_of_block(call.tilings, call.tensors);
  const int width = call.tilings[place.tiling].width, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  StatisticsTile<T, Storage, Pixels, Channels> tile(call, place, shared_memory + warp * call.warp_bytes);
#pragma unroll 1
  for (int k = place.first_tile + warp; k < place.last_tile; k += warps) {
    if constexpr (Backward) tile.backward(int64_t(k) * width);
    else tile.forward(int64_t(k) * width);
  }
  if constexpr (!Backward) {
    T* const rows = reinterpret_cast<T*>(shared_memory + warps * call.warp_bytes);
    const T sums[] = {sum_over(tile.fisher, 1), sum_over(tile.square, 1), sum_over(T(tile.counted), 1)};
    if (threadIdx.x % 32 == 0)
      for (int i = 0; i < 3; ++i) rows[warp * 3 + i] = sums[i];
    uint32_t* arrived = call.arrived + place.tiling * call.batch + place.sample;
    if (publish(rows, 3, static_cast<T*>(call.partial), arrived, call.tilings[place.tiling].blocks)) write_results<T>(call, place);
  }
}

}  // namespace

// At most 64 registers a thread (all in float64): as many warps fit a multiprocessor as their tiles leave room for.
#define MRF_KERNEL(name, type, storage, pixels, channels)                                                    \
  extern "C" __global__ void __launch_bounds__(256, 16 / sizeof(type)) gradient_statistics_forward_##name(   \
      const __grid_constant__ GradientStatistics call) {                                                     \
    run<type, storage, pixels, channels, false>(call);                                                       \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 16 / sizeof(type)) gradient_statistics_backward_##name(  \
      const __grid_constant__ GradientStatistics call) {                                                     \
    run<type, storage, pixels, channels, true>(call);                                                        \
  }
MRF_WARP_TILE_KERNELS

const char* launch(const GradientStatistics& call, const Launch& launch, bool backward, bool, void* stream) {
  using Kernel = void (*)(GradientStatistics);
  constexpr Kernel kernels[2][4][3] = {MRF_WARP_TILE_LIST(gradient_statistics_forward), MRF_WARP_TILE_LIST(gradient_statistics_backward)};
  return run_kernel(kernels[backward][int(call.grads[0].dtype)][int(call.unit)], call, launch, stream);
}

}  // namespace cuda
}  // namespace mrf
