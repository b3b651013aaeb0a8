// The sums of panels' rows and columns, for the bias gradient. What each function does is said at its type in
// ../microkernel.h.
#pragma once

#include "convert.h"

CONV1X1_KERNELS_BEGIN

// Adds elements of a panel to a vector of sums. The version for pairs, in pairs.h, adds one half of each.
template <class Lanes, class P>
inline void add_parts(Lanes& sum, const P* p, int) {
  Lanes x;
  __builtin_memcpy(&x, p, sizeof x);
  sum += x;
}

constexpr int kMaxPanelMr = 8;  // rows of a panel of A for tiles in registers

// sums[r] += the sum of row r of a panel. 16 steps of k are summed side by side, and these sums are joined in float64.
template <class T, class P, int KR>
void sum_lines(double* sums, const P* panel, int64_t rows, int64_t steps) {
  constexpr int64_t kSide = 16;
  typedef T Lanes __attribute__((vector_size(kSide * sizeof(T))));
  Lanes lanes[KR][kMaxPanelMr] = {};
  const int64_t width = kSide * rows, all = steps * rows, whole = all - all % width;
  const auto add = [&](const P* p) {
    for (int h = 0; h < KR; ++h)
      for (int64_t v = 0; v < rows; ++v) add_parts(lanes[h][v], p + v * kSide, h);
  };
  // Keeps the sums in registers, for the usual numbers of rows. A single row has several sums, so that no addition
  // waits for the one before it.
  const auto in_registers = [&](auto rows_of) {
    constexpr int kRows = decltype(rows_of)::value, kApart = kRows == 1 ? 8 : kRows;
    const int64_t together = whole - whole % (kApart * kSide);
    for (int h = 0; h < KR; ++h) {
      Lanes sum[kApart] = {};
      for (int64_t i = 0; i < together; i += kApart * kSide) {
#pragma GCC unroll 8
        for (int v = 0; v < kApart; ++v) add_parts(sum[v], panel + i + v * kSide, h);
      }
      for (int v = 0; v < kApart; ++v) lanes[h][v % kRows] += sum[v];
    }
    for (int64_t i = together; i < whole; i += width) add(panel + i);
  };
  if (rows == 8)
    in_registers(std::integral_constant<int, 8>());
  else if (rows == 1)
    in_registers(std::integral_constant<int, 1>());
  else
    for (int64_t i = 0; i < whole; i += width) add(panel + i);
  if (all > whole) {
    P last[kSide * kMaxPanelMr] = {};
    __builtin_memcpy(last, panel + whole, static_cast<size_t>(all - whole) * sizeof(P));
    add(last);
  }
  if (8 % rows != 0) {
    for (int h = 0; h < KR; ++h)
      for (int64_t j = 0; j < width; ++j) sums[j % rows] += static_cast<double>(lanes[h][j / kSide][j % kSide]);
    return;
  }
  typedef double Eight __attribute__((vector_size(8 * sizeof(double))));
  Eight eight = {};
  for (int h = 0; h < KR; ++h)
    for (int64_t v = 0; v < rows; ++v) {
      const Lanes& x = lanes[h][v];
      eight += __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), Eight);
      eight += __builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), Eight);
    }
  for (int64_t half = 4; half >= rows; half /= 2)
    for (int64_t j = 0; j < half; ++j) eight[j] += eight[half + j];
  for (int64_t j = 0; j < rows; ++j) sums[j] += eight[j];
}

template <class T, class P, int KR>
void sum_rows(double* sums, const void* panel, int64_t ld, int64_t rows, int64_t steps, AccessA access) {
  const P* p = static_cast<const P*>(panel);
  if (access == AccessA::kCols)
    sum_lines<T, P, KR>(sums, p, rows, steps);
  else
    for (int64_t r = 0; r < rows; ++r) sum_lines<T, P, KR>(sums + r, p + r * ld, 1, steps);
}

// sums[j] += the sum of column j of a panel, by short sums that are joined in float64. Lanes past the last column read
// what lies behind it: the next step, or the gap that the plan leaves behind a panel.
template <class T, class P, int KR>
void sum_columns(double* sums, const void* panel, int64_t ld, int64_t columns, int64_t steps) {
  constexpr int64_t kSide = 64 / sizeof(T), kShort = 32;
  typedef T Lanes __attribute__((vector_size(kSide * sizeof(T))));
  for (int64_t j = 0; j < columns; j += kSide) {
    const P* column = static_cast<const P*>(panel) + j;
    const int64_t here = columns - j < kSide ? columns - j : kSide;
    double sum[kSide] = {};
    for (int64_t k = 0; k < steps; k += kShort) {
      const int64_t end = steps - k < kShort ? steps : k + kShort;
      Lanes lanes[KR] = {};
      for (int64_t i = k; i < end; ++i)
        for (int h = 0; h < KR; ++h) add_parts(lanes[h], column + i * ld, h);
      for (int h = 0; h < KR; ++h)
        for (int64_t l = 0; l < kSide; ++l) sum[l] += static_cast<double>(lanes[h][l]);
    }
    for (int64_t l = 0; l < here; ++l) sums[j + l] += sum[l];
  }
}

CONV1X1_KERNELS_END
