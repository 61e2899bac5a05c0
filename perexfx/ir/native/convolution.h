// Where images lie, and how a kernel slides over them.

#pragma once

#include <cstdint>

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

}  // namespace
