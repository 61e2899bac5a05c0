// Squared norms of a convolution's per-example kernel gradients from Gram matrices of pixels; nothing is unfolded.
//
// `sum_{t,s} <u_t, u_s> <g_t, g_s>` over output positions t and s, where the product of the windows u is a sum over taps
// of entries of the Gram matrix of pixels: those of one phase of the stride. Both matrices of one example stay in the
// cache of its thread, and only what lies at and below the diagonal is made.

#include "gram.h"
#include "images.h"

namespace {

// The taps along one axis that read the same phase of the stride.
struct Phase {
  int64_t start, size;         // the first pixel, and how many, a stride apart
  int64_t first, span;         // the least position that a tap reads, counted in strides; how many they read together
  std::vector<int64_t> taps;    // which
  std::vector<int64_t> shifts;  // of each tap, from the first
};

std::vector<Phase> phases_of(int64_t size, int64_t out_size, int64_t taps, int64_t stride, int64_t padding,
                             int64_t dilation) {
  std::vector<Phase> found;
  for (int64_t start = 0; start < std::min(stride, size); ++start) {
    Phase phase{start, (size - start + stride - 1) / stride, 0, 0, {}, {}};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t offset = tap * dilation - padding - start;
      if (offset % stride != 0) continue;
      if (phase.shifts.empty()) phase.first = offset / stride;
      phase.taps.push_back(tap);
      phase.shifts.push_back(offset / stride - phase.first);
    }
    if (phase.shifts.empty()) continue;
    phase.span = phase.shifts.back() + out_size;
    found.push_back(phase);
  }
  return found;
}

// The lower half of a Gram matrix of pixels on a grid, with zeros where the grid has none and above the diagonal.
template <typename T>
struct Grid {
  int64_t height, width, stride;
  std::vector<T> values;

  Grid(int64_t height, int64_t width)
      : height(height), width(width), stride(rounded_up(height * width, Lanes<T>::COUNT)),
        values(height * width * stride + stride + Lanes<T>::COUNT) {}
};

// What one thread works with.
template <typename T>
struct Memory {
  std::vector<T> tiles, gram, pixels;
};

// Fills a grid, whose first row and column are at `top` and `left` of an image of `rows` times `columns` pixels.
template <typename T>
void fill(Grid<T>& grid, const T* image, const Strides& of, int64_t rows, int64_t columns, int64_t channels, int64_t top,
          int64_t left, Memory<T>& memory) {
  const int64_t h0 = std::max<int64_t>(0, top), h1 = std::min(rows, top + grid.height);
  const int64_t w0 = std::max<int64_t>(0, left), w1 = std::min(columns, left + grid.width);
  if (h1 <= h0 || w1 <= w0) return;
  const int64_t wide = w1 - w0, t = (h1 - h0) * wide, stride = rounded_up(t, Lanes<T>::COUNT);
  const T* pixels = image + h0 * of.by_row + w0 * of.by_column;
  int64_t by_pixel = of.by_column;
  if (of.by_channel != 1 || of.by_row != wide * of.by_column) {
    memory.pixels.resize(t * channels);
    copy_pixels(pixels, of, channels, h1 - h0, wide, memory.pixels.data(), channels);
    pixels = memory.pixels.data(), by_pixel = channels;
  }
  memory.gram.resize(t * stride);
  gram_tiles(Rows<T>{pixels, by_pixel, t, channels}, 0, t, memory.tiles);
  from_tiles(memory.tiles, t, memory.gram.data(), stride);
  for (int64_t r = 0; r < t; ++r) {
    const T* from = memory.gram.data() + r * stride;
    T* into = grid.values.data() + ((h0 - top + r / wide) * grid.width + w0 - left + r % wide) * grid.stride;
    for (int64_t s = 0; s <= r; s += wide)
      std::copy(from + s, from + std::min(s + wide, r + 1), into + (h0 - top + s / wide) * grid.width + w0 - left);
  }
}

// What a tap reads: how far from a position, and what its squares count.
struct Tap {
  int64_t shift;
  double weight;
};

