// GemmProblem -> Plan: kernel, tile, alignment tiers, split-K. Pure functions of the problem and the device; runs on
// the host, without CUDA.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "heuristics.h"
#include "launch.h"

namespace conv1x1::cuda {
namespace {

constexpr int64_t kLimit = int64_t{1} << 31;

// The architectures with code in this library, as TORCH_CUDA_ARCH_LIST names them; empty under emulation: all.
#ifndef CONV1X1_CUDA_ARCHS
#define CONV1X1_CUDA_ARCHS ""
#endif

// The built architecture whose code runs on a device: the same major version and no higher a minor one, else PTX of any
// lower one; code with a suffix (9.0a) on exactly that architecture. 0 where there is none.
int built_for(int arch) {
  const std::string list = CONV1X1_CUDA_ARCHS;
  if (list.empty()) return arch;
  int best = 0;
  for (size_t at = 0; at < list.size();) {
    const size_t end = std::min(list.find_first_of("; ", at), list.size());
    const std::string entry = list.substr(at, end - at);
    at = end + 1;
    const size_t dot = entry.find('.');
    if (dot == std::string::npos) continue;
    const int built = std::atoi(entry.c_str()) * 10 + std::atoi(entry.c_str() + dot + 1);
    const bool ptx = entry.find("+PTX") != std::string::npos;
    const bool exact_only = entry.find_first_of("af", dot) != std::string::npos;
    const bool runs = exact_only ? built == arch : (built / 10 == arch / 10 && built <= arch) || (ptx && built <= arch);
    if (runs) best = std::max(best, built);
  }
  return best;
}

bool is_multiple(int64_t value, int64_t of) { return value % of == 0; }

bool outer_strides_fit(const Axis& axis, int64_t chunk, bool aux, bool unit) {
  const int64_t* stride = aux ? axis.aux_stride : axis.stride;
  for (int d = 0; d < axis.nd - (unit ? 1 : 0); ++d)
    if (axis.size[d] != 1 && !is_multiple(stride[d], chunk)) return false;
  return true;
}

// How many neighbours along `unit` can be moved at once: a power of two, at most `limit`.
int chunk_of(const Matrix& matrix, const Axis& unit, const Axis& other, int64_t groups, int64_t image_stride,
             int element_bytes, int limit) {
  if (!matrix.data) return limit;
  const bool aux = matrix.aux != nullptr;
  if (unit.inner_stride() != 1 || (aux && unit.aux_stride[unit.nd - 1] != 1)) return 1;
  for (int chunk = limit; chunk > 1; chunk /= 2) {
    const int64_t bytes = std::min<int64_t>(16, int64_t{chunk} * element_bytes);
    bool fits = unit.nd == 1 || is_multiple(unit.inner_size(), chunk);
    for (const bool second : {false, true}) {
      if (second && !aux) continue;
      const void* data = second ? matrix.aux : matrix.data;
      const int64_t group_stride = second ? matrix.aux_group_stride : matrix.group_stride;
      fits = fits && is_multiple(reinterpret_cast<intptr_t>(data), bytes) &&
             outer_strides_fit(unit, chunk, second, true) && outer_strides_fit(other, chunk, second, false) &&
             (groups == 1 || is_multiple(group_stride, chunk)) && (second || is_multiple(image_stride, chunk));
    }
    if (fits) return chunk;
  }
  return 1;
}

bool has_unit_stride(const Axis& axis) { return axis.inner_stride() == 1; }

// The instantiation that copies the larger operands in vectors.
int kind_of(const GemmProblem& g) {
  const Masked masked = g.mask == Mask::kNone ? Masked::kNone : g.a.aux ? Masked::kA : Masked::kB;
  const bool row_sums = g.row_sums.data != nullptr;
  int best = -1;
  int64_t best_score = -1;
  for (int i = 0; i < kMmaKindCount; ++i) {
    const MmaKind& kind = kMmaKinds[i];
    if (kind.masked != masked && !(kind.row_sums && masked == Masked::kNone)) continue;
    if (row_sums && !kind.row_sums) continue;
    const bool a = has_unit_stride(kind.a == Major::kK ? g.a.col : g.a.row);
    const bool b = has_unit_stride(kind.b == Major::kK ? g.b.row : g.b.col);
    const int64_t score = (a ? g.m : 0) + (b ? g.n : 0);
    if (score > best_score) {
      best = i;
      best_score = score;
    }
  }
  return best;
}

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

const char* kernel_name(const Plan& plan, DType dtype) {
  if (plan.kernel == Kernel::kSimt) return "simt";
  if (plan.tf32) return "mma_sm80_tf32";
  return dtype == DType::kFloat16 ? "mma_sm80_float16" : "mma_sm80_bfloat16";
}

}  // namespace

Plan make_plan(const GemmProblem& g, const Device& device, bool allow_tf32, int64_t images, int64_t image_stride) {
  Plan plan;
  const int bytes = static_cast<int>(dtype_size(g.dtype)), accumulator = g.dtype == DType::kFloat64 ? 8 : 4;
  const bool half = g.dtype == DType::kFloat16 || g.dtype == DType::kBFloat16;
  plan.tf32 = g.dtype == DType::kFloat32 && allow_tf32 && built_for(device.arch) >= 80;
  plan.kernel = (half && built_for(device.arch) >= 80) || plan.tf32 ? Kernel::kMma : Kernel::kSimt;
  const bool mma = plan.kernel == Kernel::kMma, may_split = !g.pool;
  CostModel cost;
  // Multiply-adds a cycle of a multiprocessor: tensor cores reach about 60% of 1024 (16-bit; half of it for TF32)
  // through mma.sync, CUDA cores 70% of 128; float64 runs at 64 on data-center chips.
  cost.multiply_adds = mma ? (plan.tf32 ? 300 : 600) : g.dtype == DType::kFloat64 ? 40 : 90;
  if (mma) plan.kind = kind_of(g);

  Choice best;
  best.cycles = -1;
  for (int i = 0; i < (mma ? kMmaTileCount : kSimtTileCount); ++i) {
    if (mma && !has_tile(kMmaKinds[plan.kind], i, bytes)) continue;
    if (!mma && g.dtype != DType::kFloat32 && i == 0) continue;  // float64's accumulators do not fit into registers
    const Tile& tile = mma ? kMmaTiles[i] : kSimtTiles[i];
    const int block_k = mma ? 64 / bytes : kSimtBlockK[i];
    Choice choice = best_split(cost, tile, g.m, g.n, g.k, g.groups * images, bytes, accumulator, block_k,
                               device.sm_count, may_split);
    choice.tile = i;
    if (best.cycles < 0 || choice.cycles < best.cycles) best = choice;
  }
  const Tile& tile = mma ? kMmaTiles[best.tile] : kSimtTiles[best.tile];
  plan.tile = best.tile;
  plan.block_m = tile.m;
  plan.block_n = tile.n;
  plan.block_k = mma ? 64 / bytes : kSimtBlockK[best.tile];
  plan.tiles_m = (g.m + tile.m - 1) / tile.m;
  plan.tiles_n = std::max<int64_t>(1, (g.n + tile.n - 1) / tile.n);  // dbias alone has no n
  plan.slices = best.slices;
  plan.slice = best.slice;

  plan.a_k_unit = mma ? kMmaKinds[plan.kind].a == Major::kK : has_unit_stride(g.a.col);
  plan.b_k_unit = mma ? kMmaKinds[plan.kind].b == Major::kK : has_unit_stride(g.b.row);
  const int limit = mma ? 16 / bytes : 4;
  // The images' stride belongs to the operand that has pixels, which is the one that is not the weight.
  plan.a_chunk = chunk_of(g.a, plan.a_k_unit ? g.a.col : g.a.row, plan.a_k_unit ? g.a.row : g.a.col, g.groups,
                          g.a_is_weight ? 0 : image_stride, bytes, limit);
  plan.b_chunk = chunk_of(g.b, plan.b_k_unit ? g.b.row : g.b.col, plan.b_k_unit ? g.b.col : g.b.row, g.groups,
                          g.b_is_weight ? 0 : image_stride, bytes, limit);
  // Stores are whole vectors or single elements; only the latter know every activation.
  const bool vectors = masks_from_output(g.activation) && g.n % (16 / bytes) == 0 &&
                       chunk_of(g.d, g.d.col, g.d.row, g.groups, 0, bytes, 16 / bytes) == 16 / bytes;
  plan.d_chunk = vectors ? 16 / bytes : 1;
  if (plan.slices > 1 && g.n > 0) plan.partials = aligned(plan.slices * g.groups * g.m * g.n * accumulator);
  if (g.row_sums.data) plan.row_sums = aligned(plan.slices * g.groups * g.m * accumulator);
  plan.workspace = plan.partials + plan.row_sums;
  return plan;
}

std::string check_problem(const GemmProblem& g, const Device& device) {
  const int64_t longest = std::max({g.m, g.n, g.k});
  if (longest >= kLimit)
    return "conv1x1: input: expected fewer than 2^31 pixels (batch x spatial size) and channels on a CUDA device, "
           "got " +
           std::to_string(longest);
  if (g.groups * ((g.m + 63) / 64) * ((g.n + 63) / 64) >= kLimit / 64)
    return "conv1x1: input: too large for one CUDA grid: " + std::to_string(g.groups) + " groups of " +
           std::to_string(g.m) + " x " + std::to_string(g.n) + " outputs";
  if (built_for(device.arch) == 0)
    return "conv1x1: input: this GPU has compute capability " + std::to_string(device.arch / 10) + "." +
           std::to_string(device.arch % 10) +
           ", but conv1x1_ext was built for " CONV1X1_CUDA_ARCHS
           "; rebuild it with TORCH_CUDA_ARCH_LIST set to include it";
  return "";
}

std::string describe(const GemmProblem& g, const Device& device, const Plan& plan) {
  const auto operand = [](bool k_unit, int chunk) {
    return std::string(k_unit ? "k" : "m/n") + " contiguous in its tile, " +
           (chunk == 1 ? "copied element by element" : std::to_string(chunk) + " elements a copy");
  };
  std::string text = std::string("kernel=") + kernel_name(plan, g.dtype);
  text += "\nwhy=" + std::string(plan.kernel == Kernel::kMma ? "tensor cores"
                                 : g.dtype == DType::kFloat32 || g.dtype == DType::kFloat64
                                     ? "full precision: CUDA cores"
                                     : "this GPU's code has no mma.sync for 16-bit types");
  text += "\narch=sm_" + std::to_string(device.arch) + ", " + std::to_string(device.sm_count) + " multiprocessors";
  text += "\ngemm=groups " + std::to_string(g.groups) + ", m " + std::to_string(g.m) + ", n " + std::to_string(g.n) +
          ", k " + std::to_string(g.k);
  text += "\ntile=" + std::to_string(plan.block_m) + "x" + std::to_string(plan.block_n) + "x" +
          std::to_string(plan.block_k);
  text += "\ngrid=" + std::to_string(plan.tiles_m) + " x " + std::to_string(plan.tiles_n) + " tiles, " +
          std::to_string(plan.slices) + " slices of k";
  text += "\nA=" + operand(plan.a_k_unit, plan.a_chunk);
  text += "\nB=" + operand(plan.b_k_unit, plan.b_chunk);
  text += "\nD=" + std::to_string(plan.d_chunk) + " elements a store";
  text += "\nworkspace=" + std::to_string(plan.workspace) + " bytes";
  return text;
}

}  // namespace conv1x1::cuda
