// Gram matrices of rows, at and below the diagonal, from products of vectors: nothing is transposed.

#pragma once

#include <utility>

#include "vectors.h"

namespace {

// Of a tile of products. Their sums, one vector each, fill whole vectors when their lanes are added up.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 4, TILE_COLUMNS = 4;
#else
constexpr int TILE_ROWS = 2, TILE_COLUMNS = 4;
#endif
constexpr int TILE = TILE_ROWS * TILE_COLUMNS;

// Bytes of rows that stay in the second cache while all of their products are made.
constexpr int64_t IN_CACHE = 512 << 10;

template <typename T, size_t... I>
inline Vector<T> pair_sums(Vector<T> a, Vector<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// The sums of the lanes of `COUNT` vectors, side by side; all of them where that is as many as a vector has lanes.
template <typename T, int COUNT>
inline Vector<T> sums_of_lanes(const Vector<T>* of) {
  if constexpr (COUNT == 1)
    return of[0];
  else
    return pair_sums<T>(sums_of_lanes<T, COUNT / 2>(of), sums_of_lanes<T, COUNT / 2>(of + COUNT / 2),
                        std::make_index_sequence<Lanes<T>::COUNT>());
}

// Rows [t, size], whose elements are neighbours.
template <typename T>
struct Rows {
  const T* first;
  int64_t by_row, t, size;

  // How many elements of each are worked on at a time.
  int64_t at_once() const {
    constexpr int64_t LANES = Lanes<T>::COUNT;
    return std::clamp<int64_t>(IN_CACHE / sizeof(T) / t, 128, 2048) / LANES * LANES;
  }
};

// The products of rows r, r + 1, ... with rows c, c + 1, ... over `depth` elements from `k` on, one vector each.
// Those of rows that there are not are of the last one.
template <typename T>
inline void products_of(const Rows<T>& rows, int64_t r, int64_t c, int64_t k, int64_t depth, Vector<T> (&sums)[TILE]) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  const T *down[TILE_ROWS], *across[TILE_COLUMNS];
  for (int i = 0; i < TILE_ROWS; ++i) down[i] = rows.first + std::min(r + i, rows.t - 1) * rows.by_row + k;
  for (int j = 0; j < TILE_COLUMNS; ++j) across[j] = rows.first + std::min(c + j, rows.t - 1) * rows.by_row + k;
  Vector<T> parts[TILE_ROWS][TILE_COLUMNS] = {};
  const auto add = [&](auto take) {
    Vector<T> column[TILE_COLUMNS];
    for (int j = 0; j < TILE_COLUMNS; ++j) column[j] = take(across[j]);
    for (int i = 0; i < TILE_ROWS; ++i) {
      const Vector<T> row = take(down[i]);
      for (int j = 0; j < TILE_COLUMNS; ++j) parts[i][j] += row * column[j];
    }
  };
  int64_t at = 0;
  for (; at + LANES <= depth; at += LANES) add([&](const T* from) { return load(from + at); });
  if (at < depth) add([&](const T* from) { return load_some(from + at, depth - at); });
  for (int i = 0; i < TILE_ROWS; ++i)
    for (int j = 0; j < TILE_COLUMNS; ++j) sums[i * TILE_COLUMNS + j] = parts[i][j];
}

// Calls `each` with the first row and column of every tile of rows [first, last) at and below the diagonal.
template <typename Each>
inline void for_tiles(int64_t first, int64_t last, const Each& each) {
  for (int64_t r = first; r < last; r += TILE_ROWS)
    for (int64_t c = 0; c < r + TILE_ROWS; c += TILE_COLUMNS) each(r, c);
}

// How many tiles those are; `first` is one's first row.
inline int64_t tiles_of(int64_t first, int64_t last) {
  int64_t count = 0;
  for (int64_t r = first; r < last; r += TILE_ROWS) count += (r + TILE_ROWS + TILE_COLUMNS - 1) / TILE_COLUMNS;
  return count;
}

// found[tiles, TILE] = the Gram matrix's tiles of rows [first, last).
template <typename T>
void gram_tiles(const Rows<T>& rows, int64_t first, int64_t last, std::vector<T>& found) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  found.assign(tiles_of(first, last) * TILE, T(0));
  const int64_t at_once = rows.at_once();
  for (int64_t k = 0; k < rows.size; k += at_once) {
    T* tile = found.data();
    for_tiles(first, last, [&](int64_t r, int64_t c) {
      Vector<T> sums[TILE];
      products_of(rows, r, c, k, std::min(at_once, rows.size - k), sums);
      for (int at = 0; at < TILE; at += LANES, tile += LANES)
        store(tile, load(tile) + sums_of_lanes<T, LANES>(sums + at));
    });
  }
}

// into[t, t] = tiles of all rows, at and below the diagonal; above it stands anything, or what stood there before. Rows
// of `into` have room for whole tiles.
template <typename T>
void from_tiles(const std::vector<T>& tiles, int64_t t, T* into, int64_t by_row) {
  const T* tile = tiles.data();
  for_tiles(0, t, [&](int64_t r, int64_t c) {
    for (int i = 0; i < TILE_ROWS; ++i, tile += TILE_COLUMNS)
      if (r + i < t) std::copy(tile, tile + TILE_COLUMNS, into + (r + i) * by_row + c);
  });
}

// Calls `each` with row, column and value of what lies at and below the diagonal in tiles of rows [first, last).
template <typename T, typename Each>
void for_entries(std::vector<T>& tiles, int64_t first, int64_t last, const Each& each) {
  T* tile = tiles.data();
  for_tiles(first, last, [&](int64_t r, int64_t c) {
    for (int i = 0; i < TILE_ROWS; ++i)
      for (int j = 0; j < TILE_COLUMNS; ++j, ++tile)
        if (r + i < last && c + j <= r + i) each(r + i, c + j, *tile);
  });
}

}  // namespace
