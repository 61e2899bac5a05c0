// Products of small matrices whose second factor stays in the cache; row-major.

#pragma once

#include "images.h"

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
