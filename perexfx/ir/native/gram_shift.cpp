// Squared norms of a convolution's per-example kernel gradients from Gram matrices of pixels; nothing is unfolded.
//
// `sum_{t,s} <u_t, u_s> <g_t, g_s>` over output positions t and s, where the product of the windows u is a sum over taps
// of entries of the Gram matrix of pixels: those of one phase of the stride. Both matrices of one example stay in the
// cache of its thread, and only what lies at and below the diagonal is made.

#include "convolution.h"
#include "products.h"

namespace {

// The taps along one axis that read the same phase of the stride.
struct Phase {
  int64_t start, size;           // the first pixel, and how many, a stride apart
  std::vector<int64_t> offsets;  // of each tap, counted in strides from `start`
};

std::vector<Phase> phases_of(int64_t size, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  std::vector<Phase> found;
  for (int64_t start = 0; start < std::min(stride, size); ++start) {
    Phase phase{start, (size - start + stride - 1) / stride, {}};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t offset = tap * dilation - padding - start;
      if (offset % stride == 0) phase.offsets.push_back(offset / stride);
    }
    if (!phase.offsets.empty()) found.push_back(phase);
  }
  return found;
}

// sum_s row[s] other[s] over `rows` of `columns` neighbours each.
template <typename T>
inline void add_products(const T* row, int64_t by_row, const T* other, int64_t other_by_row, int64_t rows,
                         int64_t columns, Vector<T>& sums, T& rest) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  for (int64_t i = 0; i < rows; ++i, row += by_row, other += other_by_row) {
    int64_t j = 0;
    for (; j + LANES <= columns; j += LANES) sums += load(row + j) * load(other + j);
    for (; j < columns; ++j) rest += row[j] * other[j];
  }
}

// sum over pairs of positions of one tap: grams[t, s] of gradients times pixels[t + tap, s + tap].
template <typename T>
double shifted_product(const T* grams, int64_t width, const T* pixels, int64_t pixels_width, const Slide& s,
                       const Phase& vertical, const Phase& horizontal, int64_t down, int64_t right) {
  const int64_t top = std::max<int64_t>(0, -down), bottom = std::min(s.out_height, vertical.size - down);
  const int64_t left = std::max<int64_t>(0, -right), end = std::min(s.out_width, horizontal.size - right);
  double found = 0;
  for (int64_t h = top; h < bottom; ++h)
    for (int64_t w = left; w < end; ++w) {
      const T* of_grads = grams + (h * s.out_width + w) * width;
      const T* of_pixels = pixels + ((h + down) * horizontal.size + w + right) * pixels_width;
      const T* own = of_grads + top * s.out_width + left;
      const T* other = of_pixels + (top + down) * horizontal.size + left + right;
      Vector<T> sums{};
      T rest = 0;
      add_products(own, s.out_width, other, horizontal.size, h - top, end - left, sums, rest);
      own += (h - top) * s.out_width, other += (h - top) * horizontal.size;
      add_products(own, 0, other, 0, 1, w - left, sums, rest);
      found += 2 * (total<T>(sums) + rest) + own[w - left] * other[w - left];
    }
  return found;
}

// The lower half of the Gram matrix of an image's pixels, [height * width] of `channels` each.
template <typename T>
void gram_of_pixels(const T* image, const Strides& of, int64_t height, int64_t width, int64_t channels,
                    std::vector<T>& found, std::vector<T>& copied, std::vector<T>& columns) {
  const int64_t t = height * width;
  found.resize(t * rounded_up(t, Lanes<T>::COUNT));
  if (of.by_channel == 1 && of.by_row == width * of.by_column) {
    lower_gram(image, of.by_column, t, channels, found.data(), columns);
    return;
  }
  copied.resize(t * channels);
  for (int64_t h = 0; h < height; ++h)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t w = 0; w < width; ++w)
        copied[(h * width + w) * channels + c] = image[h * of.by_row + c * of.by_channel + w * of.by_column];
  lower_gram(copied.data(), channels, t, channels, found.data(), columns);
}

template <typename T>
void squared_norms(const T* x, const Strides& of_x, const T* g, const Strides& of_g, double* squares, const Slide& s,
                   int threads) {
  const int64_t width = rounded_up(s.out_height * s.out_width, Lanes<T>::COUNT);
  const auto vertical = phases_of(s.height, s.kernel_height, s.stride_height, s.padding_height, s.dilation_height);
  const auto horizontal = phases_of(s.width, s.kernel_width, s.stride_width, s.padding_width, s.dilation_width);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> columns, grams, pixels, copied;
#pragma omp for
    for (int64_t item = 0; item < s.n * s.groups; ++item) {
      const int64_t example = item / s.groups, group = item % s.groups;
      const T* grad = g + example * of_g.by_example + group * s.out_channels * of_g.by_channel;
      const T* image = x + example * of_x.by_example + group * s.in_channels * of_x.by_channel;
      gram_of_pixels(grad, of_g, s.out_height, s.out_width, s.out_channels, grams, copied, columns);
      double found = 0;
      for (const Phase& v : vertical)
        for (const Phase& h : horizontal) {
          Strides of_phase = of_x;
          of_phase.by_row *= s.stride_height, of_phase.by_column *= s.stride_width;
          const T* first = image + v.start * of_x.by_row + h.start * of_x.by_column;
          gram_of_pixels(first, of_phase, v.size, h.size, s.in_channels, pixels, copied, columns);
          const int64_t pixels_width = rounded_up(v.size * h.size, Lanes<T>::COUNT);
          for (int64_t down : v.offsets)
            for (int64_t right : h.offsets)
              found += shifted_product(grams.data(), width, pixels.data(), pixels_width, s, v, h, down, right);
        }
      squares[item] = found;
    }
  }
}

}  // namespace

// squares[n * groups]: those of an example's groups add up to its gradient's.
#define DEFINE(T, NAME)                                                                                     \
  extern "C" void NAME(const T* x, const Strides* of_x, const T* g, const Strides* of_g, double* squares,   \
                       const Slide* slide, int threads) {                                                   \
    squared_norms<T>(x, *of_x, g, *of_g, squares, *slide, threads);                                         \
  }
DEFINE(float, shifted_squares_float32)
DEFINE(double, shifted_squares_float64)
