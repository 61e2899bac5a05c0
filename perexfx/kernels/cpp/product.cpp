// Every example's sum of outer products, the gradient of a linear layer's weight, and its square, in one pass.
//
// A thread takes one example and a block of the gradient. It copies both factors at some positions side by side, into
// panels as wide as a tile of sums, and goes over the tiles; squares are added up when the last positions are in.
// Whoever wants the squares alone gets them from blocks that never leave the cache.

#include "images.h"

namespace {

// Positions that one tile adds up at a time: one sum over all would lose digits.
constexpr int64_t DEPTH = 256;

// Of a block, at most: with its factors it fits the second cache.
constexpr int64_t BLOCK_ROWS = 192, BLOCK_COLUMNS = 256;

template <typename T>
constexpr int64_t WIDTH = VECTORS * Lanes<T>::COUNT;  // of a tile

// Where the sums of a tile come from and go to, row by row; of the last vector of a row, `some` lanes exist.
template <typename T>
struct Tile {
  const T* before;  // over earlier positions; or null
  T* after;         // or null
  int64_t before_by_row, after_by_row, some;
  bool is_past_caches;
};

// tile.after[R, V vectors] = tile.before + rows[depth, R]^T columns[depth, V vectors]; returns the squares.
template <typename T, int R, int V>
Vector<T> add_tile(const T* rows, const T* columns, int64_t depth, const Tile<T>& tile) {
  constexpr int64_t LANES = Lanes<T>::COUNT;
  Vector<T> sums[R][V] = {}, squares = {};
  for (int64_t k = 0; k < depth; ++k, rows += R, columns += V * LANES) {
    Vector<T> column[V];
    for (int v = 0; v < V; ++v) column[v] = load(columns + v * LANES);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] += rows[r] * column[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      const int64_t lanes = v + 1 < V ? LANES : tile.some;
      if (tile.before) sums[r][v] += load_some(tile.before + r * tile.before_by_row + v * LANES, lanes);
      squares += sums[r][v] * sums[r][v];
      if (!tile.after) continue;
      T* into = tile.after + r * tile.after_by_row + v * LANES;
      if (tile.is_past_caches)
        store_past_caches(into, sums[r][v]);
      else
        store_some(into, sums[r][v], lanes);
    }
  return squares;
}

// The same for `count` <= R rows and `vectors` <= V vectors, known at run time.
template <typename T, int R, int V>
Vector<T> add_part(const T* rows, int64_t count, const T* columns, int64_t vectors, int64_t depth, const Tile<T>& tile) {
  if constexpr (R > 1)
    if (count < R) return add_part<T, R - 1, V>(rows, count, columns, vectors, depth, tile);
  if constexpr (V > 1)
    if (vectors < V) return add_part<T, R, V - 1>(rows, count, columns, vectors, depth, tile);
  return add_tile<T, R, V>(rows, columns, depth, tile);
}

// Panels [depth, W] of `width` features at `depth` positions; the last is as wide as the rest, in multiples of `unit`.
template <typename T, int64_t W>
void copy_panels(const T* from, const Strides& of, int64_t depth, int64_t width, int64_t unit, T* into) {
  for (int64_t first = 0; first < width; first += W, from += W * of.by_channel) {
    const int64_t own = std::min(W, width - first), wide = rounded_up(own, unit);
    if (own == W && of.by_channel == 1) {
      for (int64_t k = 0; k < depth; ++k) std::memcpy(into + k * W, from + k * of.by_column, W * sizeof(T));
    } else {
      if (own < wide) std::fill(into, into + depth * wide, T(0));
      copy_pixels(from, of, own, 1, depth, into, wide);
    }
    into += depth * wide;
  }
}

// Rows of memory that will be read next, a few lines of the cache at a time.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* from, int64_t by_row, int64_t bytes, int64_t rows)
      : at(static_cast<const char*>(from)), by_row(by_row), lines((bytes + LINE - 1) / LINE), all(rows * lines), left(all) {}

  // Brings in the next of `parts` equal parts.
  void bring(int64_t parts) {
    for (int64_t count = std::min(left, (all + parts - 1) / parts); count > 0; --count, --left) {
      __builtin_prefetch(at + line * LINE, 0, 2);
      if (++line == lines) line = 0, at += by_row;
    }
  }

 private:
  static constexpr int64_t LINE = 64;
  const char* at = nullptr;
  int64_t by_row = 0, lines = 0, all = 0, left = 0, line = 0;
};

// Sizes of left factors [n, groups, positions, columns] and right ones [n, groups, positions, rows].
struct Sizes {
  int64_t n, groups, positions, rows, columns;
};

// Into how many blocks each gradient is cut: more where there are few examples for the threads.
struct Blocks {
  int64_t down, across, rows, columns;

