// Weighted sums of rows of memory: what clipped sums of kept gradients are.
//
// A thread takes a block of columns, which stays in its first cache while all rows are added, some at a time.

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 8192;  // bytes
constexpr int AT_ONCE = 8;       // rows

// out[size] += weights[R] rows[R, size], or = if there is nothing yet.
template <typename T, int R>
void add_rows(const T* const* rows, const T* weights, int64_t from, int64_t size, bool is_first, T* out) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  const auto add = [&](int64_t at, int64_t lanes) {
    Vector<T> sum = is_first ? Vector<T>{} : load_some(out + at, lanes);
    for (int r = 0; r < R; ++r) sum += weights[r] * load_some(rows[r] + from + at, lanes);
    store_some(out + at, sum, lanes);
  };
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES) add(at, LANES);
  if (at < size) add(at, size - at);
}

template <typename T>
void weighted_sum(const T* const* rows, const T* weights, T* out, int64_t n, int64_t size, int threads) {
  constexpr int64_t COLUMNS = BLOCK / sizeof(T);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t from = 0; from < size; from += COLUMNS) {
    const int64_t own = std::min(COLUMNS, size - from);
    int64_t r = 0;
    for (; r + AT_ONCE <= n; r += AT_ONCE) add_rows<T, AT_ONCE>(rows + r, weights + r, from, own, r == 0, out + from);
    for (; r < n; ++r) add_rows<T, 1>(rows + r, weights + r, from, own, r == 0, out + from);
  }
}

}  // namespace

// out[size] = the sum of weights[n] times rows[n][size].
#define DEFINE(T, NAME)                                                                                            \
  extern "C" void NAME(const T* const* rows, const T* weights, T* out, int64_t n, int64_t size, int threads) {     \
    weighted_sum<T>(rows, weights, out, n, size, threads);                                                         \
  }
DEFINE(float, weighted_sum_float32)
DEFINE(double, weighted_sum_float64)
