// Gram matrices of many examples, and the norms that two of them make.
//
// A thread takes one example, or some rows of its matrices where there are few examples. For the norms, which are sums of
// products of the entries of both, the first matrix alone is made, and stays in the cache; of the second, each entry
// is multiplied where it is made, a vector of partial sums at a time.

#include "gram.h"

#include <cmath>

namespace {

// Elements of a Gram matrix's rows that one thread makes at a time, at most.
constexpr int64_t MOST = 1 << 18;

// Ranges of rows with about as many entries at and below the diagonal.
struct Ranges {
  int64_t count, t;

  Ranges(int64_t grams, int64_t t, int threads) : t(t) {
    const int64_t for_threads = grams < 2 * threads ? (4 * threads + grams - 1) / grams : 1;
    count = std::min(std::max(for_threads, (t * t / 2 + MOST - 1) / MOST), (t + TILE_ROWS - 1) / TILE_ROWS);
  }
  int64_t start(int64_t range) const {
    if (range == count) return t;
    return int64_t(std::sqrt(double(range) / count) * t) / TILE_ROWS * TILE_ROWS;
  }
};

// One of the ranges of one example.
struct Item {
  int64_t example, first, last;

  Item(int64_t item, const Ranges& ranges)
      : example(item / ranges.count),
        first(ranges.start(item % ranges.count)),
        last(ranges.start(item % ranges.count + 1)) {}
};

template <typename T>
void gram(const T* rows, int64_t by_example, int64_t by_row, T* grams, int64_t n, int64_t t, int64_t size,
          int threads) {
  const Ranges ranges(n, t, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> tiles;
#pragma omp for schedule(dynamic)
    for (int64_t at = 0; at < n * ranges.count; ++at) {
      const Item item(at, ranges);
      T* into = grams + item.example * t * t;
      gram_tiles(Rows<T>{rows + item.example * by_example, by_row, t, size}, item.first, item.last, tiles);
      for_entries(tiles, item.first, item.last, [&](int64_t r, int64_t s, T value) { into[r * t + s] = into[s * t + r] = value; });
    }
  }
}

// The sum over products of the entries of a whole matrix, of which there are tiles, and the Gram matrix of `rows`.
template <typename T>
double product_with_gram(const std::vector<T>& tiles, const Rows<T>& rows, int64_t first, int64_t last) {
  using Doubles = typename Lanes<T>::Doubles;
  const int64_t at_once = rows.at_once();
  Doubles below = {}, diagonal = {};  // entries have both signs: what is left of them in the end may be little
  for (int64_t k = 0; k < rows.size; k += at_once) {
    const T* tile = tiles.data();
    for_tiles(first, last, [&](int64_t r, int64_t c) {
      Vector<T> sums[TILE], of_tile = {}, of_diagonal = {};
      products_of(rows, r, c, k, std::min(at_once, rows.size - k), sums);
      const bool is_below = c + TILE_COLUMNS <= r && r + TILE_ROWS <= last;
      for (int at = 0; at < TILE; ++at) {
        const int64_t row = r + at / TILE_COLUMNS, column = c + at % TILE_COLUMNS;
        if (is_below || (row < last && column < row))
          of_tile += tile[at] * sums[at];
        else if (row < last && column == row)
          of_diagonal += tile[at] * sums[at];
      }
      below += __builtin_convertvector(of_tile, Doubles), diagonal += __builtin_convertvector(of_diagonal, Doubles);
      tile += TILE;
    });
  }
  below = 2 * below + diagonal;
  double sum = 0;
  for (int64_t lane = 0; lane < Lanes<T>::COUNT; ++lane) sum += below[lane];
  return sum;
}

template <typename T>
void gram_norms(const T* left, int64_t left_by_example, int64_t left_by_row, const T* grams, const T* right,
                int64_t right_by_example, int64_t right_by_row, double* squares, int64_t n, int64_t t, int64_t left_size,
                int64_t right_size, int threads) {
  const Ranges ranges(n, t, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> tiles;
#pragma omp for schedule(dynamic)
    for (int64_t at = 0; at < n * ranges.count; ++at) {
      const Item item(at, ranges);
      if (grams) {
        const T* from = grams + item.example * t * t;
        tiles.assign(tiles_of(item.first, item.last) * TILE, T(0));
        for_entries(tiles, item.first, item.last, [&](int64_t r, int64_t s, T& value) { value = from[r * t + s]; });
      } else {
        const Rows<T> rows{left + item.example * left_by_example, left_by_row, t, left_size};
        gram_tiles(rows, item.first, item.last, tiles);
      }
      const Rows<T> rows{right + item.example * right_by_example, right_by_row, t, right_size};
      squares[at] = product_with_gram(tiles, rows, item.first, item.last);
    }
  }
}

}  // namespace

// Of the sources that this library was built from.
extern "C" const char* fingerprint() { return PEREXFX_FINGERPRINT; }

// Into how many ranges of rows each example's matrices are cut.
extern "C" int64_t gram_ranges(int64_t n, int64_t t, int threads) { return Ranges(n, t, threads).count; }

// grams[n, t, t] of rows [n, t, size], whose last axis is contiguous; and squares[n, ranges], which add up to the sum
// over products of the entries of the Gram matrices of left[n, t, left_size], or grams, and right[n, t, right_size].
#define DEFINE(T, NAME, NORMS)                                                                                         \
  extern "C" void NAME(const T* rows, int64_t by_example, int64_t by_row, T* grams, int64_t n, int64_t t,              \
                       int64_t size, int threads) {                                                                    \
    gram<T>(rows, by_example, by_row, grams, n, t, size, threads);                                                     \
  }                                                                                                                    \
  extern "C" void NORMS(const T* left, int64_t left_by_example, int64_t left_by_row, const T* grams, const T* right,   \
                        int64_t right_by_example, int64_t right_by_row, double* squares, int64_t n, int64_t t,         \
                        int64_t left_size, int64_t right_size, int threads) {                                          \
    gram_norms<T>(left, left_by_example, left_by_row, grams, right, right_by_example, right_by_row, squares, n, t,     \
                  left_size, right_size, threads);                                                                     \
  }
DEFINE(float, gram_float32, gram_norms_float32)
DEFINE(double, gram_float64, gram_norms_float64)
