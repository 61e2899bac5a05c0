// Every example's gradient of a convolution's kernel, and its square, in one pass; nothing is unfolded.
//
// One tap of the kernel over one example is a product of two matrices: the pixels that the tap reads, and the gradients
// at the positions where it is put. A thread takes one example and a block of output channels, and goes over positions
// in chunks, whose gradients it copies to where they stay in its cache while all taps read them.

#include "images.h"

namespace {

// Positions whose gradients are copied at a time.
constexpr int64_t CHUNK = 256;

// A rectangle of output positions of some frames, seen by one tap.
template <typename T>
struct Seen {
  const T* pixels;  // those that the tap reads, channels last
  int64_t by_frame, by_row, by_column;
  const T* grads;  // copied: a row per position
  int64_t grads_by_frame, grads_by_row;
  int64_t frames, rows, columns;
};

// Where sums of products go: `stride` from one input channel to the next; of the last vector, `some` lanes exist.
template <typename T>
struct Target {
  T* sums;
  int64_t stride, some;
  bool is_first;       // nothing has been added yet
  bool is_past_caches;
  Vector<T>* squares;  // of the finished sums, one vector per vector; or null
};

// Sums that are in the making at a time: each waits for its own last addition.
constexpr int BUSY = 8;

// sums[R, V vectors] += pixels[R] grads[V vectors] at one position.
template <typename T, int R, int V>
inline void add_outer(const T* pixel, const T* grad, Vector<T> (&sums)[R][V]) {
  Vector<T> g[V];
  for (int v = 0; v < V; ++v) g[v] = load(grad + v * Lanes<T>::COUNT);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] += pixel[r] * g[v];
}

// sums[V vectors] += pixels[V vectors] grads[V vectors] at one position: every channel has its own kernel.
template <typename T, int V>
inline void add_each(const T* pixel, const T* grad, Vector<T> (&sums)[1][V]) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  for (int v = 0; v < V; ++v) sums[0][v] += load(pixel + v * LANES) * load(grad + v * LANES);
}

// target[R, V vectors] += pixels[positions, R]^T grads[positions, V vectors], from input channel `c` on; or, with EACH,
// target[V vectors] += pixels * grads, channel by channel.
template <typename T, int R, int V, bool EACH = false>
inline void add_positions(const Seen<T>& seen, const Target<T>& target, int64_t c) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  constexpr int AT_ONCE = R * V >= BUSY ? 1 : BUSY / (R * V);  // positions, with sums of their own
  T* out = target.sums + c * target.stride;
  Vector<T> parts[AT_ONCE][R][V] = {};  // of these positions alone: one sum over all would lose digits
  const auto add = [](const T* pixel, const T* grad, Vector<T>(&into)[R][V]) {
    if constexpr (EACH)
      add_each<T, V>(pixel, grad, into);
    else
      add_outer<T, R, V>(pixel, grad, into);
  };
  for (int64_t f = 0; f < seen.frames; ++f)
    for (int64_t i = 0; i < seen.rows; ++i) {
      const T* pixel = seen.pixels + f * seen.by_frame + i * seen.by_row + c;
      const T* grad = seen.grads + f * seen.grads_by_frame + i * seen.grads_by_row;
      int64_t j = 0;
      for (; j + AT_ONCE <= seen.columns; j += AT_ONCE)
        for (int p = 0; p < AT_ONCE; ++p, pixel += seen.by_column, grad += V * LANES) add(pixel, grad, parts[p]);
      for (; j < seen.columns; ++j, pixel += seen.by_column, grad += V * LANES) add(pixel, grad, parts[0]);
    }
  Vector<T>(&sums)[R][V] = parts[0];
  for (int p = 1; p < AT_ONCE; ++p)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] += parts[p][r][v];
  if (!target.is_first)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        const T* from = out + r * target.stride + v * LANES;
        sums[r][v] += load_some(from, v + 1 < V ? LANES : target.some);
      }
  if (target.squares)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) target.squares[v] += sums[r][v] * sums[r][v];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      if (target.is_past_caches)
        store_past_caches(out + r * target.stride + v * LANES, sums[r][v]);
      else
        store_some(out + r * target.stride + v * LANES, sums[r][v], v + 1 < V ? LANES : target.some);
    }
}

