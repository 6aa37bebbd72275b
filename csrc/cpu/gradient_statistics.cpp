// gradient_statistics on the CPU: per pixel, with the gradient g and the feature e (C channels) and the positive value f,
//
//   fisher_map = sum_c g^2 / (f + eps)        square = sum_c (g e)^2        attribution_map = sqrt(square)
//
// forward: the sums of fisher_map and of square over the valid pixels of a unit, and the maps where asked; backward, with u and v the
// upstream weights of fisher_map and of square:
//
//   dg = 2 u / (f + eps) g + 2 v g e^2        de = 2 v g^2 e        df = -u sum_c g^2 / (f + eps)^2
//
// Memory: forward reads g and e once, backward reads them once and writes dg and de once, around the caches (where an upstream gradient
// of the attribution map needs `square` first, the tile is read a second time from L2).
//
// Work: a unit is a tile of pixels of one sample of one tensor. It is read in contiguous lines, a channel of the tile or (channels
// last) a pixel, with one accumulator per pixel in L1; sums are taken in blocks of 16, because one over 1000 channels would lose digits.
// The line after it is prefetched meanwhile, because the hardware prefetches no further than to the end of a page (past the last line the
// prefetch is of no use, and of no harm). Each unit's sums have a place of their own, so any number of threads gives the same bits.
#include "rows.h"

namespace mrf {
namespace MRF_ISA {
namespace {

template <class T, class Storage>
MRF_INLINE V<T> load_some(const Storage* p, int64_t count) {
  if (count >= kLanes<T>) return Convert<T, Storage>::load(p);
  Storage tail[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) tail[i] = p[i];
  return Convert<T, Storage>::load(tail);
}

template <class T, class Storage>
MRF_INLINE void store_some(Storage* p, V<T> x, int64_t count, bool streams) {
  if (count >= kLanes<T>) {
    if (streams)
      stream<T, Storage>(p, x);
    else
      Convert<T, Storage>::store(p, x);
    return;
  }
  Storage narrow[kLanes<T>];
  Convert<T, Storage>::store(narrow, x);
  for (int64_t i = 0; i < count; ++i) p[i] = narrow[i];
}

// How many channels, or registers of them, are added up before that is added to the sum.
constexpr int kBlock = 16;

// The lines of a tile: contiguous runs of channels (channels last) or of pixels.
template <class T, bool PixelLines>
struct Lines {
  int64_t count, length;
  Lines(const Tiling& tiling, const Unit& unit) : count(tiling.channels), length(unit.end - unit.begin) {
    if (!PixelLines) {
      const int64_t swap = count;
      count = length;
      length = swap;
    }
  }
  // The end of the block of a line that starts at i: lines of pixels are not cut.
  int64_t end(int64_t i) const { return PixelLines || i + kBlock * kLanes<T> > length ? length : i + kBlock * kLanes<T>; }
  static int64_t stride(const View& view) { return PixelLines ? view.channel_stride : view.pixel_stride; }
};

// Sums over the channels for every pixel of a unit, a row of lines that are channels.
template <class T>
struct PixelSums {
  T *sum, *of_block;

