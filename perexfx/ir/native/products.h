// Products of small matrices whose second factor stays in the cache; row-major.

#pragma once

#include "vectors.h"

namespace {

// out[R, C vectors] += rows[R, depth] columns[depth, C vectors]; strides are from one row to the next.
template <typename T, int R, int C>
void add_block(const T* rows, int64_t row_stride, const T* columns, int64_t column_stride, T* out, int64_t out_stride,
               int64_t depth) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  Vector<T> sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = load(out + r * out_stride + c * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> column[C];
    for (int c = 0; c < C; ++c) column[c] = load(columns + k * column_stride + c * LANES);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] += rows[r * row_stride + k] * column[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(out + r * out_stride + c * LANES, sums[r][c]);
}

// The same for any multiple of a vector's lanes as width, and any number of rows up to R.
template <typename T, int R>
void add_rows(int64_t count, const T* rows, int64_t row_stride, const T* columns, int64_t column_stride, T* out,
              int64_t out_stride, int64_t depth, int64_t width) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  if constexpr (R > 0) {
    if (count < R) {
      add_rows<T, R - 1>(count, rows, row_stride, columns, column_stride, out, out_stride, depth, width);
      return;
    }
    int64_t j = 0;
    for (; j + VECTORS * LANES <= width; j += VECTORS * LANES)
      add_block<T, R, VECTORS>(rows, row_stride, columns + j, column_stride, out + j, out_stride, depth);
    for (; j + 2 * LANES <= width; j += 2 * LANES)
      add_block<T, R, 2>(rows, row_stride, columns + j, column_stride, out + j, out_stride, depth);
    if (j < width) add_block<T, R, 1>(rows, row_stride, columns + j, column_stride, out + j, out_stride, depth);
  }
}

// into[columns, rows] = from[rows, columns], by squares of four.
template <typename T>
void transpose(const T* from, int64_t by_row, T* into, int64_t into_by_row, int64_t rows, int64_t columns) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index __attribute__((vector_size(4 * sizeof(T))));
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const T* own = from + r * by_row + c;
      const Four a = *reinterpret_cast<const Four*>(own), b = *reinterpret_cast<const Four*>(own + by_row);
      const Four d = *reinterpret_cast<const Four*>(own + 2 * by_row), e = *reinterpret_cast<const Four*>(own + 3 * by_row);
      const Four low = __builtin_shuffle(a, b, Index{0, 4, 1, 5}), high = __builtin_shuffle(a, b, Index{2, 6, 3, 7});
      const Four other = __builtin_shuffle(d, e, Index{0, 4, 1, 5}), last = __builtin_shuffle(d, e, Index{2, 6, 3, 7});
      T* at = into + c * into_by_row + r;
      *reinterpret_cast<Four*>(at) = __builtin_shuffle(low, other, Index{0, 1, 4, 5});
      *reinterpret_cast<Four*>(at + into_by_row) = __builtin_shuffle(low, other, Index{2, 3, 6, 7});
      *reinterpret_cast<Four*>(at + 2 * into_by_row) = __builtin_shuffle(high, last, Index{0, 1, 4, 5});
      *reinterpret_cast<Four*>(at + 3 * into_by_row) = __builtin_shuffle(high, last, Index{2, 3, 6, 7});
    }
    for (; c < columns; ++c)
      for (int64_t k = r; k < r + 4; ++k) into[c * into_by_row + k] = from[k * by_row + c];
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) into[c * into_by_row + r] = from[r * by_row + c];
}

// found[t, t] = rows[t, size] rows^T, at and below the diagonal; above it stands anything.
//
// The rows' elements are neighbours; found has as many columns as t rounded up to the lanes of a vector.
template <typename T>
void lower_gram(const T* rows, int64_t by_row, int64_t t, int64_t size, T* found, std::vector<T>& columns) {
  constexpr int64_t LANES = Lanes<T>::COUNT, DEPTH = 128;
  const int64_t width = rounded_up(t, LANES);
  columns.resize(DEPTH * width);
  std::fill(found, found + t * width, T(0));
  for (int64_t first = 0; first < size; first += DEPTH) {
    const T* own = rows + first;
    const int64_t depth = std::min(DEPTH, size - first);
    transpose(own, by_row, columns.data(), width, t, depth);
    for (int64_t r = 0; r < t; r += ROWS)
      add_rows<T, ROWS>(std::min<int64_t>(ROWS, t - r), own + r * by_row, by_row, columns.data(), width,
                        found + r * width, width, depth, std::min(width, rounded_up(r + ROWS, LANES)));
  }
}

}  // namespace