template <typename T, int R, int V>
inline void add_last_channels(const Seen<T>& seen, const Target<T>& target, int64_t c, int64_t left) {
  if constexpr (R > 0) {
    if (left == R)
      add_positions<T, R, V>(seen, target, c);
    else
      add_last_channels<T, R - 1, V>(seen, target, c, left);
  }
}

template <typename T, int V>
void add_channels(const Seen<T>& seen, const Target<T>& target, int64_t channels) {
  int64_t c = 0;
  for (; c + ROWS <= channels; c += ROWS) add_positions<T, ROWS, V>(seen, target, c);
  add_last_channels<T, ROWS - 1, V>(seen, target, c, channels - c);
}

// The same for `vectors` <= V, known at run time.
template <typename T, int V>
void add_tap(const Seen<T>& seen, const Target<T>& target, int64_t channels, int64_t vectors, bool is_depthwise) {
  if constexpr (V > 0) {
    if (vectors < V)
      add_tap<T, V - 1>(seen, target, channels, vectors, is_depthwise);
    else if (is_depthwise)
      add_positions<T, 1, V, true>(seen, target, 0);
    else
      add_channels<T, V>(seen, target, channels);
  }
}

// Output positions [first, last) along one axis at which a tap reads a pixel, of those in [from, to).
inline void clip_positions(int64_t from, int64_t to, int64_t offset, int64_t stride, int64_t size, int64_t& first,
                           int64_t& last) {
  first = std::max(from, offset < 0 ? (-offset + stride - 1) / stride : 0);
  last = size - 1 < offset ? 0 : std::min(to, (size - 1 - offset) / stride + 1);
  last = std::max(first, last);
}

// Whether every channel has a kernel of its own. Groups then lie side by side as output channels do.
inline bool is_depthwise(const Slide& s) { return s.in_channels == 1 && s.out_channels == 1; }

// Output channels that are taken in blocks: those of a group, or one of each.
inline int64_t channels_side_by_side(const Slide& s) { return is_depthwise(s) ? s.groups : s.out_channels; }

