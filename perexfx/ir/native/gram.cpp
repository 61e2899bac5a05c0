// Gram matrices of many examples, without most of what lies above their diagonals.
//
// Every thread takes whole examples, and copies the rows of one at a time, transposed, to where they stay in its cache.

#include "products.h"

namespace {

template <typename T>
void gram(const T* rows, int64_t by_example, int64_t by_row, T* grams, int64_t n, int64_t t, int64_t size,
          int threads) {
  const int64_t width = rounded_up(t, Lanes<T>::COUNT);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> columns, found(t * width);
#pragma omp for
    for (int64_t example = 0; example < n; ++example) {
      lower_gram(rows + example * by_example, by_row, t, size, found.data(), columns);
      T* into = grams + example * t * t;
      for (int64_t r = 0; r < t; ++r)
        for (int64_t s = 0; s <= r; ++s) into[r * t + s] = into[s * t + r] = found[r * width + s];
    }
  }
}

}  // namespace

// Of the sources that this library was built from.
extern "C" const char* fingerprint() { return PEREXFX_FINGERPRINT; }

// grams[n, t, t] of rows [n, t, size], whose last axis is contiguous.
#define DEFINE(T, NAME)                                                                                             \
  extern "C" void NAME(const T* rows, int64_t by_example, int64_t by_row, T* grams, int64_t n, int64_t t,           \
                       int64_t size, int threads) {                                                                 \
    gram<T>(rows, by_example, by_row, grams, n, t, size, threads);                                                  \
  }
DEFINE(float, gram_float32)
DEFINE(double, gram_float64)
