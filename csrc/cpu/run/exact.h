// Recomputes in float32 the sums that operands in parts (amx_kernel.h) get wrong: where an operand is infinite, NaN or
// too large for its parts, and where operands are so small that parts of their products vanish. Whether an output is
// recomputed, and its bits, depend on its own row of A and column of B alone. The code is slow and seldom called.
#pragma once

#include <cstring>
#include <limits>

#include "../kernels/amx/amx_kernel.h"
#include "../plan/plan.h"

namespace conv1x1 {

class ExactSums {
 public:
  ExactSums(const GemmProblem& problem, const Microkernel& kernel) : p_(problem), kernel_(kernel) {
    if (kernel.parts == 1) return;
    a_.group = -1;
    for (Known& known : b_) known.group = -1;
  }

  // The sums of a tile over k [k0, k0 + nk), and the panels from which they were computed.
  struct Sums {  // no initial values: setting them would slow small calls
    int64_t group, k0, nk;
    Tiling::Tile ti, tj;
    const void *a, *b;
    int64_t lda, ldb, steps;
  };

  // Recomputes those of a tile's sums that are doubtful.
  void repair(float* sums, int64_t ld, bool finite, const Sums& of) {
    const auto& [group, k0, nk, ti, tj, panel_a, panel_b, lda, ldb, steps] = of;
    Known &of_a = known(a_, group, ti, k0), &of_b = known(b_[tj.start / kernel_.vector % kMaxBlockN], group, tj, k0);
    // Most small sums are zeros of rows of zeros: then neither panel has a small number.
    if (finite && !has_small(of_a, panel_a, lda, steps) && !has_small(of_b, panel_b, ldb, steps)) return;
    const Kinds &rows = kinds(of_a, true, group, ti, k0, nk), &columns = kinds(of_b, false, group, tj, k0, nk);
    uint32_t wanted[kMaxMr] = {}, any = 0;
    for (int64_t i = 0; i < ti.size; ++i)
      for (int64_t j = 0; j < tj.size; ++j) {
        const uint32_t magnitude = magnitude_of(sums[i * ld + j]);
        const bool is_finite = magnitude < kInfinity;
        if (!is_finite && ((rows.nan >> i | columns.nan >> j) & 1) != 0)
          sums[i * ld + j] = std::numeric_limits<float>::quiet_NaN();
        else if (!is_finite || (magnitude < kDoubtfulBelow && ((rows.small >> i | columns.small >> j) & 1) != 0))
          wanted[i] |= uint32_t{1} << j;
        any |= wanted[i];
      }
    if (any == 0) return;
    float exact[kMaxMr][kLanes] = {};
    for (int64_t k = k0; k < k0 + nk; k += kChunk) {
      float a[kLanes * kChunk], b[kChunk * kLanes];
      const int64_t n = k0 + nk - k < kChunk ? k0 + nk - k : kChunk;
      gather(p_.a, group, a, kChunk, p_.a.row, ti.start, ti.size, p_.a.col, k, n);
      gather(p_.b, group, b, kLanes, p_.b.row, k, n, p_.b.col, tj.start, tj.size);
      for (int64_t i = 0; i < ti.size; ++i) {
        if (wanted[i] == 0) continue;
        float chain[kLanes] = {};
        for (int64_t s = 0; s < n; ++s)
          for (int64_t j = 0; j < tj.size; ++j) chain[j] += a[i * kChunk + s] * b[s * kLanes + j];
        for (int64_t j = 0; j < tj.size; ++j) exact[i][j] += chain[j];
      }
    }
    for (int64_t i = 0; i < ti.size; ++i)
      for (int64_t j = 0; j < tj.size; ++j)
        if (wanted[i] >> j & 1) sums[i * ld + j] = exact[i][j];
  }

