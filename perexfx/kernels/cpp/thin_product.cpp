// Products of many short rows with one small matrix: what pools the taps of kernels, and spreads their gradients.
//
// A row of results is some vectors, made of one broadcast per entry of the row; the matrix stays in registers or in the
// first cache, and rows are read and written once.

#include "vectors.h"

namespace {

// out[V vectors] = row[inner] matrix[inner, V vectors]; a row of the padded matrix is V vectors.
template <typename T, int V>
inline void multiply(const T* row, const T* matrix, int64_t inner, Vector<T> (&sums)[V]) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  for (int v = 0; v < V; ++v) sums[v] = Vector<T>{};
  for (int64_t t = 0; t < inner; ++t)
    for (int v = 0; v < V; ++v) sums[v] += row[t] * load(matrix + (t * V + v) * LANES);
}

// Rows [first, last). Whole vectors are written where the rows after it, which come next, are this thread's too.
template <typename T, int V>
void multiply_rows(const T* rows, const T* matrix, T* out, int64_t first, int64_t last, int64_t inner, int64_t outer) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  const int64_t room = (V * LANES + outer - 1) / outer;  // rows that a whole result may reach into
  Vector<T> sums[V];
  int64_t r = first;
  for (; r + room < last; ++r) {
    multiply<T, V>(rows + r * inner, matrix, inner, sums);
    for (int v = 0; v < V; ++v) store(out + r * outer + v * LANES, sums[v]);
  }
  for (; r < last; ++r) {
    multiply<T, V>(rows + r * inner, matrix, inner, sums);
    for (int v = 0; v < V; ++v) store_some(out + r * outer + v * LANES, sums[v], std::clamp<int64_t>(outer - v * LANES, 0, LANES));
  }
}

template <typename T, int V>
void with_vectors(int64_t vectors, const T* rows, const T* matrix, T* out, int64_t first, int64_t last, int64_t inner,
                  int64_t outer) {
  if constexpr (V > 0) {
    if (vectors == V)
      multiply_rows<T, V>(rows, matrix, out, first, last, inner, outer);
    else
      with_vectors<T, V - 1>(vectors, rows, matrix, out, first, last, inner, outer);
  }
}

constexpr int MOST = 8;  // vectors of a row of results

template <typename T>
void thin_product(const T* rows, const T* matrix, T* out, int64_t n, int64_t inner, int64_t outer, int threads) {
  constexpr int64_t LANES = Lanes<T>::COUNT, AT_ONCE = 4096;
  const int64_t vectors = (outer + LANES - 1) / LANES;
  std::vector<T> padded(inner * vectors * LANES);
  for (int64_t t = 0; t < inner; ++t) std::copy(matrix + t * outer, matrix + (t + 1) * outer, &padded[t * vectors * LANES]);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < n; first += AT_ONCE)
    with_vectors<T, MOST>(vectors, rows, padded.data(), out, first, std::min(n, first + AT_ONCE), inner, outer);
}

}  // namespace

// The most entries that a row of results may have, by the size of one.
extern "C" int64_t thin_product_most(int64_t itemsize) { return MOST * REGISTER / itemsize; }

// out[n, outer] = rows[n, inner] matrix[inner, outer]
#define DEFINE(T, NAME)                                                                                         \
  extern "C" void NAME(const T* rows, const T* matrix, T* out, int64_t n, int64_t inner, int64_t outer, int threads) { \
    thin_product<T>(rows, matrix, out, n, inner, outer, threads);                                               \
  }
DEFINE(float, thin_product_float32)
DEFINE(double, thin_product_float64)
