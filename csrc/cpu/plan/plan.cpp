// GemmProblem -> Plan: k-slices, blocks, which panels are packed where, and the workspace. A pure function.
// operands.cpp chooses the kernel, the tiles and the sources of operands, partition.cpp the threads' shares.
// explain.cpp prints the result.
//
// The choices that decide the bits of results are the microkernel's arithmetic, kc, the k-slices, the pieces of k of
// operands in parts, and the packed length over which bias gradients are summed. None depends on the number of threads.
// For y and dx none depends on the batch.
#include <unistd.h>

#include <algorithm>

#include "plan_facts.h"

namespace conv1x1 {
namespace {

// Length of a chain in k: no output's error may be more than twice stock torch's. Joining chains of 64 costs 3 % of the
// rate on long k, joining chains of 32 twice that. With chains of 128 errors were up to 3 times stock's, which sums
// narrow layers in many short chains; on narrow layers chains of 64 were too long as well. With 256 errors were up to
// 2.7 times stock's where the output is a single pixel. Results of half types are rounded far more coarsely than their
// float32 sums.
constexpr int64_t kNarrowChain = 32, kChain = 64, kLongChain = 128, kHalfChain = 256, kPartsChain = 256;
constexpr int64_t kLongK = 512;            // k from which chains may be long
constexpr int64_t kPackedK = 256;          // k packed at a time where accumulators are carried; a multiple of chains
constexpr int64_t kTiledK = 512;           // the same with AMX: a tile of A is then 32 KiB, which stay in L1
constexpr int64_t kPartsK = 384;           // the same in wgrad of operands in parts whose rows along k ...
constexpr int64_t kLongRows = 2048;        // ... have at least this length
constexpr int64_t kLongParts = 2304;       // parts times k packed at a time: L2 holds too few longer panels
constexpr int64_t kMaxBlockA = 2 << 20;    // bytes of A packed at a time: they pass by B's block, from L2 or L3
constexpr int64_t kMaxCarried = 1 << 21;   // accumulators that a thread carries from one packed piece of k to the next
constexpr int64_t kMinSlice = 2048;        // wgrad: shortest k-slice worth a partial result
constexpr int64_t kMaxPartials = 1 << 21;  // wgrad: elements of partial results
constexpr int64_t kMaxSlices = 64;
constexpr int64_t kTurnBytes = 1 << 20, kTurnsFrom = 4 << 20;  // wgrad of groups: bytes of a slice; of all pixels
constexpr int64_t kInPlaceL2 = 1 << 20;    // of a larger L2, for blocks in place, whose pages share sets by chance
constexpr int64_t kOwnPanels = 2 << 20;    // bytes of a weight's panels, all threads together, if each packs its own
constexpr int64_t kRowsToCopy = 1024;      // rows of A from which a thread copies panels that the caller packed
constexpr int64_t kStripBytes = 32 << 10;  // bytes of A in the tiles that one call computes
constexpr int64_t kMaxStrip = 16;
constexpr int64_t kPooledTiles = 4;                       // tiles in parts in one call, before they are pooled
constexpr int64_t kGroupsACall = 64, kMaxTiledStrip = 8;  // AMX: groups of k in a call; rows of tiles in a call
constexpr int64_t kStreamedBytes = 32 << 20;              // larger results come from fresh pages and do not stay in L3
// Operands and results that L3 is likely to hold. What the operating system tells may be the L3 of all cores together.
constexpr int64_t kCachedBytes = 16 << 20;
constexpr int64_t kCachedInL2 = 3 << 20;  // the same for the L2 of the threads

#if defined(_SC_LEVEL1_DCACHE_SIZE)
constexpr int kL1 = _SC_LEVEL1_DCACHE_SIZE, kL2 = _SC_LEVEL2_CACHE_SIZE;
#else
constexpr int kL1 = -1, kL2 = -1;
#endif

int64_t cache_bytes(int name, int64_t least, int64_t most, int64_t unknown) {
  const int64_t found = sysconf(name);
  return found > 0 ? clamp(found, least, most) : unknown;
}

int64_t l1_bytes() {
  static const int64_t bytes = cache_bytes(kL1, 32 << 10, 64 << 10, 32 << 10);
  return bytes;
}

}  // namespace

int64_t l2_bytes() {
  static const int64_t bytes = cache_bytes(kL2, 256 << 10, 2 << 20, 512 << 10);
  return bytes;
}

namespace {

// The length of k that wgrad packs at a time. With longer pieces accumulators are loaded and stored less often. But
// where lines are packed at the speed of memory, the prefetched data of the next piece must fit into L2 beside this
// piece.
int64_t wgrad_k_step(const GemmProblem& p, const Plan& plan) {
  const int64_t kr = plan.kernel->kr, size = dtype_size(p.dtype), parts = plan.kernel->parts;
  // One chain at a time; more where rows along k are long and memory is then read faster.
  if (parts > 1) return p.b.row.inner_stride() == 1 && p.b.row.inner_size() >= kLongRows ? kPartsK : kPartsChain;
  const int64_t longest = plan.kernel->ks > 1 ? kTiledK : 3 * kPackedK * kr / 2;
  const int64_t read = (p.m * (p.a.aux ? 2 : 1) + p.n * (p.b.aux ? 2 : 1)) * size;
  const int64_t packed = (p.m + p.n) * dtype_size(plan.kernel->operand);
  const int64_t fit = l2_bytes() / 2 / std::max<int64_t>(read + packed, 1);
  const bool long_lines = p.b.col.inner_stride() == 1 && (kr == 1 || p.exchanged);
  if (!long_lines || fit < kChain * kr) return longest;
  return clamp((fit + kChain / 2) / kChain * kChain, kr == 1 ? 2 * kChain : 3 * kChain, longest);
}

int64_t chain(const GemmProblem& p, const Plan& plan) {
  if (plan.kernel->parts > 1) return kPartsChain;
  if (dtype_size(p.dtype) == 2) return p.k < 2 * kLongK ? kHalfChain : kLongChain * plan.kernel->kr;
  if (p.narrow) return kNarrowChain;
  return p.k >= kLongK ? kLongChain : kChain;
}

// With channels last the groups of a pixel lie side by side. One group after the other would read and write the lines
// of all pixels in memory once for every group. Instead groups take turns at as many pixels as stay in L2.
bool channels_side_by_side(const GemmProblem& p) {
  const Axis &channels = p.split_k ? p.a.row : p.a.col, &pixels = p.split_k ? p.a.col : p.a.row;
  const bool x_or_dz =
      !p.a_is_weight && channels.inner_stride() == 1 && pixels.inner_stride() > (p.split_k ? p.m : p.k);
  return p.groups > 1 && x_or_dz && (!p.split_k || p.b.col.inner_stride() == 1);
}

// Bytes of a pixel that a GEMM reads and writes, all groups together.
int64_t bytes_of_pixel(const GemmProblem& p) {
  const int64_t size = dtype_size(p.dtype), a = (p.split_k ? p.m : p.k) * (p.a.aux ? 2 : 1) * size;
  const int64_t other = p.n * (p.split_k ? (p.b.aux ? 2 : 1) * size : dtype_size(p.out_dtype));
  return std::max<int64_t>(p.groups * (a + other), 1);
}

void choose_k(const GemmProblem& p, Plan& plan, int64_t element) {
  plan.kc = chain(p, plan);
  plan.slice = p.k;
  if (p.split_k) {
    const int64_t mn = std::max<int64_t>(p.m * p.n * p.groups, 1);
    const int64_t shortest = p.k * bytes_of_pixel(p) > kTurnsFrom && channels_side_by_side(p)
                                 ? clamp(kTurnBytes / bytes_of_pixel(p), plan.kc, kMinSlice)
                                 : kMinSlice;
    const int64_t slices = clamp(std::min(p.k / shortest, kMaxPartials / mn), 1, kMaxSlices);
    plan.slice = std::max(round_up(ceil_div(p.k, slices), plan.kc), plan.kc);
    plan.slices = std::max<int64_t>(ceil_div(p.k, plan.slice), 1);
  }
  const bool packs = plan.a.by_block() || plan.b.by_block();
  const int64_t kr = plan.kernel->kr, packed_k = kPackedK * kr;
  const int64_t long_panels = std::max(l2_bytes() / 2 / (plan.kernel->nr * element) * kr, packed_k);
  int64_t longest = long_panels;
  if (p.split_k)
    longest = wgrad_k_step(p, plan);
  else if (one_tile_of_weights(p, *plan.kernel))  // in place or not, for strides must not decide bits
    longest = plan.slice;
  else if (plan.kernel->parts > 1)
    longest = kLongParts / plan.kernel->parts;
  plan.k_step = std::max<int64_t>(plan.slice, 1);
  if (packs && plan.slice > longest)  // pieces of nearly equal length
    plan.k_step = round_up(ceil_div(plan.slice, ceil_div(plan.slice, p.split_k ? longest : 3 * packed_k / 2)),
                           p.split_k ? kChain : std::max(plan.kc, kChain));  // whole chains: see plan.h
  // A few pixels in place are multiplied with every panel of a weight: take as much of k at a time as leaves both in
  // L2.
  const int64_t both = 3 * l2_bytes() / 4 / ((p.m + plan.kernel->nr) * element);
  if (plan.a.in_place() && plan.a_access == AccessA::kCols && plan.b.whole() && both > plan.kc)
    plan.k_step = std::min(plan.k_step, round_up(ceil_div(plan.slice, ceil_div(plan.slice, both)), plan.kc));
}

// Chooses the strip: tiles of m in one call, whose columns of B stay in L1. Where k is so long that one tile of A fills
// L1, the call takes a piece of k at a time for all tiles and keeps their sums in between.
void choose_strip(Plan& plan, int64_t steps, int64_t element) {
  const int64_t mr = plan.kernel->mr, nr = plan.kernel->nr, chain = plan.steps(plan.kc);
  plan.piece = std::max<int64_t>(steps, 1);
  if (plan.kernel->ks > 1) {  // a call computes a row of tiles; several rows only if one is little work
    const int64_t row = std::max<int64_t>(steps / plan.kernel->ks * plan.block_n, 1);
    const bool whole = plan.k_step >= plan.slice && plan.slices == 1;
    if (whole && plan.kernel->parts == 1) plan.strip = clamp(kGroupsACall / row, 1, kMaxTiledStrip);
    if (whole && plan.a.source == Source::kSplitBetweenProducts) plan.strip = kMaxTiledStrip;
    return;
  }
  plan.strip = clamp(kStripBytes / (mr * steps * element), 1, kMaxStrip);
  if (plan.strip > 1 || steps <= chain || plan.k_step < plan.slice) return;
  plan.piece = std::max(2 * l1_bytes() / 3 / (nr * element) / chain, int64_t{1}) * chain;
  const int64_t in_l1 = l1_bytes() / 4 / (mr * nr * element), in_l2 = l2_bytes() / 8 / (mr * steps * element);
  plan.strip = plan.partials_kept = clamp(std::min(in_l1, in_l2), 1, kMaxStrip);
}

// Can a row of tiles of A be packed while the row before is computed? All of B must then fit beside it.
bool can_pack_ahead(const GemmProblem& p, const Plan& plan, int64_t element) {
  const Axis& k = p.a.col;
  const bool lines = k.inner_stride() == 1 && k.linear() && (!p.a.aux || k.aux_stride[k.nd - 1] == 1);
  const int64_t all_b = plan.n.padded() * plan.steps(plan.k_step) * element;
  return plan.kernel->parts > 1 && plan.a.by_block() && lines && !p.split_k && !p.pools && p.groups == 1 &&
         plan.k_step >= plan.slice && plan.n.count() <= kMaxBlockN && all_b <= l2_bytes() / 2;
}

// B's block stays in L2 while A's tiles pass by it. Each tile of A is read from L1 for all n tiles of the block. A
// packed block of A serves all of n, or as much of n as has room for its accumulators, so that each element is packed
// once.
void choose_blocks(const GemmProblem& p, Plan& plan, int64_t element) {
  if (can_pack_ahead(p, plan, element)) plan.a.source = Source::kPackedAhead;
  const int64_t l2 = plan.b.in_place() ? std::min(l2_bytes(), kInPlaceL2) : l2_bytes();
  const int64_t mr = plan.kernel->mr, nr = plan.kernel->nr, steps = plan.steps(plan.k_step);
  const int64_t tiles_m = std::max<int64_t>(plan.m.count(), 1), tiles_n = std::max<int64_t>(plan.n.count(), 1);
  const bool carried = plan.k_step < plan.slice;  // accumulators live across k steps
  // Leave room for the next block beside B's, if enough columns remain for each pass over A. With operands in parts,
  // which L1 cannot hold, leave room for the whole block of A.
  const bool in_parts = plan.kernel->parts > 1;
  const int64_t panel = nr * steps * element, half = (in_parts ? 3 * l2 / 8 : l2 / 2) / panel, quarter = l2 / 4 / panel;
  const bool feeds_b = plan.b.source == Source::kSplitBetweenProducts;  // there are no panels of it
  const int64_t fit =
      feeds_b ? kMaxBlockN : clamp(p.b_is_weight ? half : std::max(quarter, std::min<int64_t>(half, 4)), 1, kMaxBlockN);
  plan.block_n = plan.packs_ahead() ? tiles_n : ceil_div(tiles_n, ceil_div(tiles_n, fit));  // of nearly equal size
  plan.block_m = tiles_m;
  const bool repacks_b = plan.b.by_block() && (carried || plan.block_n < tiles_n);  // for every block of A
  // If all of B is read again for each block of A, the block is large.
  if (plan.a.source == Source::kPackedByBlock) {
    const int64_t most = repacks_b ? kMaxBlockA : (plan.block_n == tiles_n ? l2 / 8 : (in_parts ? l2 / 4 : l2 / 2));
    plan.block_m = clamp(most / (mr * steps * element), 1, tiles_m);
  }
  if (carried) plan.block_m = clamp(kMaxCarried / (mr * nr * plan.block_n), 1, plan.block_m);
  choose_strip(plan, steps, element);
  // A pitched tile fetches a line of A in every step. The loads of the narrow tile occupy the load ports fully, so
  // fetching pays only if A comes from memory, not from L3.
  const int64_t touched = p.groups * (p.m * (p.k + p.n) + p.k * p.n) * dtype_size(p.dtype);
  const bool from_l3 = plan.n.vectors > 1 && plan.partials_kept == 1 && touched > kCachedInL2;
  const bool pitched = plan.kernel->fma && plan.kernel->fma->pitched;
  plan.fetches_rows = !pitched || from_l3 || touched > kCachedBytes;
  plan.reach_n = carried ? clamp(kMaxCarried / (mr * nr * plan.block_m), plan.block_n, tiles_n) : tiles_n;
}

void take_turns(const GemmProblem& p, Plan& plan) {
  if (plan.m.count() == 0 || p.pools || !channels_side_by_side(p)) return;
  if (p.split_k) {
    plan.groups_take_turns = plan.slices > 1;
    return;
  }
  if (plan.k_step < plan.slice) return;
  const int64_t fit = l2_bytes() / (bytes_of_pixel(p) * plan.m.most(1) * plan.m.unit);  // tiles
  if (fit >= ceil_div(plan.m.count(), plan.part_m)) return;
  plan.groups_take_turns = true;
  plan.block_m = clamp(fit / 2, 1, plan.block_m);
}

// If only one thread reads a weight's panels, that thread packs them right before it uses them: they need not come back
// from L3 or memory, no thread waits for them, and the workspace stays small enough for malloc to keep. Small panels
// are packed by every thread for itself, because lines that another core has just written take longer to load than to
// pack. Panels that the caller packed are copied by each thread that multiplies many rows with them, because two cores
// that read the same lines get them more slowly.
void pack_where_used(const GemmProblem& p, Plan& plan, int64_t element) {
  if (plan.groups_take_turns && !p.split_k) return;  // B's groups would be packed again for each block
  const bool one_block = plan.block_m >= ceil_div(plan.m.count(), plan.part_m), pieces = plan.k_step != p.k;
  if (pieces && !one_block) return;  // B would be packed again for each block
  const int64_t panels = plan.n.padded() * plan.steps(p.k) * element;
  if (plan.b.whole() && (plan.part_m == 1 || panels * plan.part_m <= kOwnPanels) &&
      (one_block || plan.block_n >= plan.n.count()) &&
      (!plan.prepacked || (plan.kernel->ks == 1 && plan.part_m > 1 &&
                           plan.m.most(plan.m.count()) * plan.m.unit >= kRowsToCopy * plan.part_m)))
    plan.b.source = Source::kPackedByBlock;
  if (plan.prepacked) return;
  // (More seldom for A: where its rows conflict, packing reads with large strides.)
  const int64_t rows = plan.m.segments * plan.m.segment * plan.steps(p.k) * element;
  if (plan.a.source == Source::kPackedOnce && (plan.part_n == 1 || rows * plan.part_n <= kOwnPanels / 8) &&
      plan.block_n >= ceil_div(plan.n.count(), plan.part_n)) {
    plan.a.source = Source::kPackedByBlock;
    if (!pieces) plan.block_m = clamp(l2_bytes() / 4 / (plan.kernel->mr * plan.steps(p.k) * element), 1, plan.block_m);
  }
}

// Blocks need not be larger than the largest share of a thread.
void fit_blocks_to_shares(const GemmProblem& p, Plan& plan) {
  const auto largest = [](const Tiling& t, int parts, bool whole_segments) {
    return whole_segments ? ceil_div(t.segments, parts) * t.per_segment : ceil_div(t.count(), parts);
  };
  const int64_t m = largest(plan.m, plan.part_m, p.pools && !p.pool_along_n);
  const int64_t n = std::max<int64_t>(largest(plan.n, plan.part_n, p.pools && p.pool_along_n), 1);
  plan.block_m = std::min(plan.block_m, std::max<int64_t>(m, 1));
  plan.reach_n = std::min(plan.reach_n, n);
  plan.block_n = ceil_div(plan.reach_n, ceil_div(plan.reach_n, plan.block_n));
}

// Bytes behind the last panel of A which a tile with fewer rows than its unit reads.
int64_t behind_a(const Microkernel& kernel) { return kernel.parts > 1 ? kernel.m_unit * 64 : 0; }

void size_workspace(const GemmProblem& p, Plan& plan, int64_t element) {
  const auto bytes = [](int64_t n) { return round_up(n, 64); };
  const int64_t mr = plan.kernel->mr, nr = plan.kernel->nr, steps = plan.steps(plan.k_step);
  if (!plan.prepacked) {
    if (plan.a.whole()) plan.once_a = bytes(p.groups * p.m * plan.steps(p.k) * element) + behind_a(*plan.kernel);
    if (plan.b.whole()) plan.once_b = bytes(p.groups * plan.n.padded() * plan.steps(p.k) * element);
  }
  // One line more than a round distance, at which panels that are written side by side would share cache sets.
  plan.panel_a = mr * steps + 64 / element;
  plan.panel_b = nr * steps + 64 / element;
  const int64_t panels_a = plan.packs_ahead() ? 2 : plan.block_m;
  // An operand in parts that is read in place has one panel, for tiles that are repaired.
  if (plan.a.by_block()) plan.block_a = bytes(panels_a * plan.panel_a * element);
  if (plan.b.by_block()) plan.block_b = bytes(plan.block_n * plan.panel_b * element);
  if (plan.a.source == Source::kSplitBetweenProducts) plan.block_a = bytes(plan.panel_a * element);
  if (plan.b.source == Source::kSplitBetweenProducts) plan.block_b = bytes(plan.panel_b * element);
  if (p.pools && plan.kernel->parts > 1) plan.staged = clamp(plan.block_n, 1, kPooledTiles);
  plan.accumulators =
      bytes((plan.kept() + plan.partials_kept + plan.staged + 1) * mr * nr * element);  // + a tile's residual
  if (plan.slices > 1) plan.partials = bytes(plan.slices * p.groups * p.m * p.n * element);
  if (p.row_sums.data) plan.sums = bytes(plan.slices * p.groups * (p.exchanged ? p.n : p.m) * 8);
  if (p.bias.data && (p.dtype != plan.kernel->dtype || p.bias.stride != 1))
    plan.bias = bytes(p.groups * (p.bias_along_m ? p.m : p.n) * element);
}

// `prepacked`: plan as if the weight's panels existed already.
Plan plan_for(const GemmProblem& p, int max_threads, const KernelSet& kernels, bool prepacked) {
  Plan plan;
  plan.kernel = &choose_kernel(p, kernels);
  plan.isa = kernels.isa;
  plan.prepacked = prepacked && (p.a_is_weight || p.b_is_weight);
  plan.streams = !p.pools && !p.split_k && p.groups * p.m * p.n * dtype_size(p.out_dtype) > kStreamedBytes;
  // Bytes of an accumulator, and of an element of a panel, which holds KR operands.
  const int64_t element = dtype_size(plan.kernel->dtype);
  choose_operands(p, plan, element);
  choose_k(p, plan, element);
  choose_blocks(p, plan, element);
  choose_partition(p, plan, max_threads);
  plan.n = evened(p, plan.n, plan.part_n);
  take_turns(p, plan);
  pack_where_used(p, plan, element);
  fit_blocks_to_shares(p, plan);
  size_workspace(p, plan, element);
  return plan;
}

}  // namespace

Tiling::Tiling(int64_t total, int64_t segment_length, int64_t unit_, int64_t max_units)
    : segment(segment_length), unit(unit_) {
  if (total <= 0 || segment <= 0) return;
  segments = total / segment;
  vectors = ceil_div(segment, unit);
  per_segment = ceil_div(vectors, max_units);
}

int64_t Plan::per_thread() const { return block_a + block_b + accumulators; }
int64_t Plan::total() const { return once_a + once_b + partials + sums + bias + threads * per_thread(); }

Plan make_plan(const GemmProblem& p, int max_threads, const KernelSet& kernels) {
  return plan_for(p, max_threads, kernels, p.packed_weight != nullptr);
}

int64_t packed_weight_bytes(const GemmProblem& p, const KernelSet& kernels) {
  if (!p.b_is_weight && (!p.a_is_weight || plan_for(p, 1, kernels, false).a.in_place())) return 0;
  const Plan plan = plan_for(p, 1, kernels, true);
  const int64_t columns = p.a_is_weight ? p.m : plan.n.padded();
  return p.groups * columns * plan.steps(p.k) * dtype_size(plan.kernel->dtype) +
         (p.a_is_weight ? behind_a(*plan.kernel) : 0);
}

}  // namespace conv1x1
