// Images in memory, and how a kernel slides over them.

#pragma once

#include "vectors.h"

namespace {

// Strides of images [n, frames, channels, height, width].
struct Strides {
  int64_t by_example, by_frame, by_channel, by_row, by_column;
};

struct Slide {
  int64_t n, frames, groups;
  int64_t in_channels, height, width;           // channels of one group
  int64_t out_channels, out_height, out_width;  // the same
  int64_t kernel_height, kernel_width, stride_height, stride_width;
  int64_t padding_height, padding_width, dilation_height, dilation_width;
};

// into[columns, rows] = from[rows, columns], by squares of four; the strides are from one row to the next.
template <typename T>
void transpose(const T* from, int64_t by_row, T* into, int64_t into_by_row, int64_t rows, int64_t columns) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const T* own = from + r * by_row + c;
      T* at = into + c * into_by_row + r;
      const Four& x = *reinterpret_cast<const Four*>(own);
      const Four& y = *reinterpret_cast<const Four*>(own + by_row);
      const Four& z = *reinterpret_cast<const Four*>(own + 2 * by_row);
      const Four& w = *reinterpret_cast<const Four*>(own + 3 * by_row);
      const Four xy = {x[0], y[0], x[1], y[1]}, zw = {z[0], w[0], z[1], w[1]};
      const Four last_xy = {x[2], y[2], x[3], y[3]}, last_zw = {z[2], w[2], z[3], w[3]};
      *reinterpret_cast<Four*>(at) = Four{xy[0], xy[1], zw[0], zw[1]};
      *reinterpret_cast<Four*>(at + into_by_row) = Four{xy[2], xy[3], zw[2], zw[3]};
      *reinterpret_cast<Four*>(at + 2 * into_by_row) = Four{last_xy[0], last_xy[1], last_zw[0], last_zw[1]};
      *reinterpret_cast<Four*>(at + 3 * into_by_row) = Four{last_xy[2], last_xy[3], last_zw[2], last_zw[3]};
    }
    for (; c < columns; ++c)
      for (int64_t k = r; k < r + 4; ++k) into[c * into_by_row + k] = from[k * by_row + c];
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) into[c * into_by_row + r] = from[r * by_row + c];
}

// into[height * width, channels], with `by_pixel` from one pixel to the next, from an image in any format.
template <typename T>
void copy_pixels(const T* image, const Strides& of, int64_t channels, int64_t height, int64_t width, T* into,
                 int64_t by_pixel) {
  for (int64_t h = 0; h < height; ++h, image += of.by_row, into += width * by_pixel)
    if (of.by_channel == 1)
      for (int64_t w = 0; w < width; ++w)
        std::copy(image + w * of.by_column, image + w * of.by_column + channels, into + w * by_pixel);
    else if (of.by_column == 1)
      transpose(image, of.by_channel, into, by_pixel, channels, width);
    else
      for (int64_t w = 0; w < width; ++w)
        for (int64_t c = 0; c < channels; ++c) into[w * by_pixel + c] = image[c * of.by_channel + w * of.by_column];
}

}  // namespace
