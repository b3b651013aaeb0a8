// The tables of kernel instantiations, and the cost model that chooses a tile and a split of k. All are constexpr
// tables and pure functions: plan.cpp chooses by them, and gemm_mma_table.cuh instantiates them.
#pragma once

#include <cstdint>

namespace conv1x1::cuda {

// Along which index an operand's tile is contiguous in shared memory.
enum class Major : int { kK, kMN };
// The operand that the saved output masks.
enum class Masked : int { kNone, kA, kB };

struct Tile {
  int m, n, warp_m, warp_n;  // of a block, and of each of its warps
};

constexpr Tile kMmaTiles[] = {{128, 128, 64, 32}, {128, 64, 64, 32}, {64, 128, 64, 32}, {64, 64, 32, 32}};
constexpr int mma_threads(const Tile& tile) { return 32 * (tile.m / tile.warp_m) * (tile.n / tile.warp_n); }
constexpr int kMmaTileCount = 4;
constexpr unsigned k128x128 = 1, k128x64 = 2, k64x128 = 4, k64x64 = 8;

// The natural layouts of every pass have a kernel. Another combination takes the kernel that fits the larger operand;
// the other operand is copied in pieces of 4 bytes or repacked. Tall and wide tiles are for passes with pixels on one
// side and few channels on the other.
struct MmaKind {
  Major a, b;
  Masked masked;
  bool row_sums;  // wgrad: sums A's rows for dbias; its mask may be absent
  unsigned tiles;
};

constexpr MmaKind kMmaKinds[] = {
    // fprop channels last
    {Major::kK, Major::kK, Masked::kNone, false, k128x128 | k128x64 | k64x64},
    // fprop NCHW; dgrad channels last, no mask
    {Major::kK, Major::kMN, Masked::kNone, false, k128x128 | k128x64 | k64x128 | k64x64},
    // dgrad NCHW, wgrad channels last, no mask
    {Major::kMN, Major::kMN, Masked::kNone, false, k128x128 | k64x128 | k64x64},
    // dgrad channels last
    {Major::kK, Major::kMN, Masked::kA, false, k128x128 | k128x64 | k64x64},
    // dgrad NCHW
    {Major::kMN, Major::kMN, Masked::kB, false, k128x128 | k64x128 | k64x64},
    // wgrad NCHW
    {Major::kK, Major::kK, Masked::kA, true, k128x64 | k64x64},
    // wgrad channels last
    {Major::kMN, Major::kMN, Masked::kA, true, k128x128 | k128x64 | k64x64},
};
constexpr int kMmaKindCount = 7;

constexpr int kBlockKBytes = 64;  // of k in a stage

// With a mask a stage has three tiles. Fewer stages then leave room for two blocks on a multiprocessor.
constexpr int mma_stages(const MmaKind& kind) { return kind.masked == Masked::kNone ? 4 : 3; }

constexpr int mma_stage_bytes(const MmaKind& kind, const Tile& tile) {
  const int aux = kind.masked == Masked::kA ? tile.m : kind.masked == Masked::kB ? tile.n : 0;
  return (tile.m + tile.n + aux) * kBlockKBytes;
}

constexpr int kPad = 8;  // elements between rows of a tile in the epilogue's shared memory

constexpr int mma_shared_bytes(const MmaKind& kind, const Tile& tile) {
  const int mainloop = mma_stages(kind) * mma_stage_bytes(kind, tile), rows = tile.m * (tile.n + kPad) * 4;
  return mainloop > rows ? mainloop : rows;
}

// wgrad in TF32 has no registers left for the largest tile.
constexpr bool has_tile(const MmaKind& kind, int tile, int element_bytes) {
  return (kind.tiles >> tile & 1) != 0 && !(kind.row_sums && element_bytes == 4 && tile == 0);
}

constexpr Tile kSimtTiles[] = {{128, 128, 0, 0}, {64, 64, 0, 0}};
constexpr int kSimtTileCount = 2;
constexpr int kSimtBlockK[] = {8, 16};
constexpr int kSimtThreads = 256;
constexpr int kSimtRows = 64;  // of a tile that the epilogue takes at a time, to fit into any GPU's 48 KiB

// Cycles of one multiprocessor, roughly: only the comparison of tiles and splits matters. A stage of k takes a block
// `alone` cycles where latencies decide, and `full` cycles where several blocks keep the units busy.
struct TileCost {
  double alone, full;
};

struct CostModel {
  TileCost tiles[kMmaTileCount];
  double fixed_alone, fixed_full;    // a block's first loads and its epilogue, for a tile of 128 x 128
  double masked_alone, masked_full;  // factors of a stage with a mask
  double reduction, reduced_bytes;   // one more launch, and bytes a cycle that it reads and writes
};

// The tensor-core kernels. Fitted on an H100 to the times of every tile and split, for the layers of resnet50 and seed
// in bench/shapes at batch 1 and 32, all passes and both layouts. The choices of the fitted models are 1.5 % and 1 %
// slower than the best ones in the mean.
constexpr CostModel kCost16Bits = {{{1020, 510}, {1130, 260}, {1190, 350}, {760, 250}}, 5300, 3900, 1.4, 1.8, 3200, 30};
constexpr CostModel kCostTf32 = {{{1160, 790}, {930, 400}, {1020, 560}, {830, 370}}, 7800, 3300, 1.5, 1.5, 3200, 12};

// The kernels for CUDA cores. They reach 70 % of 128 multiply-adds a cycle in float32, and 40 multiply-adds in float64.
constexpr CostModel simt_cost(double multiply_adds) {
  const double large = kSimtBlockK[0] * 128 * 128 / multiply_adds, small = kSimtBlockK[1] * 64 * 64 / multiply_adds;
  return {{{1.3 * large, large}, {1.6 * small, 1.4 * small}}, 4000, 2000, 1, 1, 4000, 12};
}

// Overrides of a plan's choices, for bench/cuda_tiles.py and the emulation's tests.
struct Tuning {
  int tile = -1;       // of the tensor cores' tiles, wherever it exists; -1: any
  int64_t slices = 0;  // of k with that tile; 0: as the model says
  CostModel bits16 = kCost16Bits, tf32 = kCostTf32;
  int64_t pooled_piece = int64_t{1} << 24;  // elements that average pooling's backward recomputes at a time
};
constexpr Tuning kUntuned{};

struct Choice {
  int tile = 0;
  int64_t slices = 1, slice = 0;
  double cycles = 0;
};

// The cheapest split of k for one tile shape, where `together` blocks share a multiprocessor. Slices are multiples of
// block_k * 4, so that partial sums never cost more than the split gains. `only_slices` > 0: that many slices, or fewer
// where some would be empty.
inline Choice best_split(const CostModel& cost, int index, const Tile& tile, int together, bool masked, int64_t m,
                         int64_t n, int64_t k, int64_t batch, int accumulator_bytes, int block_k, int sm_count,
                         bool may_split, int64_t only_slices) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles_n = n > 0 ? ceil_div(n, tile.n) : 1, tiles = ceil_div(m, tile.m) * tiles_n * batch;
  const int64_t unit = 4 * block_k, units = ceil_div(k, unit);
  const double area = 0.25 + 0.75 * tile.m * tile.n / (128.0 * 128.0);
  const double alone = cost.tiles[index].alone * (masked ? cost.masked_alone : 1);
  const double full = cost.tiles[index].full * (masked ? cost.masked_full : 1);
  Choice best;
  best.cycles = -1;
  const int64_t most = units > 1 ? units : 1, only = !may_split ? 0 : only_slices < most ? only_slices : most;
  for (int64_t wanted = only > 0 ? only : 1; wanted <= most; wanted += wanted < 8 ? 1 : wanted / 4) {
    const int64_t per_slice = units > 0 ? ceil_div(units, wanted) : 1;
    const int64_t slices = units > 0 ? ceil_div(units, per_slice) : 1, slice = slices == 1 ? k : per_slice * unit;
    const double stages = static_cast<double>(ceil_div(slice, block_k));
    const int64_t blocks = ceil_div(tiles * slices, sm_count), rounds = ceil_div(blocks, together);
    const double latency = static_cast<double>(rounds) * (cost.fixed_alone * area + stages * alone);
    const double throughput = static_cast<double>(blocks) * (cost.fixed_full * area + stages * full);
    double cycles = latency > throughput ? latency : throughput;
    if (slices > 1)
      cycles += cost.reduction +
                static_cast<double>((slices + 1) * batch * m * n) * accumulator_bytes / (cost.reduced_bytes * sm_count);
    if (best.cycles < 0 || cycles < best.cycles) best = {index, slices, slice, cycles};
    if (!may_split || rounds > 4 || only > 0) break;
  }
  return best;
}

}  // namespace conv1x1::cuda
