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

// The built architecture whose code runs on a device, or 0. Code runs on devices of the same major version and the same
// or a higher minor version. PTX runs on every later device. Code with a suffix (9.0a) runs on exactly that
// architecture.
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

// How many neighbours along `unit` can be moved at once: a power of two, at most `limit`; with `whole`, one that
// divides their number.
int chunk_of(const Matrix& matrix, const Axis& unit, const Axis& other, int64_t groups, int64_t image_stride,
             int element_bytes, int limit, bool whole) {
  if (!matrix.data) return limit;
  const bool aux = matrix.aux != nullptr;
  if (unit.inner_stride() != 1 || (aux && unit.aux_stride[unit.nd - 1] != 1)) return 1;
  for (int chunk = limit; chunk > 1; chunk /= 2) {
    const int64_t bytes = std::min<int64_t>(16, int64_t{chunk} * element_bytes);
    bool fits = (unit.nd == 1 && !whole) || is_multiple(unit.inner_size(), chunk);
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

// Whether an operand's neighbours in memory are neighbours along k, not along m or n.
bool runs_along_k(const Axis& k, const Axis& mn) {
  return has_unit_stride(k) || (!has_unit_stride(mn) && k.inner_stride() < mn.inner_stride());
}

// The instantiation that copies the larger operands as they run in memory.
int kind_of(const GemmProblem& g, Masked masked) {
  const bool row_sums = g.row_sums.data != nullptr;
  int best = -1;
  int64_t best_score = -1;
  for (int i = 0; i < kMmaKindCount; ++i) {
    const MmaKind& kind = kMmaKinds[i];
    if (kind.masked != masked && !(kind.row_sums && masked == Masked::kNone)) continue;
    if (row_sums && !kind.row_sums) continue;
    const bool a = runs_along_k(g.a.col, g.a.row) == (kind.a == Major::kK);
    const bool b = runs_along_k(g.b.row, g.b.col) == (kind.b == Major::kK);
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

void plan_operand(const Matrix& matrix, const Axis& mn, const Axis& k, int64_t groups, int64_t images,
                  int64_t image_stride, int bytes, int limit, bool mma, bool k_unit, bool must_repack, int& chunk,
                  Repack& repack) {
  const Axis &unit = k_unit ? k : mn, &other = k_unit ? mn : k;
  chunk = chunk_of(matrix, unit, other, groups, image_stride, bytes, limit, mma);
  repack = Repack();
  repack.needed = must_repack || (mma && chunk * bytes < 4);
  if (!repack.needed) return;
  chunk = limit;
  repack.pitch = (unit.count + limit - 1) / limit * limit;
  repack.bytes = aligned(groups * images * other.count * repack.pitch * bytes);
}

// How each operand is copied; for tensor cores the plan's kind decides. The images' stride belongs to the operand with
// the pixels, the one that is not the weight.
void plan_operands(const GemmProblem& g, int64_t images, int64_t image_stride, int bytes, int limit, bool mma,
                   bool repack_a, bool repack_b, Plan& plan) {
  plan.a_k_unit = mma ? kMmaKinds[plan.kind].a == Major::kK : has_unit_stride(g.a.col);
  plan.b_k_unit = mma ? kMmaKinds[plan.kind].b == Major::kK : has_unit_stride(g.b.row);
  plan_operand(g.a, g.a.row, g.a.col, g.groups, g.a_is_weight ? 1 : images, g.a_is_weight ? 0 : image_stride, bytes,
               limit, mma, plan.a_k_unit, repack_a, plan.a_chunk, plan.a_repack);
  plan_operand(g.b, g.b.col, g.b.row, g.groups, g.b_is_weight ? 1 : images, g.b_is_weight ? 0 : image_stride, bytes,
               limit, mma, plan.b_k_unit, repack_b, plan.b_chunk, plan.b_repack);
}

}  // namespace

Plan make_plan(const GemmProblem& g, const Device& device, bool allow_tf32, int64_t images, int64_t image_stride) {
  Plan plan;
  const int bytes = static_cast<int>(dtype_size(g.dtype)), accumulator = g.dtype == DType::kFloat64 ? 8 : 4;
  const bool half = g.dtype == DType::kFloat16 || g.dtype == DType::kBFloat16;
  plan.tf32 = g.dtype == DType::kFloat32 && allow_tf32 && built_for(device.arch) >= 80;
  plan.kernel = (half && built_for(device.arch) >= 80) || plan.tf32 ? Kernel::kMma : Kernel::kSimt;
  const bool mma = plan.kernel == Kernel::kMma, may_split = !g.pools;
  const Tuning& tuned = device.tuning ? *device.tuning : kUntuned;
  const CostModel cost = plan.tf32 ? tuned.tf32 : mma ? tuned.bits16 : simt_cost(g.dtype == DType::kFloat64 ? 40 : 90);
  bool masked_tiles = false;
  if (mma) {
    // Without pixels the saved output has no data, and nothing is masked.
    const Masked masked = g.mask == Mask::kNone ? Masked::kNone
                          : g.a.aux             ? Masked::kA
                          : g.b.aux             ? Masked::kB
                                                : Masked::kNone;
    plan.kind = kind_of(g, masked);
    plan_operands(g, images, image_stride, bytes, 16 / bytes, true, false, false, plan);
    // A repacked operand is masked by its copy, so the kernel needs no tile of the saved output.
    const bool repack_a = masked == Masked::kA && plan.a_repack.needed;
    const bool repack_b = masked == Masked::kB && plan.b_repack.needed;
    if (repack_a || repack_b) {
      plan.kind = kind_of(g, Masked::kNone);
      plan_operands(g, images, image_stride, bytes, 16 / bytes, true, repack_a, repack_b, plan);
    }
    masked_tiles = masked != Masked::kNone && !repack_a && !repack_b;
  } else {
    plan_operands(g, images, image_stride, bytes, 4, false, false, false, plan);
  }

  const auto exists = [&](int tile) {
    const MmaKind& kind = kMmaKinds[plan.kind];
    return tile >= 0 && tile < kMmaTileCount && has_tile(kind, tile, bytes) &&
           mma_shared_bytes(kind, kMmaTiles[tile]) <= device.shared_memory;
  };
  Choice best;
  best.cycles = -1;
  for (int i = 0; i < (mma ? kMmaTileCount : kSimtTileCount); ++i) {
    if (mma && !exists(i)) continue;
    if (mma && i != tuned.tile && exists(tuned.tile)) continue;
    if (!mma && g.dtype != DType::kFloat32 && i == 0) continue;  // float64's accumulators do not fit into registers
    const Tile& tile = mma ? kMmaTiles[i] : kSimtTiles[i];
    const int block_k = mma ? 64 / bytes : kSimtBlockK[i];
    const int threads = mma ? mma_threads(tile) : kSimtThreads;
    const int room = mma ? device.shared_memory / mma_shared_bytes(kMmaKinds[plan.kind], tile) : 2;
    const Choice choice = best_split(cost, i, tile, std::max(1, std::min(512 / threads, room)), masked_tiles, g.m, g.n,
                                     g.k, g.groups * images, accumulator, block_k, device.sm_count, may_split,
                                     mma && exists(tuned.tile) ? tuned.slices : 0);
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

  // Stores of whole vectors, for tensor cores also of half vectors, or of single elements. Only stores of single
  // elements can apply every activation.
  const int vector = 16 / bytes, stored = chunk_of(g.d, g.d.col, g.d.row, g.groups, 0, bytes, vector, true);
  const bool halves = mma && bytes == 2 && stored >= 4 && !g.d.aux;
  plan.d_chunk = !masks_from_output(g.activation) ? 1 : stored == vector ? vector : halves ? 4 : 1;
  // Only the second pass can store sums of half types as float32.
  const bool joins = plan.slices > 1 || g.out_dtype != g.dtype;
  if (joins && g.n > 0) plan.partials = aligned(plan.slices * g.groups * g.m * g.n * accumulator);
  if (g.row_sums.data) plan.row_sums = aligned(plan.slices * g.groups * g.m * accumulator);
  plan.workspace = plan.partials + plan.row_sums;
  for (Repack* repack : {&plan.a_repack, &plan.b_repack}) {
    repack->at = plan.workspace;
    plan.workspace += repack->bytes;
  }
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
  const auto operand = [](bool k_unit, int chunk, const Repack& repack) {
    return std::string(k_unit ? "k" : "m/n") + " contiguous in its tile, " +
           (chunk == 1 ? "copied element by element" : std::to_string(chunk) + " elements a copy") +
           (repack.needed ? ", repacked before (" + std::to_string(repack.bytes) + " bytes)" : "");
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
  text += "\nA=" + operand(plan.a_k_unit, plan.a_chunk, plan.a_repack);
  text += "\nB=" + operand(plan.b_k_unit, plan.b_chunk, plan.b_repack);
  text += "\nD=" + std::to_string(plan.d_chunk) + " elements a store";
  text += "\nworkspace=" + std::to_string(plan.workspace) + " bytes";
  return text;
}

}  // namespace conv1x1::cuda