  Blocks(const Sizes& sizes, int64_t width, int threads) {
    across = (sizes.columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    columns = rounded_up((sizes.columns + across - 1) / across, width);
    across = (sizes.columns + columns - 1) / columns;
    const int64_t others = sizes.n * sizes.groups * across;
    down = std::max((sizes.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, (4 * threads + others - 1) / others);
    rows = rounded_up((sizes.rows + down - 1) / down, ROWS);
    down = (sizes.rows + rows - 1) / rows;
  }
};

// One of the blocks of one gradient, and where its factors are.
template <typename T>
struct Block {
  const T *x, *g;
  int64_t product, row, column, height, width;

  Block(int64_t item, const Sizes& sizes, const Blocks& blocks, const T* left, const Strides& of_left, const T* right,
        const Strides& of_right)
      : product(item / (blocks.down * blocks.across)),
        row(item / blocks.across % blocks.down * blocks.rows),
        column(item % blocks.across * blocks.columns),
        height(std::min(blocks.rows, sizes.rows - row)),
        width(std::min(blocks.columns, sizes.columns - column)) {
    const int64_t example = product / sizes.groups, group = product % sizes.groups;
    x = left + example * of_left.by_example + group * of_left.by_frame + column * of_left.by_channel;
    g = right + example * of_right.by_example + group * of_right.by_frame + row * of_right.by_channel;
  }
};

template <typename T>
void product_gradients(const T* left, const Strides& of_left, const T* right, const Strides& of_right, T* out,
                       double* squares, const Sizes& sizes, int threads) {
  constexpr int64_t LANES = Lanes<T>::COUNT, W = WIDTH<T>;
  const Blocks blocks(sizes, W, threads);
  const int64_t chunks = (sizes.positions + DEPTH - 1) / DEPTH, at_once = (sizes.positions + chunks - 1) / chunks;
  const int64_t items = sizes.n * sizes.groups * blocks.down * blocks.across;
  const int64_t at_a_time = std::max<int64_t>(1, items / (16 * threads));  // neighbours are the work of one thread
  const int64_t elements = sizes.n * sizes.groups * sizes.rows * sizes.columns;
  const bool is_past_caches = out && can_go_past_caches(out, sizes.columns, elements);
  const auto block = [&](int64_t item) { return Block<T>(item, sizes, blocks, left, of_left, right, of_right); };
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> memory(at_once * (blocks.rows + blocks.columns) + (chunks > 1 ? blocks.rows * blocks.columns : 0));
    T *rows = memory.data(), *columns = rows + at_once * blocks.rows, *sums = columns + at_once * blocks.columns;
#pragma omp for schedule(dynamic, at_a_time)
    for (int64_t item = 0; item < items; ++item) {
      const Block<T> own = block(item), later = block(std::min(item + (at_a_time > 1 ? 1 : threads), items - 1));
      const int64_t tiles = (own.height + ROWS - 1) / ROWS * ((own.width + W - 1) / W);
      double squared = 0;
      for (int64_t first = 0; first < sizes.positions; first += at_once) {
        const int64_t depth = std::min(at_once, sizes.positions - first), next = first + depth;
        const bool is_last = next == sizes.positions;
        copy_panels<T, ROWS>(own.g + first * of_right.by_column, of_right, depth, own.height, 1, rows);
        copy_panels<T, W>(own.x + first * of_left.by_column, of_left, depth, own.width, LANES, columns);
        const auto ahead = [&](const T* from, const Strides& of, int64_t features) {
          const int64_t count = is_last ? at_once : std::min(at_once, sizes.positions - next);
          return of.by_channel == 1 ? Ahead(from + (is_last ? 0 : next * of.by_column), of.by_column * sizeof(T),
                                            features * sizeof(T), count)
                                    : Ahead();
        };
        Ahead of_x = ahead(is_last ? later.x : own.x, of_left, own.width);
        Ahead of_g = ahead(is_last ? later.g : own.g, of_right, own.height);
        for (int64_t j = 0; j < own.width; j += W) {
          const int64_t wide = std::min(W, own.width - j), vectors = (wide + LANES - 1) / LANES;
          Vector<T> found = {};
          for (int64_t r = 0; r < own.height; r += ROWS) {
            T* partial = sums + r * blocks.columns + j;
            T* finished = out ? out + (own.product * sizes.rows + own.row + r) * sizes.columns + own.column + j : nullptr;
            const Tile<T> tile{first ? partial : nullptr,
                               is_last ? finished : partial,
                               blocks.columns,
                               is_last ? sizes.columns : blocks.columns,
                               wide - (vectors - 1) * LANES,
                               is_last && is_past_caches};
            of_x.bring(tiles), of_g.bring(tiles);
            found += add_part<T, ROWS, VECTORS>(rows + r * depth, std::min<int64_t>(ROWS, own.height - r),
                                                columns + j * depth, vectors, depth, tile);
          }
          if (is_last) squared += total<T>(found);
        }
      }
      squares[item] = squared;
    }
    _mm_sfence();
  }
}

}  // namespace

// Into how many blocks `product_gradients_*` cut each example's gradients.
extern "C" int64_t product_gradient_blocks(int64_t n, int64_t groups, int64_t rows, int64_t columns, int64_t itemsize,
                                           int threads) {
  const Blocks blocks(Sizes{n, groups, 1, rows, columns}, VECTORS * REGISTER / itemsize, threads);
  return groups * blocks.down * blocks.across;
}

// out[n, groups, rows, columns], unless it is null, from left[n, groups, positions, columns] and right[n, groups,
// positions, rows], whose features are their channels; squares[n, blocks] add up to the square of each gradient.
#define DEFINE(T, NAME)                                                                                            \
  extern "C" void NAME(const T* left, const Strides* of_left, const T* right, const Strides* of_right, T* out,     \
                       double* squares, int64_t n, int64_t groups, int64_t positions, int64_t rows, int64_t columns, \
                       int threads) {                                                                              \
    product_gradients<T>(left, *of_left, right, *of_right, out, squares, {n, groups, positions, rows, columns}, threads); \
  }
DEFINE(float, product_gradients_float32)
DEFINE(double, product_gradients_float64)
