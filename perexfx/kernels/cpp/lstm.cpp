// The backward of an LSTM through time: the gradients of the gates before their activations.
//
// Every thread takes some examples through all times, so that threads never wait for each other, and what one time
// needs of the next is still in the cache. Matrices are row-major and contiguous unless a stride is given; gates lie in
// torch's order (input, forget, cell, output), after their activations.

#include "products.h"

namespace {

// Output gates below count as this in a quotient of two values that are both next to nothing.
constexpr float SMALLEST = 1e-30f;

}  // namespace

// grad_gates is filled, and its sums over all times are added to grad_sums; grad_hidden and grad_cell are those of the
// last states, and become those of the initial ones; cells is filled with the cell states before each time.
//
// Shapes: gates [T, B, stride], output and grad_output [T, B, H] and grad_gates [T, B, 4 H], all in the order of the
// layer's input, which is the other way round than it runs if reverse; weight [4 H, H]; grad_sums [B, 4 H]; first_cell,
// grad_hidden and grad_cell [B, H]; cells [T, B, H], in an order of its own.
extern "C" void lstm_steps_back(const float* gates, int64_t stride, const float* output, const float* first_cell,
                                const float* grad_output, const float* weight, float* grad_gates, float* grad_sums,
                                float* grad_hidden, float* grad_cell, float* cells, int64_t T, int64_t B, int64_t H,
                                int reverse, int threads) {
  const int64_t each = (B + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t first = 0; first < B; first += each) {
    const int64_t last = std::min(B, first + each), size = (last - first) * H;
    float* own = cells + T * first * H;  // of these examples, in the order in which the layer runs
    std::copy(first_cell + first * H, first_cell + last * H, own);
    for (int64_t t = 0; t + 1 < T; ++t)
      for (int64_t b = first; b < last; ++b) {
        const float* __restrict__ gate = gates + ((reverse ? T - 1 - t : t) * B + b) * stride;
        const float* __restrict__ before = own + t * size + (b - first) * H;
        float* __restrict__ after = own + (t + 1) * size + (b - first) * H;
#pragma omp simd
        for (int64_t j = 0; j < H; ++j) after[j] = gate[H + j] * before[j] + gate[j] * gate[2 * H + j];
      }
    for (int64_t t = T - 1; t >= 0; --t) {
      const int64_t at = reverse ? T - 1 - t : t;
      for (int64_t b = first; b < last; ++b) {
        const float* __restrict__ gate = gates + (at * B + b) * stride;
        const float* __restrict__ before = own + t * size + (b - first) * H;
        const float* __restrict__ state = output + (at * B + b) * H;
        const float* __restrict__ arriving = grad_output + (at * B + b) * H;
        float* __restrict__ found = grad_gates + (at * B + b) * 4 * H;
        float* __restrict__ sums = grad_sums + b * 4 * H;
        float* __restrict__ hidden = grad_hidden + b * H;
        float* __restrict__ cell = grad_cell + b * H;
#pragma omp simd
        for (int64_t j = 0; j < H; ++j) {
          const float i = gate[j], f = gate[H + j], g = gate[2 * H + j], o = gate[3 * H + j];
          const float by_hidden = hidden[j] + arriving[j];
          const float tanh = state[j] / std::max(o, SMALLEST);
          const float by_cell = cell[j] + by_hidden * o * (1 - tanh * tanh);
          sums[j] += found[j] = by_cell * g * i * (1 - i);
          sums[H + j] += found[H + j] = by_cell * before[j] * f * (1 - f);
          sums[2 * H + j] += found[2 * H + j] = by_cell * i * (1 - g * g);
          sums[3 * H + j] += found[3 * H + j] = by_hidden * state[j] * (1 - o);
          cell[j] = by_cell * f;
          hidden[j] = 0;
        }
      }
      const float* rows = grad_gates + at * B * 4 * H;
      for (int64_t b = first; b < last; b += ROWS)
        add_rows<float, ROWS>(std::min<int64_t>(ROWS, last - b), rows + b * 4 * H, 4 * H, weight, H,
                              grad_hidden + b * H, H, 4 * H, H);
    }
  }
}
