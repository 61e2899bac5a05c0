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

}  // namespace
