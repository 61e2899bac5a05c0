// Vectors as wide as the registers that this file is compiled for.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t REGISTER = 64;  // bytes
constexpr int ROWS = 6, VECTORS = 4;  // of a block of sums: with its factors, it fits the registers
#elif defined(__AVX__)
constexpr int64_t REGISTER = 32;
constexpr int ROWS = 5, VECTORS = 2;
#else
#error "Kernels are made for AVX2 and AVX-512: with narrower vectors, torch's own operations are faster."
#endif

template <typename T>
struct Lanes {
  static constexpr int64_t COUNT = REGISTER / sizeof(T);
  typedef T Vector __attribute__((vector_size(REGISTER), aligned(sizeof(T)), may_alias));
  typedef double Doubles __attribute__((vector_size(COUNT * sizeof(double))));  // as many
};

template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <typename T>
inline void store(T* into, Vector<T> value) {
  *reinterpret_cast<Vector<T>*>(into) = value;
}

// The first `count` lanes, the rest zero.
template <typename T>
inline Vector<T> load_some(const T* from, int64_t count) {
  if (count == Lanes<T>::COUNT) return load(from);
  Vector<T> value{};
  std::memcpy(&value, from, count * sizeof(T));
  return value;
}

template <typename T>
inline void store_some(T* into, Vector<T> value, int64_t count) {
  if (count == Lanes<T>::COUNT)
    store(into, value);
  else
    std::memcpy(into, &value, count * sizeof(T));
}

// A whole vector, to memory that nobody reads soon, past the caches; `into` is a multiple of a register's bytes. Who has
// done so says `_mm_sfence()` before anyone is told.
template <typename T>
inline void store_past_caches(T* into, Vector<T> value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(into), reinterpret_cast<__m512i>(value));
#else
  _mm256_stream_si256(reinterpret_cast<__m256i*>(into), reinterpret_cast<__m256i>(value));
#endif
}

// Memory of more bytes is not read before others have taken its place in the caches.
constexpr int64_t PAST_CACHES = 4 << 20;

// Whether `size` elements, in blocks of `width` side by side, should be stored past the caches, and can be: all of them
// in whole vectors.
template <typename T>
inline bool can_go_past_caches(const T* into, int64_t width, int64_t size) {
  return reinterpret_cast<uintptr_t>(into) % REGISTER == 0 && width % Lanes<T>::COUNT == 0 &&
         size * int64_t(sizeof(T)) > PAST_CACHES;
}

template <typename T>
inline double total(Vector<T> value) {
  double sum = 0;
  for (int64_t lane = 0; lane < Lanes<T>::COUNT; ++lane) sum += value[lane];
  return sum;
}

inline int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace
