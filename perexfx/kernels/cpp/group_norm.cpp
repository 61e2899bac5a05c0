// Group normalisation of images with their channels last.
//
// Every thread takes whole examples, one at a time: what the first pass over an image reads, the next finds in its cache.

#include <cmath>

#include "vectors.h"

namespace {

// Positions whose values are added up by themselves: one sum of a large image would lose digits.
constexpr int64_t BLOCK = 256;

// into[channels] = sum over positions of `term`, which takes an offset and a channel.
template <typename T, typename Term>
inline void sum_positions(int64_t positions, int64_t channels, T* into, const Term& term) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  std::fill(into, into + channels, T(0));
  for (int64_t first = 0; first < positions; first += BLOCK) {
    const int64_t last = std::min(positions, first + BLOCK);
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
      Vector<T> sums[4] = {};
      int64_t p = first;
      for (; p + 4 <= last; p += 4)
        for (int k = 0; k < 4; ++k) sums[k] += term.vector((p + k) * channels + c, c);
      for (; p < last; ++p) sums[0] += term.vector(p * channels + c, c);
      store(into + c, load(into + c) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
    for (; c < channels; ++c) {
      T sum = 0;
      for (int64_t p = first; p < last; ++p) sum += term.scalar(p * channels + c, c);
      into[c] += sum;
    }
  }
}

template <typename T>
struct Values {
  const T* x;
  Vector<T> vector(int64_t at, int64_t) const { return load(x + at); }
  T scalar(int64_t at, int64_t) const { return x[at]; }
};

template <typename T>
struct SquaredDeviations {
  const T *x, *mean;  // mean of each channel's group
  Vector<T> vector(int64_t at, int64_t c) const {
    const Vector<T> deviation = load(x + at) - load(mean + c);
    return deviation * deviation;
  }
  T scalar(int64_t at, int64_t c) const { return (x[at] - mean[c]) * (x[at] - mean[c]); }
};

template <typename T>
struct DeviationsTimes {
  const T *x, *mean, *g;
  Vector<T> vector(int64_t at, int64_t c) const { return (load(x + at) - load(mean + c)) * load(g + at); }
  T scalar(int64_t at, int64_t c) const { return (x[at] - mean[c]) * g[at]; }
};

// means[channels], from sums[channels]: of each group, for every one of its channels.
template <typename T>
void spread_over_groups(T* values, int64_t channels, int64_t groups, double scale) {
  const int64_t each = channels / groups;
  for (int64_t group = 0; group < groups; ++group) {
    double sum = 0;
    for (int64_t c = group * each; c < (group + 1) * each; ++c) sum += values[c];
    for (int64_t c = group * each; c < (group + 1) * each; ++c) values[c] = T(sum * scale);
  }
}

// y = x a + b, with a factor and a summand per channel.
template <typename T>
void scale_channels(const T* x, const T* a, const T* b, T* y, int64_t positions, int64_t channels) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  for (int64_t p = 0; p < positions; ++p, x += channels, y += channels) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) store(y + c, load(x + c) * load(a + c) + load(b + c));
    for (; c < channels; ++c) y[c] = x[c] * a[c] + b[c];
  }
}

// The same of two images: into = g a + x p + q.
template <typename T>
void scale_both(const T* g, const T* x, const T* a, const T* p, const T* q, T* into, int64_t positions,
                int64_t channels) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  for (int64_t at = 0; at < positions; ++at, g += channels, x += channels, into += channels) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES)
      store(into + c, load(g + c) * load(a + c) + (load(x + c) * load(p + c) + load(q + c)));
    for (; c < channels; ++c) into[c] = g[c] * a[c] + (x[c] * p[c] + q[c]);
  }
}