// One example, group, block of output channels, and some taps of the kernel; frames count by their weights, if any.
template <typename T>
double gradients_of(const Slide& s, const T* x, Strides of_x, const T* g, const Strides& of_g, const T* weights,
                    const double* tap_weights, T* out, int64_t group, int64_t first_out, int64_t first_tap, int64_t last_tap, bool is_past_caches,
                    std::vector<T>& memory) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  const bool has_own = is_depthwise(s);
  const int64_t outs = std::min(channels_side_by_side(s) - first_out, VECTORS * LANES);
  const int64_t vectors = (outs + LANES - 1) / LANES, padded = vectors * LANES, all_outs = s.groups * s.out_channels;
  const int64_t columns_at_once = std::min(s.out_width, CHUNK);
  const int64_t rows_at_once = std::clamp<int64_t>(CHUNK / s.out_width, 1, s.out_height);
  const bool has_whole_frames = rows_at_once == s.out_height && columns_at_once == s.out_width;
  const int64_t frames_at_once = has_whole_frames ? std::clamp<int64_t>(CHUNK / (s.out_height * s.out_width), 1, s.frames) : 1;
  const int64_t channels = has_own ? outs : s.in_channels, by_pixel = has_own ? padded : channels;
  const int64_t pixels = s.height * s.width * by_pixel, positions = frames_at_once * rows_at_once * columns_at_once;
  const bool is_copied = of_x.by_channel != 1 || by_pixel != channels;
  memory.resize(positions * padded + (is_copied ? frames_at_once * pixels : 0));
  T *grads = memory.data(), *copied = grads + positions * padded;
  std::fill(grads, copied, T(0));
  if (by_pixel != channels) std::fill(copied, memory.data() + memory.size(), T(0));
  x += (has_own ? first_out : group * channels) * of_x.by_channel, g += (group * s.out_channels + first_out) * of_g.by_channel;
  double squared = 0;
  for (int64_t f0 = 0; f0 < s.frames; f0 += frames_at_once) {
    const int64_t frames = std::min(frames_at_once, s.frames - f0);
    const T* images = x + f0 * of_x.by_frame;
    Strides of = of_x;
    if (is_copied) {
      for (int64_t f = 0; f < frames; ++f)
        copy_pixels(images + f * of_x.by_frame, of_x, channels, s.height, s.width, copied + f * pixels, by_pixel);
      images = copied, of = Strides{0, pixels, 1, s.width * by_pixel, by_pixel};
    }
    for (int64_t h0 = 0; h0 < s.out_height; h0 += rows_at_once)
      for (int64_t w0 = 0; w0 < s.out_width; w0 += columns_at_once) {
        const int64_t h1 = std::min(s.out_height, h0 + rows_at_once), w1 = std::min(s.out_width, w0 + columns_at_once);
        const bool is_last = f0 + frames == s.frames && h1 == s.out_height && w1 == s.out_width;
        const bool is_first = f0 + h0 + w0 == 0;
        const int64_t by_row = (w1 - w0) * padded, by_frame = (h1 - h0) * by_row;
        for (int64_t f = 0; f < frames; ++f) {
          const T* from = g + (f0 + f) * of_g.by_frame + h0 * of_g.by_row + w0 * of_g.by_column;
          T* into = grads + f * by_frame;
          copy_pixels(from, of_g, outs, h1 - h0, w1 - w0, into, padded);
          if (weights)
            for (int64_t at = 0; at < by_frame; ++at) into[at] *= weights[f0 + f];
        }
        for (int64_t tap = first_tap; tap < last_tap; ++tap) {
          const int64_t down = tap / s.kernel_width * s.dilation_height - s.padding_height;
          const int64_t right = tap % s.kernel_width * s.dilation_width - s.padding_width;
          int64_t top, bottom, left, end;
          clip_positions(h0, h1, down, s.stride_height, s.height, top, bottom);
          clip_positions(w0, w1, right, s.stride_width, s.width, left, end);
          Vector<T> squares[VECTORS] = {};
          const T* first = images + (top * s.stride_height + down) * of.by_row + (left * s.stride_width + right) * of.by_column;
          const Seen<T> seen{first, of.by_frame, s.stride_height * of.by_row, s.stride_width * of.by_column,
                             grads + (top - h0) * by_row + (left - w0) * padded, by_frame, by_row,
                             frames, bottom - top, end - left};
          const Target<T> target{out + tap * s.in_channels * all_outs + group * s.out_channels + first_out, all_outs,
                                 outs - (vectors - 1) * LANES, is_first, is_first && is_last && is_past_caches,
                                 is_last ? squares : nullptr};
          add_tap<T, VECTORS>(seen, target, channels, vectors, has_own);
          if (is_last)
            for (int64_t v = 0; v < vectors; ++v) squared += (tap_weights ? tap_weights[tap] : 1) * total<T>(squares[v]);
        }
      }
  }
  return squared;
}

// Into how many pieces an example's gradient is cut: groups (of more than one channel), blocks of output channels, and,
// where there are few examples for the threads, ranges of taps.
struct Pieces {
  int64_t blocks, ranges, all;

  Pieces(const Slide& s, int64_t lanes, int threads) {
    blocks = (channels_side_by_side(s) + VECTORS * lanes - 1) / (VECTORS * lanes);
    const int64_t each = is_depthwise(s) ? blocks : s.groups * blocks, taps = s.kernel_height * s.kernel_width;
    ranges = std::clamp<int64_t>((4 * threads + s.n * each - 1) / (s.n * each), 1, taps);
    all = each * ranges;
  }
};