  void start(int64_t pixels) const {
    for (int64_t i = 0; i < pixels; i += kLanes<T>) store<T>(sum + i, V<T>{}), store<T>(of_block + i, V<T>{});
  }
  MRF_INLINE void add(int64_t i, V<T> x) const { store<T>(of_block + i, load<T>(of_block + i) + x); }
  // After each channel.
  void keep(int64_t channel, int64_t channels, int64_t pixels) const {
    if (channel % kBlock < kBlock - 1 && channel + 1 < channels) return;
    for (int64_t i = 0; i < pixels; i += kLanes<T>) {
      store<T>(sum + i, load<T>(sum + i) + load<T>(of_block + i));
      store<T>(of_block + i, V<T>{});
    }
  }
};

// norm[p] = sum_c g^2 and square[p] = sum_c (g e)^2 for every pixel of the unit.
template <class T, class Storage, bool PixelLines, bool HasFeature>
void sums_over_channels(const Lines<T, PixelLines>& lines, const Storage* g, int64_t g_stride, const Storage* e, int64_t e_stride,
                        const PixelSums<T>& norm, const PixelSums<T>& square) {
  constexpr int n = kLanes<T>;
  if (PixelLines) norm.start(lines.length);
  if (PixelLines && HasFeature) square.start(lines.length);
  for (int64_t line = 0; line < lines.count; ++line, g += g_stride, e += HasFeature ? e_stride : 0) {
    V<T> norm_of_line = {}, square_of_line = {};
    for (int64_t begin = 0; begin < lines.length; begin = lines.end(begin)) {
      V<T> norm_of_block = {}, square_of_block = {};
      for (int64_t i = begin; i < lines.end(begin); i += n) {
        prefetch(g + g_stride + i);
        const V<T> gradient = load_some<T>(g + i, lines.length - i), g2 = gradient * gradient;
        V<T> ge2 = {};
        if constexpr (HasFeature) {
          prefetch(e + e_stride + i);
          const V<T> ge = gradient * load_some<T>(e + i, lines.length - i);
          ge2 = ge * ge;
        }
        if constexpr (PixelLines) {
          norm.add(i, g2);
          if constexpr (HasFeature) square.add(i, ge2);
        } else {
          norm_of_block += g2;
          square_of_block += ge2;
        }
      }
      norm_of_line += norm_of_block;
      square_of_line += square_of_block;
    }
    if constexpr (PixelLines) {
      norm.keep(line, lines.count, lines.length);
      if (HasFeature) square.keep(line, lines.count, lines.length);
    } else {
      norm.sum[line] = sum_of_lanes<T>(norm_of_line);
      square.sum[line] = sum_of_lanes<T>(square_of_line);
    }
  }
}

template <class T, class Storage, bool PixelLines>
void sums_over_channels(const Tiling& tiling, const Unit& unit, const View& grad, const View* feature, const PixelSums<T>& norm,
                        const PixelSums<T>& square) {
  const Lines<T, PixelLines> lines(tiling, unit);
  const Storage* g = at<Storage>(grad, unit);
  if (feature)
    sums_over_channels<T, Storage, PixelLines, true>(lines, g, lines.stride(grad), at<Storage>(*feature, unit), lines.stride(*feature),
                                                     norm, square);
  else
    sums_over_channels<T, Storage, PixelLines, false>(lines, g, lines.stride(grad), nullptr, 0, norm, square);
}

template <class T>
MRF_INLINE T square_root(T x) {
  return sizeof(T) == 4 ? T(__builtin_sqrtf(float(x))) : T(__builtin_sqrt(double(x)));
}

template <class T, class Storage, bool PixelLines>
void forward_unit(const GradientStatistics& problem, const Unit& unit, int64_t index, T* scratch) {
  const int k = unit.tiling;
  const Tiling& tiling = problem.tilings[k];
  const int64_t row = unit.sample * tiling.pixels + unit.begin, stride = tiling.tile + kLanes<T>;
  T *norm = scratch, *square = norm + stride, *of_blocks = square + stride;
  sums_over_channels<T, Storage, PixelLines>(tiling, unit, problem.grads[k], problem.features ? &problem.features[k] : nullptr,
                                             {norm, of_blocks}, {square, of_blocks + stride});
  double fisher_sum = 0, square_sum = 0;
  int64_t valid = 0;
  for (int64_t i = 0; i < unit.end - unit.begin; ++i) {
    const bool counts = tiling.mask == nullptr || tiling.mask[row + i];
    valid += counts;
    if (problem.values) {
      const T f = ((const T*)problem.values[k].data)[row + i];
      const T fisher = counts ? norm[i] / (f + T(problem.eps)) : T(0);
      fisher_sum += fisher;
      if (problem.fisher_maps) ((T*)problem.fisher_maps[k])[row + i] = fisher;
    }
    if (problem.features) {
      const T counted = counts ? square[i] : T(0);
      square_sum += counted;
      if (problem.attribution_maps) ((T*)problem.attribution_maps[k])[row + i] = square_root(counted);
    }
  }
  problem.partial[2 * index] = fisher_sum;
  problem.partial[2 * index + 1] = square_sum;
  problem.valid[index] = valid;
}

template <class T, class Storage, bool PixelLines>
void backward_unit(const GradientStatistics& problem, const Unit& unit, int64_t, T* scratch) {
  constexpr int n = kLanes<T>;
  const int k = unit.tiling;
  const Tiling& tiling = problem.tilings[k];
  const int64_t pixels = unit.end - unit.begin, row = unit.sample * tiling.pixels + unit.begin, sample = k * problem.batch + unit.sample;
  const View* feature = problem.features ? &problem.features[k] : nullptr;
  // Per pixel: 2 u / (f + eps), 2 v, whether it counts, sum_c g^2, and sums of blocks of channels.
  const int64_t stride = tiling.tile + n;
  T *u2 = scratch, *v2 = u2 + stride, *norm = v2 + stride, *counted = norm + stride, *of_blocks = counted + stride;
  const PixelSums<T> norms{norm, of_blocks};

  const bool maps = feature && problem.attribution_map_grads;
  if (maps) sums_over_channels<T, Storage, PixelLines>(tiling, unit, problem.grads[k], feature, norms, {v2, of_blocks + stride});
  for (int64_t i = 0; i < pixels; ++i) {
    const bool counts = tiling.mask == nullptr || tiling.mask[row + i];
    T u = 0, v = 0;
    if (problem.values) {
      u = T(problem.fisher_weight[sample]);
      if (problem.fisher_map_grads) u += ((const T*)problem.fisher_map_grads[k])[row + i];
      u *= 2 / (((const T*)problem.values[k].data)[row + i] + T(problem.eps));
    }
    if (feature) {
      v = T(2 * problem.attribution_weight[sample]);
      if (maps) v += v2[i] == 0 ? T(0) : ((const T*)problem.attribution_map_grads[k])[row + i] / square_root(v2[i]);
    }
    u2[i] = counts ? u : T(0);
    v2[i] = counts ? v : T(0);
    counted[i] = counts ? T(1) : T(0);
  }

  const Lines<T, PixelLines> lines(tiling, unit);
  const int64_t g_stride = lines.stride(problem.grads[k]), dg_stride = lines.stride(problem.to_grads[k]);
  const int64_t e_stride = feature ? lines.stride(*feature) : 0, de_stride = feature ? lines.stride(problem.to_features[k]) : 0;
  const Storage *g = at<Storage>(problem.grads[k], unit), *e = feature ? at<Storage>(*feature, unit) : nullptr;
  Storage *dg = at<Storage>(problem.to_grads[k], unit), *de = feature ? at<Storage>(problem.to_features[k], unit) : nullptr;
  const bool streams_dg = aligned<T>(dg, dg_stride), streams_de = aligned<T>(de, de_stride);
  if (PixelLines) norms.start(pixels);
  for (int64_t line = 0; line < lines.count; ++line, g += g_stride, dg += dg_stride, e += e_stride, de += de_stride) {
    V<T> norm_of_line = {};
    for (int64_t begin = 0; begin < lines.length; begin = lines.end(begin)) {
      V<T> norm_of_block = {};
      for (int64_t i = begin; i < lines.end(begin); i += n) {
        const int64_t here = lines.length - i;
        const V<T> u = PixelLines ? load<T>(u2 + i) : broadcast(u2[line]), v = PixelLines ? load<T>(v2 + i) : broadcast(v2[line]);
        const I<T> counts = (PixelLines ? load<T>(counted + i) : broadcast(counted[line])) != T(0);
        prefetch(g + g_stride + i);
        if (feature) prefetch(e + e_stride + i);
        const V<T> gradient = load_some<T>(g + i, here), g2 = gradient * gradient;
        V<T> to_gradient = u * gradient;
        if (feature) {
          const V<T> x = load_some<T>(e + i, here), vg = v * gradient;
          to_gradient += vg * x * x;
          store_some<T>(de + i, select<T>(counts, vg * gradient * x, V<T>{}), here, streams_de);
        }
        store_some<T>(dg + i, select<T>(counts, to_gradient, V<T>{}), here, streams_dg);
        if constexpr (PixelLines)
          norms.add(i, g2);
        else
          norm_of_block += g2;
      }
      norm_of_line += norm_of_block;
    }
    if constexpr (PixelLines)
      norms.keep(line, lines.count, pixels);
    else
      norm[line] = sum_of_lanes<T>(norm_of_line);
  }
  if (problem.to_values)
    for (int64_t i = 0; i < pixels; ++i) {
      const T f = ((const T*)problem.values[k].data)[row + i] + T(problem.eps);
      ((T*)problem.to_values[k].data)[row + i] = counted[i] != 0 ? -u2[i] / 2 * norm[i] / f : T(0);
    }
}

template <class T, bool Backward>
void run_unit(const GradientStatistics& problem, const Unit& unit, int64_t index, T* scratch) {
  const bool pixel_lines = problem.grads[unit.tiling].pixel_stride == 1;
  with_storage<T>(problem.tilings[unit.tiling].dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    auto* function = Backward ? (pixel_lines ? backward_unit<T, Storage, true> : backward_unit<T, Storage, false>)
                              : (pixel_lines ? forward_unit<T, Storage, true> : forward_unit<T, Storage, false>);
    function(problem, unit, index, scratch);
  });
}

template <bool Backward>
void run(const GradientStatistics& problem, int64_t* counter, void* scratch) {
  for (int64_t unit; (unit = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)) < problem.units;) {
    const Unit here = locate(problem.tilings, problem.tensors, unit);
    if (problem.tilings[here.tiling].dtype == DType::float64)
      run_unit<double, Backward>(problem, here, unit, (double*)scratch);
    else
      run_unit<float, Backward>(problem, here, unit, (float*)scratch);
  }
  if constexpr (Backward) finish_streams();
}

}  // namespace

extern const Kernel<GradientStatistics> gradient_statistics_forward = run<false>, gradient_statistics_backward = run<true>;

}  // namespace MRF_ISA
}  // namespace mrf