  // The same for the sums of a tile's rows of A, or (exchanged) columns of B.
  void repair_sums(double* sums, bool of_a, int64_t group, const Tiling::Tile& t, int64_t k0, int64_t nk) const {
    for (int64_t i = 0; i < t.size; ++i) {
      const uint32_t magnitude = magnitude_of(static_cast<float>(sums[i]));
      if (magnitude >= kDoubtfulBelow && magnitude < kInfinity) continue;
      sums[i] = 0;
      for (int64_t k = k0; k < k0 + nk; k += kChunk) {
        float x[kChunk];
        const int64_t n = k0 + nk - k < kChunk ? k0 + nk - k : kChunk;
        if (of_a)
          gather(p_.a, group, x, kChunk, p_.a.row, t.start + i, 1, p_.a.col, k, n);
        else
          gather(p_.b, group, x, 1, p_.b.row, k, n, p_.b.col, t.start + i, 1);
        for (int64_t s = 0; s < n; ++s) sums[i] += static_cast<double>(x[s]);
      }
    }
  }

 private:
  // A bit for each row of A or column of B of a tile: whether it has a NaN, and whether it has a number, not zero, so
  // small that its product with an equally small number might lose parts.
  struct Kinds {
    uint32_t nan = 0, small = 0;
  };
  struct Known {
    int64_t group, start, k0;
    enum { kUnknown, kNo, kYes } small;
    bool kinds_known;
    Kinds kinds;
  };
  static constexpr int64_t kChunk = 64, kLanes = 32;
  static constexpr uint32_t kInfinity = 0x7f800000;
  static_assert(kMaxMr <= kLanes, "a bit for each row");

  static uint32_t magnitude_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
  }

  void gather(const Matrix& matrix, int64_t group, float* to, int64_t ld, const Axis& r, int64_t r0, int64_t nr,
              const Axis& c, int64_t c0, int64_t nc) const {
    const int64_t size = dtype_size(p_.dtype);
    const char* aux = static_cast<const char*>(matrix.aux);
    kernel_.gather[static_cast<int>(p_.dtype)](
        to, ld, static_cast<const char*>(matrix.data) + group * matrix.group_stride * size,
        aux ? aux + group * matrix.aux_group_stride * size : nullptr, r, r0, nr, c, c0, nc,
        aux ? p_.mask : Mask::kNone);
  }

  static Known& known(Known& known, int64_t group, const Tiling::Tile& t, int64_t k0) {
    if (known.group != group || known.start != t.start || known.k0 != k0)
      known = {group, t.start, k0, Known::kUnknown, false, {}};
    return known;
  }

  bool has_small(Known& known, const void* panel, int64_t ld, int64_t steps) const {
    if (known.small == Known::kUnknown)
      known.small = kernel_.amx->has_small(panel, ld, steps) ? Known::kYes : Known::kNo;
    return known.small == Known::kYes;
  }

  const Kinds& kinds(Known& known, bool of_a, int64_t group, const Tiling::Tile& t, int64_t k0, int64_t nk) const {
    if (known.kinds_known) return known.kinds;
    known.kinds_known = true;
    for (int64_t k = k0; k < k0 + nk; k += kChunk) {
      float x[kChunk * kLanes];
      const int64_t n = k0 + nk - k < kChunk ? k0 + nk - k : kChunk;
      if (of_a)
        gather(p_.a, group, x, kChunk, p_.a.row, t.start, t.size, p_.a.col, k, n);
      else
        gather(p_.b, group, x, kLanes, p_.b.row, k, n, p_.b.col, t.start, t.size);
      for (int64_t i = 0; i < t.size; ++i) {
        uint32_t nan = 0, small = 0;
        for (int64_t s = 0; s < n; ++s) {
          const uint32_t magnitude = magnitude_of(of_a ? x[i * kChunk + s] : x[s * kLanes + i]);
          nan |= magnitude > kInfinity;
          // The same test as that of has_small() on a panel. With another test a small neighbour could decide whether
          // this row is recomputed.
          const uint32_t first_part = (magnitude + 0x8000) >> 16;
          small |= first_part - 1 < (kSmallBelow >> 16) - 1;
        }
        known.kinds.nan |= nan << i;
        known.kinds.small |= small << i;
      }
    }
    return known.kinds;
  }

  const GemmProblem& p_;
  const Microkernel& kernel_;
  Known a_, b_[kMaxBlockN];
};

}  // namespace conv1x1
