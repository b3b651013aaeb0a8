// How the CPU runs a GemmProblem.
//
//  GemmProblem -> Plan (a pure function)                GemmProblem + Plan -> result (cpu/run/)
//  plan.cpp        k, blocks, strips, workspace         driver.cpp      workspace, threads, phases
//  operands.cpp    kernel, tiles, sources of A and B    worker.h        a thread's loop nest around blocks
//  partition.cpp   what each thread computes            fma_block.h, amx_block.h    the loops in a block
//  roles.cpp       which operand is A                   panels.h, columns.h         packed operands; columns of tiles
//  explain.cpp     a plan in words                      output.h, fetch_ahead.h     stores; prefetches
//
// The loops call a microkernel (cpu/kernels/microkernel.h).
#pragma once

#include <string>

#include "../../problem/gemm.h"
#include "../kernels/microkernel.h"

namespace conv1x1 {

// Where a tile's operand comes from.
enum class Source : int {
  kInPlace,               // read in place, from the tensor itself
  kConvertedOnLoad,       // read in place, converted to the kernel's dtype by every tile that reads it
  kSplitBetweenProducts,  // read in place, in parts: a group of k is split while the group before is multiplied
  kPackedOnce,            // in panels; the whole operand is packed before the first tile
  kPackedByBlock,         // in panels; every thread packs the block that it reads next
  kPackedAhead,           // A in parts: a row of tiles is packed between the products of the row before
  kFromCaller,            // in panels that the caller packed beforehand
};

// Where an operand comes from, with the reason in words that explain() prints.
struct OperandPlan {
  Source source = Source::kInPlace;
  const char* reason = "";
  bool in_place() const { return source <= Source::kSplitBetweenProducts; }
  bool by_block() const { return source == Source::kPackedByBlock || source == Source::kPackedAhead; }
  bool whole() const { return source == Source::kPackedOnce || source == Source::kFromCaller; }  // panels of all of it
};

struct Range {
  int64_t begin, end;
};

inline Range share(int64_t total, int parts, int part) {
  const int64_t q = total / parts, r = total % parts;
  const int64_t begin = part * q + (part < r ? part : r);
  return {begin, begin + q + (part < r ? 1 : 0)};
}

// Cuts m or n into segments, and each segment into tiles. The numbers of vectors of two tiles differ by one at most.
// The longer tiles are spread evenly, so that any equal number of consecutive tiles is about equal work.
struct Tiling {
  int64_t segment = 0, segments = 0, unit = 1, vectors = 0, per_segment = 0;

  Tiling() = default;
  Tiling(int64_t total, int64_t segment_length, int64_t unit_, int64_t max_units);
  int64_t count() const { return segments * per_segment; }
  int64_t padded() const { return segments * vectors * unit; }  // with every segment rounded up to whole vectors
  int64_t most(int64_t tiles) const {                           // the most units in that many consecutive tiles
    return tiles <= 0 ? 0 : (tiles * vectors + per_segment - 1) / per_segment;
  }

  // `limit` if that many tiles from t on have the same length and lie in one segment, else 1.
  int64_t same_size(int64_t t, int64_t limit) const {
    if (limit <= 1) return 1;
    const Tile first = (*this)[t], last = (*this)[t + limit - 1];  // lengths differ by one unit at most
    return last.segment == first.segment && last.size == first.size &&
                   last.start - first.start == (limit - 1) * first.size
               ? limit
               : 1;
  }

