// Chooses the microkernel of a problem, the shape of its tiles, and where each operand comes from, with the reason.
#include <algorithm>

#include "plan_facts.h"

namespace conv1x1 {
namespace {

// Channels in and out, and pixels of an image, from which kernels in parts (amx/amx_kernel.h) are faster than
// multiply-adds of the dtype itself. Measured on a Xeon with AMX.
constexpr int64_t kChannelsForParts = 64, kPixelsForParts = 32;
constexpr int64_t kLeastOfTile = 16, kTileOfWeights = 32;  // output channels of a weight that is one tile
// wgrad: the number of columns from which a wide tile is faster, if A's panels are rows (measured with AVX-512).
constexpr int64_t kWideWgrad = 256;

// Can a tile read B in place? k must have one stride, and n unit stride within a segment.
bool b_readable(const GemmProblem& p, const Microkernel& kernel) {
  const Axis& col = p.b.col;
  return p.dtype == kernel.b_in_place && kernel.kr == 1 && !p.b.aux && !p.exchanged && p.b.row.linear() &&
         col.inner_stride() == 1 && p.n_segment > 0 && (col.linear() || col.inner_size() % p.n_segment == 0);
}

// Does B conflict in cache if it is read in place? Rows that are a multiple of 2 KiB apart share a few cache sets and
// have a page each, so packing pays if the panel is read several times. wgrad's pieces of k are prefetched into L2,
// from where a tile can read them in place. But a tile whose rows are only one or two lines of such a distance (AVX2)
// reads more pages than a TLB holds.
bool b_conflicts(const GemmProblem& p, const Microkernel& kernel, int64_t element, int64_t m_tiles) {
  const int64_t pitch = p.b.row.inner_stride() * element;
  if (p.k < 64 || m_tiles < 4) return false;
  if (p.split_k) return pitch >= 64 * kernel.nr * element;
  return pitch % 2048 == 0 || (p.b_is_weight && pitch > 1024);
}

// A tile of A that is read along m is k short lines. If they are a multiple of 1 KiB apart, they share a few cache
// sets, and every tile of n would load them from L3 again.
bool a_conflicts(const GemmProblem& p, int64_t element, int64_t n_tiles) {
  return p.k >= 64 && n_tiles >= 4 && p.a.col.inner_stride() * element % 1024 == 0;
}

// AMX loads rows that have a constant distance, in whole groups of steps.
bool a_suits_tiles(const GemmProblem& p, const Microkernel& kernel) {
  return p.a.row.linear() && p.k % (kernel.kr * kernel.ks) == 0;
}

// The number of images that a tile of average pooling may span, so that tiles are nearly full. All pixels of these
// images belong to one thread.
int64_t pooled_images(int64_t pixels, int64_t batch, int64_t unit) {
  int64_t best = 1;
  double most = 0;
  for (int64_t images = 1; images <= batch && most < 0.97; ++images) {
    if (batch % images != 0) continue;
    const double full = static_cast<double>(images * pixels) / static_cast<double>(round_up(images * pixels, unit));
    if (full > most) best = images, most = full;
  }
  return best;
}

// Chooses the shape of a tile: of the shapes that fit, the one that cuts D into the fewest tiles, because every tile
// costs loads and stores of C besides its multiply-adds. If B is the weight, only n may decide, because the weight is
// packed for one shape whatever the activations are. (A single panel of one or two vectors is the same in every shape.)
void choose_shape(const GemmProblem& p, Plan& plan) {
  const Microkernel& usual = *plan.kernel;
  const bool along_k = plan.a_access == AccessA::kRows;
  const bool wgrad_is_wide = usual.kr == 1 && along_k && p.n >= kWideWgrad;
  if ((p.split_k && !wgrad_is_wide) || plan.n.segments == 0 || (plan.prepacked && p.a_is_weight && !along_k)) return;
  // Do rows of A have a constant distance, in panels or in place?
  const bool pitched = !plan.a.in_place() || !along_k || p.a.row.linear();
  const auto whole_rows = [&](const Microkernel* shape) { return shape && p.m >= shape->mr && pitched; };
  struct Candidate {
    const Microkernel* kernel;
    const char* why;
    bool fits;
    double least_gain;
  };
  const Candidate candidates[] = {
      {&usual, "", true, 1},
      {usual.narrow, ", the narrow shape: one vector of columns", whole_rows(usual.narrow) && plan.n.vectors == 1, 1},
      {usual.tall, ", the tall shape: two vectors of columns",
       whole_rows(usual.tall) && plan.n.vectors == 2 && plan.n.count() == 1 && along_k, 1},
      // Not where panels of A have lines of MR elements: lines of 6 are slow to pack.
      {usual.wide, ", the wide shape: fewer tiles", usual.wide && (p.b_is_weight || along_k), 0.97},
  };
  const Candidate* best = nullptr;
  double least = 0;
  for (const Candidate& c : candidates) {
    if (!c.fits) continue;
    const int64_t vectors = c.kernel->nr / c.kernel->vector;
    const auto tiles = static_cast<double>(Tiling(p.n, plan.n.segment, c.kernel->vector, vectors).per_segment);
    const double cost = tiles / c.kernel->mr / c.least_gain;
    if (!best || cost < least) best = &c, least = cost;
  }
  plan.kernel = best->kernel;
  plan.shape = best->why;
  plan.m = Tiling(p.m, plan.m.segment, plan.kernel->m_unit, plan.kernel->mr / plan.kernel->m_unit);
  plan.n = Tiling(p.n, plan.n.segment, plan.kernel->vector, plan.kernel->nr / plan.kernel->vector);
}

const char* in_parts(const Microkernel& kernel) {
  return kernel.parts == 3 ? "as the sum of 3 bfloat16, exactly" : "as the sum of 2 bfloat16, exactly";
}

// Reads activations in parts in place and splits them between products, where a panel would be read only once.
void choose_split_between_products(const GemmProblem& p, Plan& plan) {
  if (!one_tile_of_weights(p, *plan.kernel)) return;
  const bool three = plan.kernel->parts == 3;
  if (p.b_is_weight) {
    const Axis &row = p.a.row, &k = p.a.col;
    if (plan.n.count() != 1 || !row.linear() || !k.linear() || k.inner_stride() != 1) return;
    if (p.a.aux && k.aux_stride[0] != 1) return;
    plan.a = {Source::kSplitBetweenProducts, three ? "k is contiguous; as the sum of 3 bfloat16, exactly"
                                                   : "k is contiguous; as the sum of 2 bfloat16, exactly"};
    plan.a_access = AccessA::kRows;
  } else if (p.a_is_weight) {
    const Axis &col = p.b.col, &k = p.b.row;
    const bool in_two_runs = col.linear() || col.inner_size() >= plan.kernel->vector;  // a vector's columns
    if (plan.m.count() != 1 || !k.linear() || col.inner_stride() != 1 || !in_two_runs) return;
    if (p.b.aux && col.aux_stride[col.nd - 1] != 1) return;
    plan.b = {Source::kSplitBetweenProducts, three ? "n is contiguous; as the sum of 3 bfloat16, exactly"
                                                   : "n is contiguous; as the sum of 2 bfloat16, exactly"};
  }
}

// The reason why an operand must be packed, if it is a reason that A and B share; else null.
const char* why_packed(const GemmProblem& p, const Microkernel& kernel, const Matrix& matrix, bool sums) {
  if (kernel.parts > 1) return in_parts(kernel);
  if (p.dtype != kernel.operand) return "converted to float32";
  if (matrix.aux) return "masked by the saved output";
  if (sums) return "the bias gradient is summed from the panels";
  return kernel.kr > 1 ? "pairs along k interleaved" : nullptr;
}

OperandPlan packed(bool weight, bool from_caller, const char* why) {
  if (weight && from_caller) return {Source::kFromCaller, "beforehand"};
  return {weight ? Source::kPackedOnce : Source::kPackedByBlock, why};
}

void choose_b(const GemmProblem& p, Plan& plan, int64_t element) {
  const Microkernel& kernel = *plan.kernel;
  // Tiles that stop at the border of an image can read B in place. Tiles that span images keep vectors full.
  int64_t segment = p.n_segment;
  const double full = static_cast<double>(segment) / round_up(std::max<int64_t>(segment, 1), kernel.vector);
  const bool readable = b_readable(p, kernel), conflicts = b_conflicts(p, kernel, element, plan.m.count());
  bool in_place = !(plan.prepacked && p.b_is_weight) && readable && !conflicts;
  if (segment != p.n && (in_place ? full < (p.m >= 256 ? 0.95 : 0.85) && p.m >= 64 : full < 0.95)) {
    segment = p.pools && p.pool_along_n ? segment * pooled_images(segment, p.n / segment, kernel.vector) : p.n;
    in_place = in_place && p.b.col.linear();
  }
  plan.n = Tiling(p.n, segment, kernel.vector, kernel.nr / kernel.vector);
  if (in_place && p.dtype != kernel.operand)
    plan.b = {Source::kConvertedOnLoad, "n is contiguous"};
  else if (in_place)
    plan.b = {Source::kInPlace, "n is contiguous"};
  else if (const char* why = why_packed(p, kernel, p.b, p.exchanged && p.row_sums.data))
    plan.b = packed(p.b_is_weight, plan.prepacked, why);
  else
    plan.b = packed(p.b_is_weight, plan.prepacked,
                    p.b.col.inner_stride() != 1 ? "n is not contiguous"
                    : segment != p.n_segment    ? "tiles span images to keep vectors full"
                    : readable                  ? "its rows fall into few cache sets, or many pages"
                                                : "its strides do not suit the microkernel");
}

void choose_a(const GemmProblem& p, Plan& plan, int64_t element) {
  const Microkernel& kernel = *plan.kernel;
  const bool unit_k = p.a.col.inner_stride() == 1, tiled = kernel.ks > 1;
  const bool rows = unit_k && p.a.col.linear() && p.k % kernel.kr == 0 && (!tiled || a_suits_tiles(p, kernel));
  const bool columns = !tiled && (!p.split_k || p.exchanged) && !unit_k && kernel.kr == 1 && p.a.col.linear() &&
                       p.a.row.linear() && p.a.row.inner_stride() == 1;
  const bool conflicts = a_conflicts(p, element, plan.n.count());
  const bool sums_rows = p.row_sums.data && !p.exchanged;  // taken from packed panels
  const bool as_it_is = p.dtype == kernel.operand && !p.a.aux && !sums_rows;
  const char* why = why_packed(p, kernel, p.a, sums_rows);
  if (!why && !unit_k && p.a.row.inner_stride() == 1 && conflicts) why = "its columns fall into few cache sets";
  if (!why) why = "its strides do not suit the microkernel";
  if (!(plan.prepacked && p.a_is_weight) && as_it_is && (rows || (columns && !conflicts)))
    plan.a = {Source::kInPlace, rows ? "k is contiguous" : "m is contiguous"};
  else
    plan.a = packed(p.a_is_weight, plan.prepacked, why);
  plan.a_access = (tiled ? plan.a.in_place() : unit_k) ? AccessA::kRows : AccessA::kCols;
}

void choose_sources(const GemmProblem& p, Plan& plan, int64_t element) {
  const Microkernel& kernel = *plan.kernel;
  const bool pools_m = p.pools && !p.pool_along_n && p.m > 0;
  const int64_t m_images = pools_m ? pooled_images(p.m_segment, p.m / p.m_segment, kernel.mr) : 1;
  plan.m = Tiling(p.m, pools_m ? m_images * p.m_segment : p.m, kernel.m_unit, kernel.mr / kernel.m_unit);
  choose_b(p, plan, element);
  choose_a(p, plan, element);
  choose_split_between_products(p, plan);
  choose_shape(p, plan);
}

}  // namespace

bool one_tile_of_weights(const GemmProblem& p, const Microkernel& kernel) {
  return kernel.parts > 1 && !p.split_k && (p.a_is_weight ? p.m : p.n) <= kTileOfWeights;
}

const Microkernel& choose_kernel(const GemmProblem& p, const KernelSet& kernels) {
  const Microkernel* parts = p.dtype == DType::kFloat32   ? kernels.float32_parts
                             : p.dtype == DType::kFloat16 ? kernels.float16_parts
                                                          : nullptr;
  if (!parts) return kernels.for_dtype(p.dtype);
  const int64_t out = p.a_is_weight ? p.m : p.n, in = p.split_k ? p.m : p.k;
  const int64_t pixels = p.split_k ? p.k : (p.a_is_weight ? p.n_segment : p.m_segment);
  const bool many = in >= kChannelsForParts && out >= kChannelsForParts && pixels >= kPixelsForParts;
  // float16 must be converted in any case. (wgrad is left out: its layout decides which side is which.)
  const bool many_of_float16 = p.dtype == DType::kFloat16 && !p.split_k && in >= 2 * kChannelsForParts &&
                               out >= kChannelsForParts / 2 && pixels >= 2 * kPixelsForParts;
  // If the weight is a single tile, activations are read in place.
  const bool one_tile = !p.split_k && in >= kChannelsForParts && out >= kLeastOfTile && out <= kTileOfWeights &&
                        pixels >= 2 * kPixelsForParts;
  return many || many_of_float16 || one_tile ? *parts : kernels.for_dtype(p.dtype);
}

void choose_operands(const GemmProblem& p, Plan& plan, int64_t element) {
  choose_sources(p, plan, element);
  // Reads a B of float16 in place, converted in every tile that loads it, instead of packing it.
  const Microkernel* converts = plan.kernel->float16_b;
  if (!converts || p.dtype != converts->b_in_place || p.b_is_weight || p.split_k) return;
  Plan converting = plan;
  converting.kernel = converts;
  choose_sources(p, converting, element);
  if (converting.b.in_place()) plan = converting;
}

}  // namespace conv1x1
