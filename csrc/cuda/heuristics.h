// Which tile for which problem: the tables of kernel instantiations and the cost model that chooses among them.
// Constexpr tables and pure functions; read by plan.cpp (to choose) and by gemm_mma_table.cuh (to instantiate).
#pragma once

#include <cstdint>

namespace conv1x1::cuda {

// Along which index an operand's tile is contiguous in shared memory.
enum class Major : int { kK, kMN };
// The operand that the saved output masks.
enum class Masked : int { kNone, kA, kB };

struct Tile {
  int m, n, warp_m, warp_n;  // of a block, and of each of its warps
  // Measured throughput of such tiles relative to the largest: small ones read more of shared memory per operation.
  double efficiency;
};

constexpr Tile kMmaTiles[] = {{128, 128, 64, 32, 0.85}, {128, 64, 64, 32, 0.75}, {64, 128, 64, 32, 0.75},
                              {64, 64, 32, 32, 0.6},    {256, 128, 64, 64, 1.0}, {128, 256, 64, 64, 1.0}};
constexpr int kMmaTileCount = 6;
constexpr unsigned k128x128 = 1, k128x64 = 2, k64x128 = 4, k64x64 = 8, k256x128 = 16, k128x256 = 32;

// Every pass's natural layouts have a kernel; other combinations take the one that fits the larger operand and gather
// the other element by element. A tall or wide tile is there where one side is all pixels and the other few channels.
struct MmaKind {
  Major a, b;
  Masked masked;
  bool row_sums;  // wgrad: sums A's rows for dbias; its mask may be absent
  unsigned tiles;
};

constexpr MmaKind kMmaKinds[] = {
    // fprop channels last
    {Major::kK, Major::kK, Masked::kNone, false, k256x128 | k128x128 | k128x64 | k64x64},
    // fprop NCHW; dgrad channels last, no mask
    {Major::kK, Major::kMN, Masked::kNone, false, k256x128 | k128x256 | k128x128 | k128x64 | k64x128 | k64x64},
    // dgrad NCHW, wgrad channels last, no mask
    {Major::kMN, Major::kMN, Masked::kNone, false, k256x128 | k128x256 | k128x128 | k64x128 | k64x64},
    // dgrad channels last
    {Major::kK, Major::kMN, Masked::kA, false, k256x128 | k128x128 | k128x64 | k64x64},
    // dgrad NCHW
    {Major::kMN, Major::kMN, Masked::kB, false, k128x256 | k128x128 | k64x128 | k64x64},
    // wgrad NCHW
    {Major::kK, Major::kK, Masked::kA, true, k128x128 | k128x64 | k64x64},
    // wgrad channels last
    {Major::kMN, Major::kMN, Masked::kA, true, k128x128 | k128x64 | k64x64},
};
constexpr int kMmaKindCount = 7;

constexpr int kBlockKBytes = 64;  // of k in a stage

// Three tiles a stage where there is a mask: fewer stages keep two blocks on a multiprocessor.
constexpr int mma_stages(const MmaKind& kind) { return kind.masked == Masked::kNone ? 4 : 3; }

constexpr int mma_stage_bytes(const MmaKind& kind, const Tile& tile) {
  const int aux = kind.masked == Masked::kA ? tile.m : kind.masked == Masked::kB ? tile.n : 0;
  return (tile.m + tile.n + aux) * kBlockKBytes;
}

// Rows of float32 sums that the epilogue lays into shared memory at a time, padded.
constexpr int kPad = 8;
constexpr int mma_rows(const Tile& tile) { return tile.m * tile.n > 128 * 128 ? tile.m / 2 : tile.m; }

constexpr int mma_shared_bytes(const MmaKind& kind, const Tile& tile) {
  const int mainloop = mma_stages(kind) * mma_stage_bytes(kind, tile), rows = mma_rows(tile) * (tile.n + kPad) * 4;
  return mainloop > rows ? mainloop : rows;
}

// wgrad in TF32 has no registers left for the largest tile.
constexpr bool has_tile(const MmaKind& kind, int tile, int element_bytes) {
  return (kind.tiles >> tile & 1) != 0 && !(kind.row_sums && element_bytes == 4 && tile == 0);
}

constexpr Tile kSimtTiles[] = {{128, 128, 0, 0, 1.0}, {64, 64, 0, 0, 0.7}};
constexpr int kSimtTileCount = 2;
constexpr int kSimtBlockK[] = {8, 16};
constexpr int kSimtRows = 64;  // of a tile that the epilogue takes at a time, to fit into any GPU's 48 KiB

// Cycles that one multiprocessor takes for a tile's k steps, roughly: what counts is how tiles compare.
struct CostModel {
  double multiply_adds;      // per cycle, reached in a large tile
  double load_bytes = 40;    // per cycle, mostly from L2
  double memory_bytes = 12;  // per cycle, the multiprocessor's share of device memory
  double fixed = 1500;       // first loads and epilogue
  double reduction = 4000;   // one more launch
};

struct Choice {
  int tile = 0;
  int64_t slices = 1, slice = 0;
  double cycles = 0;
};

// The cheapest split of k for one tile shape. Slices are whole multiples of block_k * 4, so that split-K never pays
// more for its partial sums than it gains.
inline Choice best_split(const CostModel& cost, const Tile& tile, int64_t m, int64_t n, int64_t k, int64_t batch,
                         int element_bytes, int accumulator_bytes, int block_k, int sm_count, bool may_split) {
  const int64_t tiles =
      ((m + tile.m - 1) / tile.m) * ((n + tile.n - 1) / tile.n > 0 ? (n + tile.n - 1) / tile.n : 1) * batch;
  const int64_t unit = 4 * block_k, units = (k + unit - 1) / unit;
  Choice best;
  best.cycles = -1;
  for (int64_t wanted = 1; wanted <= units || wanted == 1; wanted += wanted < 8 ? 1 : wanted / 4) {
    const int64_t per_slice = units > 0 ? (units + wanted - 1) / wanted : 1;
    const int64_t slices = units > 0 ? (units + per_slice - 1) / per_slice : 1;
    const double depth = static_cast<double>(slices == 1 ? k : per_slice * unit);
    const double compute = depth * tile.m * tile.n / (cost.multiply_adds * tile.efficiency);
    const double load = depth * (tile.m + tile.n) * element_bytes / cost.load_bytes;
    const int64_t waves = (tiles * slices + sm_count - 1) / sm_count;
    double cycles = static_cast<double>(waves) * ((compute > load ? compute : load) + cost.fixed);
    if (slices > 1)
      cycles += cost.reduction +
                2.0 * static_cast<double>(slices * batch * m * n) * accumulator_bytes / (cost.memory_bytes * sm_count);
    if (best.cycles < 0 || cycles < best.cycles) best = {0, slices, slices == 1 ? k : per_slice * unit, cycles};
    if (!may_split || waves > 4) break;
  }
  return best;
}

}  // namespace conv1x1::cuda