template <typename T>
void kernel_gradients(const T* x, const Strides& of_x, const T* g, const Strides& of_g, const T* weights,
                      const double* tap_weights, T* out, double* squares, const Slide& s, int threads) {
  const int64_t lanes = Lanes<T>::COUNT, taps = s.kernel_height * s.kernel_width;
  const int64_t size = taps * s.in_channels * s.groups * s.out_channels;
  const Pieces pieces(s, lanes, threads);
  const bool is_past_caches = !weights && can_go_past_caches<T>(out, channels_side_by_side(s), s.n * size);
  // Small groups lie in the same lines of the cache: neighbours are the work of one thread.
  const int64_t at_once = std::max<int64_t>(1, s.n * pieces.all / (16 * threads));
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> memory;
#pragma omp for schedule(dynamic, at_once)
    for (int64_t item = 0; item < s.n * pieces.all; ++item) {
      const int64_t example = item / pieces.all, range = item % pieces.ranges, block = item / pieces.ranges % pieces.blocks;
      const int64_t group = item % pieces.all / pieces.ranges / pieces.blocks;
      const int64_t first = range * taps / pieces.ranges, last = (range + 1) * taps / pieces.ranges;
      squares[item] = gradients_of(s, x + example * of_x.by_example, of_x, g + example * of_g.by_example, of_g, weights,
                                   tap_weights, out + example * size, group, block * VECTORS * lanes, first, last, is_past_caches,
                                   memory);
    }
    _mm_sfence();
  }
}

// kernel[out channels, in channels, taps] from sums[taps, in channels, out channels]: a block of both kinds of channels
// is turned around in the cache, so that lines of either are touched once, and side by side.
template <typename T>
void as_kernel(const T* sums, T* kernel, int64_t taps, int64_t channels, int64_t outs, int threads) {
  constexpr int64_t OUTS = 128, BYTES = 64 << 10;
  const int64_t most = std::max<int64_t>(1, BYTES / int64_t(sizeof(T)) / (OUTS * taps));
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> block(OUTS * most * taps);
#pragma omp for collapse(2)
    for (int64_t c = 0; c < channels; c += most)
      for (int64_t o = 0; o < outs; o += OUTS) {
        const int64_t wide = std::min(OUTS, outs - o), high = std::min(most, channels - c), size = high * taps;
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t k = 0; k < high; ++k) {
            const T* from = sums + (tap * channels + c + k) * outs + o;
            T* into = block.data() + k * taps + tap;
            for (int64_t at = 0; at < wide; ++at) into[at * size] = from[at];
          }
        for (int64_t at = 0; at < wide; ++at)
          std::copy(&block[at * size], &block[at * size] + size, kernel + ((o + at) * channels + c) * taps);
      }
  }
}

}  // namespace

// Into how many pieces `kernel_gradients_*` cut each example's gradient.
extern "C" int64_t kernel_gradient_pieces(const Slide* slide, int64_t itemsize, int threads) {
  return Pieces(*slide, REGISTER / itemsize, threads).all;
}

// out[n, kernel height, kernel width, in channels, groups * out channels] from images x and gradients g of the output,
// whose frames count by weights[frames], or all alike; squares[n, pieces] add up to the square of each gradient, where
// the squares of each tap count by tap_weights[kernel height, kernel width], or all alike.
#define DEFINE(T, NAME, AS_KERNEL)                                                                                    \
  extern "C" void NAME(const T* x, const Strides* of_x, const T* g, const Strides* of_g, const T* weights,       \
                       const double* tap_weights, T* out, double* squares, const Slide* slide, int threads) {    \
    kernel_gradients<T>(x, *of_x, g, *of_g, weights, tap_weights, out, squares, *slide, threads);                \
  }                                                                                                              \
  extern "C" void AS_KERNEL(const T* sums, T* kernel, int64_t taps, int64_t channels, int64_t outs, int threads) { \
    as_kernel<T>(sums, kernel, taps, channels, outs, threads);                                                   \
  }
DEFINE(float, kernel_gradients_float32, as_kernel_float32)
DEFINE(double, kernel_gradients_float64, as_kernel_float64)