  struct Tile {
    int64_t start, size, padded_start, padded_size, segment;
  };
  Tile operator[](int64_t t) const {
    const int64_t s = segments == 1 ? 0 : t / per_segment, j = t - s * per_segment;
    const int64_t first = j * vectors / per_segment, units = (j + 1) * vectors / per_segment - first;
    const int64_t at = first * unit, left = segment - at;
    return {s * segment + at, units * unit < left ? units * unit : left, (s * vectors + first) * unit, units * unit, s};
  }
};

constexpr int kMaxBlockN = 32;  // tiles of n in a block at most

struct Plan {
  const Microkernel* kernel = nullptr;
  const char* shape = "";     // which of the kernel's shapes this is, and why
  const char* isa = nullptr;  // of the kernel set, which may use the kernel of an older one
  Tiling m, n;
  OperandPlan a, b;
  AccessA a_access = AccessA::kRows;
  bool streams = false;              // D is too large for caches: whole lines are stored past them
  bool prepacked = false;            // the caller brought the weight's panels; B, packed by block, copies them
  int64_t block_m = 1, block_n = 1;  // tiles of m and n in a block
  bool groups_take_turns = false;    // groups are inside the loop over blocks of m (wgrad: k-slices), not outside
  bool fetches_rows = true;          // rows of A that tiles read in place are prefetched into L1, two tiles ahead
  int64_t strip = 1;                 // tiles of m that one call of the microkernel computes, at most
  int64_t piece = 0;                 // steps of k that such a call computes for all of its tiles at a time
  int64_t partials_kept = 1;         // tiles of a call whose sums are kept between pieces
  int64_t staged = 1;                // tiles finished in the workspace before they are stored to D or pooled
  int64_t reach_n = 1;               // tiles of n that a packed block of A serves
  int64_t kc = 0;                    // length of a chain in k; the bits of results depend on it
  int64_t k_step = 0;                // k packed at a time: all of a slice, or a multiple of kc (wgrad: of 64)
  int64_t slices = 1, slice = 0;     // k-slices and their length
  int threads = 1, part_g = 1, part_k = 1, part_m = 1, part_n = 1;
  int64_t panel_a = 0, panel_b = 0;  // elements from panel to panel of a packed block
  // workspace, in bytes
  int64_t once_a = 0, once_b = 0, block_a = 0, block_b = 0, accumulators = 0, partials = 0, sums = 0, bias = 0;
  bool packs_ahead() const { return a.source == Source::kPackedAhead; }
  int64_t steps(int64_t k) const {  // of the microkernel, in panels; whole groups of KS
    const int64_t group = kernel->kr * kernel->ks;
    return (k + group - 1) / group * kernel->ks * kernel->parts;
  }
  // The number of tiles whose accumulators are kept from one piece of k to the next.
  int64_t kept() const { return k_step < slice ? block_m * reach_n : 0; }
  int64_t per_thread() const;
  int64_t total() const;
};

// Exchanges the roles of dz and x in wgrad (D^T = B^T A^T) where packing is then faster. Returns any other problem
// unchanged.
GemmProblem with_best_roles(const GemmProblem& problem);

// Exchanges A and B of a forward in NCHW where its pixels are too few to fill vectors and a packed weight fills them:
// D^T = B^T W^T, stored transposed. Returns any other problem unchanged.
GemmProblem roles_for_packed_weight(const GemmProblem& problem, const KernelSet& kernels);

// Pure: the same problem, thread count and table always give the same plan.
Plan make_plan(const GemmProblem& problem, int max_threads, const KernelSet& kernels);
std::string describe(const GemmProblem& problem, const Plan& plan);

// For a weight that stays the same over many calls: the bytes of its panels, and packing them at an address aligned to
// 64 bytes. Zero bytes: the kernels read this weight in place, or the problem is a wgrad and has no weight. Panels
// depend on the weight, its role and the microkernel, not on batch or threads. (An image of few pixels may have another
// microkernel.) GemmProblem::packed_weight takes them.
int64_t packed_weight_bytes(const GemmProblem& problem, const KernelSet& kernels);
void pack_weight(const GemmProblem& problem, const KernelSet& kernels, void* panels);

enum Status : int { kOk = 0, kOutOfMemory = 1 };
Status run_gemm(const GemmProblem& problem, const Plan& plan);
Status run_gemm(const GemmProblem& problem, int max_threads, const KernelSet& kernels);  // with_best_roles()

}  // namespace conv1x1