template <typename T>
void forward(const T* x, const T* weight, const T* bias, T* y, T* means, T* rstds, int64_t n, int64_t positions,
             int64_t channels, int64_t groups, double eps, int threads) {
  const int64_t each = channels / groups;
  const double one = 1.0 / (positions * each);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> memory(4 * channels);
    T *mean = memory.data(), *variance = mean + channels, *a = variance + channels, *b = a + channels;
#pragma omp for
    for (int64_t example = 0; example < n; ++example) {
      const T* image = x + example * positions * channels;
      sum_positions(positions, channels, mean, Values<T>{image});
      spread_over_groups(mean, channels, groups, one);
      sum_positions(positions, channels, variance, SquaredDeviations<T>{image, mean});
      spread_over_groups(variance, channels, groups, one);
      for (int64_t c = 0; c < channels; ++c) {
        const T rstd = T(1 / std::sqrt(double(variance[c]) + eps));
        a[c] = weight ? weight[c] * rstd : rstd;
        b[c] = (bias ? bias[c] : T(0)) - mean[c] * a[c];
        means[example * groups + c / each] = mean[c], rstds[example * groups + c / each] = rstd;
      }
      scale_channels(image, a, b, y + example * positions * channels, positions, channels);
    }
  }
}

// With b = sum g and d = sum g (x - mean) over positions, the weight's gradient is d rstd and the bias' is b; the
// input's is g w rstd - (x - mean) rstd^3 (sum over the group of d w) / m - rstd (sum over the group of b w) / m.
template <typename T>
void backward(const T* g, const T* x, const T* weight, const T* means, const T* rstds, T* grad_input, T* grad_weight,
              T* grad_bias, int64_t n, int64_t positions, int64_t channels, int64_t groups, int threads) {
  const int64_t each = channels / groups;
  const double one = 1.0 / (positions * each);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> memory(4 * channels);
    T *mean = memory.data(), *a = mean + channels, *p = a + channels, *q = p + channels;
#pragma omp for
    for (int64_t example = 0; example < n; ++example) {
      const T *grads = g + example * positions * channels, *image = x + example * positions * channels;
      T *of_weight = grad_weight + example * channels, *of_bias = grad_bias + example * channels;
      const T* rstd = rstds + example * groups;
      for (int64_t c = 0; c < channels; ++c) mean[c] = means[example * groups + c / each];
      sum_positions(positions, channels, of_bias, Values<T>{grads});
      sum_positions(positions, channels, of_weight, DeviationsTimes<T>{image, mean, grads});
      for (int64_t c = 0; c < channels; ++c) {
        const T w = weight ? weight[c] : T(1);
        a[c] = w * rstd[c / each], p[c] = of_weight[c] * w, q[c] = of_bias[c] * w;
        of_weight[c] *= rstd[c / each];
      }
      spread_over_groups(p, channels, groups, one);
      spread_over_groups(q, channels, groups, one);
      for (int64_t c = 0; c < channels; ++c) {
        const T r = rstd[c / each];
        p[c] = -p[c] * r * r * r;  // from the left: the cube of r alone may be no number
        q[c] = -q[c] * r - mean[c] * p[c];
      }
      if (grad_input)
        scale_both(grads, image, a, p, q, grad_input + example * positions * channels, positions, channels);
    }
  }
}

}  // namespace

// Images [n, positions, channels]; weight and bias [channels], or null; means and rstds [n, groups]; gradients of weight
// and bias [n, channels], of the input as the input, or null.
#define DEFINE(T, FORWARD, BACKWARD)                                                                               \
  extern "C" void FORWARD(const T* x, const T* weight, const T* bias, T* y, T* means, T* rstds, int64_t n,         \
                          int64_t positions, int64_t channels, int64_t groups, double eps, int threads) {          \
    forward<T>(x, weight, bias, y, means, rstds, n, positions, channels, groups, eps, threads);                    \
  }                                                                                                                \
  extern "C" void BACKWARD(const T* g, const T* x, const T* weight, const T* means, const T* rstds, T* grad_input, \
                           T* grad_weight, T* grad_bias, int64_t n, int64_t positions, int64_t channels,           \
                           int64_t groups, int threads) {                                                          \
    backward<T>(g, x, weight, means, rstds, grad_input, grad_weight, grad_bias, n, positions, channels, groups,    \
                threads);                                                                                          \
  }
DEFINE(float, group_norm_float32, group_norm_back_float32)
DEFINE(double, group_norm_float64, group_norm_back_float64)