// sum over pairs of output positions and taps: grads[t, s] times pixels[t + tap, s + tap]; both grids are equally wide.
template <typename T>
double shifted_product(const Grid<T>& grads, const Grid<T>& pixels, int64_t out_width, const std::vector<Tap>& taps) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  double found = 0;
  for (int64_t h = 0; h < grads.height; ++h)
    for (int64_t w = 0; w < out_width; ++w) {
      const int64_t t = h * grads.width + w;
      const T* row = grads.values.data() + t * grads.stride;
      Vector<T> sums{};
      double diagonal = 0;
      for (const Tap& tap : taps) {
        const T* other = pixels.values.data() + (t + tap.shift) * pixels.stride + tap.shift;
        Vector<T> own{};
        Vector<T>& into = tap.weight == 1 ? sums : own;
        for (int64_t s = 0; s <= t; s += LANES) into += load(row + s) * load(other + s);
        if (tap.weight != 1) sums += T(tap.weight) * own;
        diagonal += tap.weight * double(row[t]) * other[t];
      }
      found += 2 * total<T>(sums) - diagonal;
    }
  return found;
}

template <typename T>
void squared_norms(const T* x, const Strides& of_x, const T* g, const Strides& of_g, const double* weights, double* squares,
                   const Slide& s, int threads) {
  const auto vertical = phases_of(s.height, s.out_height, s.kernel_height, s.stride_height, s.padding_height,
                                  s.dilation_height);
  const auto horizontal = phases_of(s.width, s.out_width, s.kernel_width, s.stride_width, s.padding_width,
                                    s.dilation_width);
#pragma omp parallel num_threads(threads)
  {
    Memory<T> memory;
    int64_t width = s.out_width;  // of all grids
    for (const Phase& h : horizontal) width = std::max(width, h.span);
    Grid<T> grads(s.out_height, width);
    std::vector<Grid<T>> pixels;  // per pair of phases
    for (const Phase& v : vertical) pixels.insert(pixels.end(), horizontal.size(), Grid<T>(v.span, width));
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < s.n * s.groups; ++item) {
      const int64_t example = item / s.groups, group = item % s.groups;
      const T* grad = g + example * of_g.by_example + group * s.out_channels * of_g.by_channel;
      const T* image = x + example * of_x.by_example + group * s.in_channels * of_x.by_channel;
      fill(grads, grad, of_g, s.out_height, s.out_width, s.out_channels, 0, 0, memory);
      double found = 0;
      size_t at = 0;
      for (const Phase& v : vertical)
        for (const Phase& h : horizontal) {
          Strides of = of_x;
          of.by_row *= s.stride_height, of.by_column *= s.stride_width;
          const T* first = image + v.start * of_x.by_row + h.start * of_x.by_column;
          Grid<T>& grid = pixels[at++];
          fill(grid, first, of, v.size, h.size, s.in_channels, v.first, h.first, memory);
          std::vector<Tap> taps;
          for (size_t i = 0; i < v.taps.size(); ++i)
            for (size_t j = 0; j < h.taps.size(); ++j)
              taps.push_back({v.shifts[i] * width + h.shifts[j],
                              weights ? weights[v.taps[i] * s.kernel_width + h.taps[j]] : 1});
          found += shifted_product(grads, grid, s.out_width, taps);
        }
      squares[item] = found;
    }
  }
}

}  // namespace

// squares[n * groups]: those of an example's groups add up to its gradient's, where the squares of each tap's part count
// by weights[kernel height, kernel width], or all alike.
#define DEFINE(T, NAME)                                                                                     \
  extern "C" void NAME(const T* x, const Strides* of_x, const T* g, const Strides* of_g,                    \
                       const double* weights, double* squares, const Slide* slide, int threads) {           \
    squared_norms<T>(x, *of_x, g, *of_g, weights, squares, *slide, threads);                                \
  }
DEFINE(float, shifted_squares_float32)
DEFINE(double, shifted_squares_float64)
