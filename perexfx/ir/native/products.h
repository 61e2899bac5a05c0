// Products of small matrices whose second factor stays in the cache; row-major.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

// out[R, C * LANES] += rows[R, depth] columns[depth, C * LANES]; strides are from one row to the next.
template <int R, int C>
void add_block(const float* rows, int64_t row_stride, const float* columns, int64_t column_stride, float* out,
               int64_t out_stride, int64_t depth) {
  Vector sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = *reinterpret_cast<const Vector*>(out + r * out_stride + c * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[C];
    for (int c = 0; c < C; ++c) column[c] = *reinterpret_cast<const Vector*>(columns + k * column_stride + c * LANES);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] += rows[r * row_stride + k] * column[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) *reinterpret_cast<Vector*>(out + r * out_stride + c * LANES) = sums[r][c];
}

// The same for any multiple of LANES as width.
template <int R>
void add_rows(const float* rows, int64_t row_stride, const float* columns, int64_t column_stride, float* out,
              int64_t out_stride, int64_t depth, int64_t width) {
  int64_t j = 0;
  for (; j + 2 * LANES <= width; j += 2 * LANES)
    add_block<R, 2>(rows, row_stride, columns + j, column_stride, out + j, out_stride, depth);
  if (j < width) add_block<R, 1>(rows, row_stride, columns + j, column_stride, out + j, out_stride, depth);
}

}  // namespace
