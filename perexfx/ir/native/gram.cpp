// Gram matrices of many examples, without most of what lies above their diagonals.
//
// Every thread takes whole examples, and copies the rows of one at a time, transposed, to where they stay in its cache.

constexpr int64_t DEPTH = 128;

// grams[n, t, t] of rows [n, t, size], whose last axis is contiguous.
extern "C" void gram(const float* rows, int64_t by_example, int64_t by_row, float* grams, int64_t n, int64_t t,
                     int64_t size, int threads) {
  const int64_t width = (t + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> columns(DEPTH * width), found(t * width);
#pragma omp for
    for (int64_t example = 0; example < n; ++example) {
      std::fill(found.begin(), found.end(), 0.0f);
      for (int64_t first = 0; first < size; first += DEPTH) {
        const float* own = rows + example * by_example + first;
        const int64_t depth = std::min(DEPTH, size - first);
        for (int64_t k0 = 0; k0 < depth; k0 += LANES)
          for (int64_t r = 0; r < t; ++r)
            for (int64_t k = k0; k < std::min(depth, k0 + LANES); ++k) columns[k * width + r] = own[r * by_row + k];
        int64_t r = 0;
        for (; r + 8 <= t; r += 8) {
          const int64_t needed = (r + 8 + LANES - 1) / LANES * LANES;
          add_rows<8>(own + r * by_row, by_row, columns.data(), width, found.data() + r * width, width, depth, needed);
        }
        for (; r < t; ++r)
          add_rows<1>(own + r * by_row, by_row, columns.data(), width, found.data() + r * width, width, depth, width);
      }
      float* into = grams + example * t * t;
      for (int64_t r = 0; r < t; ++r)
        for (int64_t s = 0; s <= r; ++s) into[r * t + s] = into[s * t + r] = found[r * width + s];
    }
  }
}
