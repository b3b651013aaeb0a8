"""Faults in the CUDA kernels, their plans and launches, as the emulation on the CPU runs them."""

from .mutant import mutant

FOLDER = "csrc/cuda/"
PLAN, LAUNCH, PASSES = (FOLDER + name for name in ("plan.cpp", "launch.cu", "passes.cu"))
MMA, SIMT, LOADER = (FOLDER + name for name in ("gemm_mma_sm80.cuh", "gemm_simt.cuh", "tile_loader.cuh"))
DEVICE, EPILOGUE, MMA_EPILOGUE = (FOLDER + name for name in ("device.cuh", "epilogue.cuh", "mma_epilogue.cuh"))

MUTANTS = [
    # ---- plan.cpp
    mutant(
        "cuda-alignment-of-the-address-ignored", PLAN,
        "fits = fits && is_multiple(reinterpret_cast<intptr_t>(data), bytes) &&", "fits = fits &&",
        "test_cuda_emulated.py::test_alignment_tiers",
    ),
    mutant(
        "cuda-alignment-of-the-mask-ignored", PLAN,
        "for (const bool second : {false, true}) {\n      if (second && !aux) continue;",
        "for (const bool second : {false, true}) {\n      if (second) continue;",
        "test_cuda_emulated.py::test_alignment_of_the_mask",
    ),
    mutant(
        "cuda-stride-between-groups-ignored", PLAN,
        "(groups == 1 || is_multiple(group_stride, chunk)) &&", "",
        "test_cuda_emulated.py -k 'test_fprop or test_dgrad or test_wgrad'",
    ),
    mutant(
        "cuda-partial-sums-of-one-group", PLAN,
        "plan.partials = aligned(plan.slices * g.groups * g.m * g.n * accumulator);",
        "plan.partials = aligned(plan.slices * g.m * g.n * accumulator);",
        "test_cuda_emulated.py::test_any_split",
    ),
    mutant(
        "cuda-activation-in-a-vector-store", PLAN,
        "plan.d_chunk = !masks_from_output(g.activation) ? 1 : stored == vector", "plan.d_chunk = stored == vector",
        "test_cuda_emulated.py::test_epilogue",
        equivalent="what is no range takes the epilogue that is not inlined, which stores single elements in any case",
    ),
    # ---- launch.cu
    mutant(
        "cuda-repacked-operand-masked-again", LAUNCH,
        "    o.data = static_cast<char*>(workspace) + side.repack.at;\n    o.aux = nullptr;\n",
        "    o.data = static_cast<char*>(workspace) + side.repack.at;\n",
        "test_cuda_emulated.py -k 'test_masks or test_dgrad'",
    ),
    mutant(
        "cuda-relu6-without-its-upper-bound", LAUNCH,
        "p.upper = g.activation == Activation::kReLU6 ? 6.0f : INFINITY;", "p.upper = INFINITY;",
        "test_cuda_emulated.py::test_epilogue -k relu6",
    ),
    mutant(
        "cuda-row-sums-replace-what-was-there", LAUNCH,
        "p.slices, g.row_sums_accumulate);", "p.slices, false);",
        "test_cuda_emulated.py::test_accumulated_weight_gradient",
    ),
    # ---- passes.cu
    mutant(
        "cuda-pooled-gradient-of-the-first-image", PASSES,
        "widen(dy[image * dy_image + channel * dy_channel])", "widen(dy[channel * dy_channel])",
        "test_cuda_emulated.py::test_avg_pool_backward",
    ),
    mutant(
        "cuda-masked-copy-by-unaligned-vectors", PASSES,
        "aligned(from.aux) && aligned(to.data);", "true;",
        "test_cuda_emulated.py::test_alignment_of_the_mask",
    ),
    # ---- kernels
    mutant(
        "cuda-mma-second-barrier-missing", MMA,
        "  __syncthreads();  // the stages are read\n", "",
        "test_cuda_emulated.py -k '(any_order_of_threads or test_sample) and not sanitizers'",
    ),
    mutant(
        "cuda-mma-row-sums-of-every-tile", MMA,
        "C::kRowSums && p.row_sums && t.tile_n == 0 && warp_n == 0;", "C::kRowSums && p.row_sums && t.tile_n == 0;",
        "test_cuda_emulated.py::test_wgrad",
        equivalent="the other warps store the same sums to the same places",
    ),
    mutant(
        "cuda-mma-row-sums-of-half-a-quad", MMA,
        "        sum += __shfl_xor_sync(0xffffffffu, sum, 2);\n", "",
        "test_cuda_emulated.py::test_wgrad",
    ),
    mutant(
        "cuda-mma-waits-for-one-stage-less", MMA,
        "ptx::cp_async_wait<C::kStages - 2>();", "ptx::cp_async_wait<C::kStages - 1>();",
        "test_cuda_emulated.py -k '(any_order_of_threads or test_sample) and not sanitizers'",
    ),
    mutant(
        "cuda-loader-past-the-end-of-k", LOADER,
        "const bool valid = kAlongK ? k < k_end : k + i * S::kStep < k_end;", "const bool valid = true;",
        "test_cuda_emulated.py::test_fprop",
    ),
    mutant(
        "cuda-simt-tail-of-a-chunk", SIMT,
        "operand.chunk_log2 == 2 && index + C::kLoads <= count)", "operand.chunk_log2 == 2 && index < count)",
        "test_cuda_emulated.py -k 'test_fprop and float32'",
    ),
    mutant(
        "cuda-simt-barrier-missing", SIMT,
        "    __syncthreads();  // the buffers, or the pass before, are read\n", "",
        "test_cuda_emulated.py -k '(any_order_of_threads or test_sample) and not sanitizers'",
    ),
    mutant(
        "cuda-mask-stops-nans", DEVICE,
        "(!(y <= Acc(0)) && (mask == Mask::kReLU", "(y > Acc(0) && (mask == Mask::kReLU",
        "test_cuda_emulated.py::test_masks_of_any_output",
    ),
    mutant(
        "cuda-division-off-by-one", DEVICE,
        "((uint64_t{1} << (31 + log2)) + d - 1) / d);", "((uint64_t{1} << (31 + log2)) + d - 1) / d - 1);",
        "test_cuda_emulated.py -k '(test_fprop or test_sample) and not sanitizers'",
    ),
    mutant(
        "cuda-bias-of-the-first-group", MMA_EPILOGUE,
        "const int64_t group = static_cast<int64_t>(t.group) * (along_m ? p.m : p.n);",
        "const int64_t group = t.group * int64_t{0};",
        "test_cuda_emulated.py::test_fprop",
    ),
    mutant(
        "cuda-partial-sums-past-the-last-column", MMA_EPILOGUE,
        "if (n + j * 8 + 1 < p.n) to[j * 8 + 1] = y;", "to[j * 8 + 1] = y;",
        "test_cuda_emulated.py::test_any_split",
    ),
    mutant(
        "cuda-pooled-pixels-past-the-end", EPILOGUE,
        "cols = min(p.n - n0, uint32_t{kBlockN});", "cols = uint32_t{kBlockN};",
        "test_cuda_emulated.py::test_avg_pool",
    ),
]  # fmt: skip
