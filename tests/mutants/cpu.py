"""Faults of the CPU's plans, its loop nest and its threads."""

from .mutant import mutant

PLAN = "csrc/cpu/plan/plan.cpp"
OPERANDS = "csrc/cpu/plan/operands.cpp"
ROLES = "csrc/cpu/plan/roles.cpp"
PARTITION = "csrc/cpu/plan/partition.cpp"
DRIVER = "csrc/cpu/run/driver.cpp"
WORKER = "csrc/cpu/run/worker.h"
FMA, OUTPUT = "csrc/cpu/run/fma_block.h", "csrc/cpu/run/output.h"
PANELS = "csrc/cpu/run/panels.h"
COLUMNS = "csrc/cpu/run/columns.h"
EXACT = "csrc/cpu/run/exact.h"
POOL = "csrc/cpu/run/avg_pool.cpp"

MUTANTS = [
    # ---- plan.cpp: what is read in place, chains, blocks
    mutant(
        "tiling-drops-the-tail", PLAN,
        "vectors = ceil_div(segment, unit);", "vectors = segment / unit;",
        "test_fprop.py::test_pixel_tails",
    ),
    mutant(
        "masked-b-read-in-place", OPERANDS,
        "kernel.kr == 1 && !p.b.aux && !p.exchanged", "kernel.kr == 1 && !p.exchanged",
        "test_dgrad.py::test_activations -k relu",
    ),
    mutant(
        "masked-a-read-in-place", OPERANDS,
        "p.dtype == kernel.operand && !p.a.aux && !sums_rows;", "p.dtype == kernel.operand && !sums_rows;",
        "test_dgrad.py::test_activations -k relu",
    ),
    mutant(
        "summed-a-read-in-place", OPERANDS,
        "!p.a.aux && !sums_rows;", "!p.a.aux;",
        "test_wgrad.py::test_shapes",
    ),
    mutant(
        "b-of-several-runs-read-in-place", OPERANDS,
        "(col.linear() || col.inner_size() % p.n_segment == 0);", "true;",
        "test_fprop.py::test_layouts",
    ),
    mutant(
        "chains-of-four-thousand", PLAN,
        "kNarrowChain = 32, kChain = 64, kLongChain = 128,", "kNarrowChain = 32, kChain = 64, kLongChain = 4096,",
        "test_fprop.py::test_k_of_several_blocks",
    ),
    mutant(
        "narrow-layers-in-long-chains", PLAN,
        "kNarrowChain = 32, kChain = 64,", "kNarrowChain = 1024, kChain = 64,",
        "test_fprop.py::test_a_large_term_hides_no_more_small_ones_than_a_chain_has",
    ),
    mutant(
        "k-slices-lose-a-remainder", PLAN,
        "plan.slices = std::max<int64_t>(ceil_div(p.k, plan.slice), 1);",
        "plan.slices = std::max<int64_t>(p.k / plan.slice, 1);",
        "test_wgrad.py::test_long_sums_stay_accurate",
    ),
    mutant(
        "workspace-of-one-panel", PLAN,
        "plan.block_b = bytes(plan.block_n * plan.panel_b * element);",
        "plan.block_b = bytes(plan.panel_b * element);",
        "test_fprop.py -k 'test_shapes or test_layouts'",
    ),
    mutant(
        "pooled-images-that-do-not-divide", OPERANDS,
        "    if (batch % images != 0) continue;\n", "",
        "test_avg_pool.py -k 'batch or test_forward or keeps'",
        "test_determinism.py::test_avg_pool_any_thread_count_and_batch",
    ),
    mutant(
        "packed-weight-without-its-padding", PLAN,
        "const int64_t columns = p.a_is_weight ? p.m : plan.n.padded();",
        "const int64_t columns = p.a_is_weight ? p.m : p.n;",
        "test_prepack.py::test_what_is_packed_is_used",
        "test_packed_weight.py",
    ),
    # ---- roles.cpp, partition.cpp
    mutant(
        "roles-never-exchanged", ROLES,
        "p.m < std::max<int64_t>(p.n, 32)", "p.m < std::max<int64_t>(p.n, 1 << 30)",
        "test_wgrad.py::test_which_operand_is_the_vector_one",
    ),
    mutant(
        "roles-exchanged-but-the-bias", ROLES,
        "q.bias_along_m = !p.bias_along_m;", "q.bias_along_m = p.bias_along_m;",
        "test_prepack.py::test_a_few_contiguous_pixels",
    ),
    mutant(
        "roles-exchanged-but-the-bias-gradient", ROLES,
        "  q.exchanged = true;\n", "",
        "test_wgrad.py::test_dz_as_the_vector_operand",
    ),
    mutant(
        "panels-beforehand-know-the-threads", PARTITION,
        "if (p.b_is_weight || p.pools || n.segments != 1", "if (p.pools || n.segments != 1",
        "test_prepack.py::test_many_pixels_on_two_threads",
        "test_packed_weight.py",
    ),
    # ---- driver.cpp
    mutant(
        "no-barrier-after-packing", DRIVER,
        "pack_whole(id, plan.threads);\n      barrier();", "pack_whole(id, plan.threads);",
        "test_determinism.py::test_what_threads_share",
    ),
    mutant(
        "no-barrier-before-slices-are-joined", DRIVER,
        "if (plan.slices > 1 && p.n > 0) {\n      barrier();", "if (plan.slices > 1 && p.n > 0) {",
        "test_determinism.py::test_k_slices_of_the_weight_gradient",
    ),
    mutant(
        "bias-sums-begin-with-what-was-there", DRIVER,
        "if (plan.sums) std::memset(shared.sums, 0, static_cast<size_t>(plan.sums));", "",
        "test_wgrad.py::test_shapes",
    ),
    mutant(
        "bias-gathered-as-if-contiguous", DRIVER,
        "from.stride[0] = p.bias.stride;", "from.stride[0] = 1;",
        "test_fprop.py::test_bias_of_any_stride",
    ),
    # ---- worker.h
    mutant(
        "bias-gradient-summed-by-every-thread", WORKER,
        "bool sums_here = part % plan_.part_n == 0;", "bool sums_here = true;",
        "test_determinism.py::test_any_thread_count",
    ),
    mutant(
        "exchanged-bias-gradient-summed-by-every-thread", WORKER,
        "if (p_.exchanged) sums_here = part % plan_.part_m == 0;", "if (p_.exchanged) sums_here = true;",
        "test_determinism.py::test_what_threads_share",
    ),
    mutant(
        "second-slice-left-out", OUTPUT,
        "for (int64_t s = 1; s < plan_.slices; ++s) {", "for (int64_t s = 2; s < plan_.slices; ++s) {",
        "test_determinism.py::test_k_slices_of_the_weight_gradient",
        "test_wgrad.py::test_long_sums_stay_accurate",
    ),
    mutant(
        "slices-joined-without-what-was-there", OUTPUT,
        "for (int64_t c = 0; c < width; ++c) sum[j + c] += residual_[c];", "",
        "test_avg_pool.py::test_backward_in_pieces",
    ),
    mutant(
        "bias-gradient-replaces-what-was-there", OUTPUT,
        "        value += before;\n", "",
        "test_avg_pool.py::test_backward_in_pieces",
    ),
    mutant(
        "rows-in-place-one-element-apart", FMA,
        "r < end; ++r, row += run.stride * size) rows[r] = row;", "r < end; ++r, row += size) rows[r] = row;",
        "test_fprop.py::test_shapes",
    ),
    mutant(
        "strip-across-rows-of-d", FMA,
        "if (count == 1 || run_at(p_.d.row, t.start, t.size * count).length < t.size * count) return 1;",
        "if (count == 1) return 1;",
        "test_dgrad.py -k 'test_shapes or not_read'",
        "test_avg_pool.py::test_forward",
    ),
    mutant(
        "strip-one-row-further", FMA,
        "args.a_step = t.size * p_.a.row.stride[0] * dtype_size(p_.dtype);",
        "args.a_step = (t.size + 1) * p_.a.row.stride[0] * dtype_size(p_.dtype);",
        "test_fprop.py::test_shapes",
    ),
    mutant(
        "pieces-of-k-begin-anew", FMA,
        "args.c_in = block.first ? nullptr : sum;", "args.c_in = nullptr;",
        "test_wgrad.py::test_long_sums_stay_accurate",
    ),
    mutant(
        "bias-of-the-first-group", OUTPUT,
        "e.bias_m = bias + task_.group * p_.m + ti.start;", "e.bias_m = bias + ti.start;",
        "test_fprop.py::test_shapes",
    ),
    mutant(
        "bias-of-the-first-columns", OUTPUT,
        "e.bias_n = bias + task_.group * p_.n + tj.start;", "e.bias_n = bias + task_.group * p_.n;",
        "test_fprop.py::test_shapes",
    ),
    mutant(
        "streamed-where-lines-are-not-whole", OUTPUT,
        "e.stream = streams_ && whole_lines && !c.split;", "e.stream = streams_ && !c.split;",
        "test_fprop.py::test_results_stored_past_the_caches -k '131 and channels_last'",
    ),
    mutant(
        "residual-read-where-d-lies", OUTPUT,
        "task_.group * d.aux_group_stride + row.aux_offset + c.aux);",
        "task_.group * d.aux_group_stride + row.offset + c.out);",
        "test_fprop.py::test_epilogue",
    ),
    mutant(
        "pooled-tile-belongs-to-its-first-image", OUTPUT,
        "const int64_t image = (at.start + i) / pixels,", "const int64_t image = at.start / pixels,",
        "test_avg_pool.py::test_forward",
    ),
    mutant(
        "pool-mask-of-unrounded-sixes", OUTPUT,
        "p_.dtype == DType::kFloat16 ? 6 - 0x1p-9 :", "p_.dtype == DType::kFloat16 ? 6 :",
        "test_avg_pool.py -k 'keeps or holds'",
    ),
    # ---- panels.h, columns.h
    mutant(
        "panels-of-a-of-the-first-group", PANELS,
        "(group * p_.m + plan_.m[i].start) * plan_.steps(p_.k);", "plan_.m[i].start * plan_.steps(p_.k);",
        "test_determinism.py::test_what_threads_share",
    ),
    mutant(
        "row-sums-of-the-first-group", WORKER,
        "double* sums = task_.shared.sums + (task_.slice * p_.groups + task_.group) * p_.m;",
        "double* sums = task_.shared.sums + task_.slice * p_.groups * p_.m;",
        "test_wgrad.py::test_shapes",
    ),
    mutant(
        "column-sums-of-the-first-columns", WORKER,
        "sums[t.start + c] += here[c];", "sums[c] += here[c];",
        "test_wgrad.py::test_dz_as_the_vector_operand",
    ),
    mutant(
        "packed-rows-not-flushed", PANELS,
        "        if (count == kMost) flush();\n", "        if (count == kMost) count = 0;\n",
        "test_fprop.py::test_more_runs_than_are_packed_at_a_time",
    ),
    mutant(
        "packed-rows-under-any-mask", PANELS,
        "if (across.inner_stride() != 1 || (matrix.aux && across.aux_stride[across.nd - 1] != 1)) return false;",
        "if (across.inner_stride() != 1) return false;",
        "test_wgrad.py::test_grad_output_of_any_layout",
        "test_dgrad.py::test_grad_output_of_any_layout",
    ),
    mutant(
        "stored-in-place-whatever-the-stride", COLUMNS,
        "(stored && one_run && run.stride == 1);", "(stored && one_run);",
        "test_dgrad.py::test_shapes",
    ),
    mutant(
        "residual-in-place-whatever-its-stride", COLUMNS,
        "stored && one_run && run.aux_stride == 1;", "stored && one_run;",
        "test_fprop.py::test_epilogue",
    ),
    mutant(
        "second-run-of-a-split-vector", COLUMNS,
        "s.then = rest.offset - c.out - run.length;", "s.then = rest.offset - c.out;",
        "test_fprop.py -k 'test_shapes or test_layouts'",
        isa="avx512",
    ),
    # ---- exact.h: operands in parts
    mutant(
        "nan-only-where-both-operands-have-one", EXACT,
        "((rows.nan >> i | columns.nan >> j) & 1)", "((rows.nan >> i & columns.nan >> j) & 1)",
        "test_parts.py::test_special_values_reach_the_outputs_that_read_them_and_no_others -k 'nan and 96'",
        equivalent="the sum is computed again in float32, which gives NaN as well: slower",
        isa="avx512_amx",
    ),
    mutant(
        "nan-of-an-operand-becomes-infinity", EXACT,
        "sums[i * ld + j] = std::numeric_limits<float>::quiet_NaN();",
        "sums[i * ld + j] = std::numeric_limits<float>::infinity();",
        "test_parts.py::test_special_values_reach_the_outputs_that_read_them_and_no_others",
        isa="avx512_amx",
    ),
    mutant(
        "small-sums-left-as-they-are", EXACT,
        "(magnitude < kDoubtfulBelow && ((rows.small >> i | columns.small >> j) & 1) != 0)", "false",
        "test_parts.py::test_numbers_at_the_ends_of_the_range",
        isa="avx512_amx",
    ),
    mutant(
        "repair-by-the-first-chunk-of-k", EXACT,
        "for (int64_t j = 0; j < tj.size; ++j) exact[i][j] += chain[j];",
        "for (int64_t j = 0; j < tj.size; ++j) exact[i][j] = chain[j];",
        "test_parts.py::test_small_numbers_beside_ordinary_ones",
        isa="avx512_amx",
    ),
    # ---- avg_pool.cpp
    mutant(
        "hardswish-gradient-to-six", POOL,
        "return z < T(3) ? z / T(3) + T(0.5) : T(1);", "return z < T(6) ? z / T(3) + T(0.5) : T(1);",
        "test_avg_pool.py::test_gradcheck -k hardswish",
        "test_avg_pool.py::test_gradients -k hardswish",
    ),
    mutant(
        "gelu-gradient-without-its-density", POOL,
        "return cdf + z * T(0.39894228040143267794) * std::exp(T(-0.5) * z * z);", "return cdf;",
        "test_avg_pool.py::test_gradcheck -k gelu",
    ),
    mutant(
        "hardswish-holds-back-from-zero", POOL,
        "activation == Activation::kHardswish ? T(-3) : T(0)", "T(0)",
        "test_avg_pool.py::test_gradients -k hardswish",
    ),
    mutant(
        "piece-of-the-wrong-dimension", POOL,
        "offset += piece.begin[d] * t.stride[d + 1];", "offset += piece.begin[d] * t.stride[d];",
        "test_avg_pool.py::test_backward_in_pieces",
    ),
    mutant(
        "bits-of-the-first-piece", POOL,
        "(c / of_group * p.batch * p.pixels() + first + r)", "(c / of_group * p.batch * p.pixels() + r)",
        "test_avg_pool.py -k 'pieces or keeps'",
    ),
    mutant(
        "masked-copy-drops-the-last-rows", POOL,
        "blocks = (rows + kRows - 1) / kRows;", "blocks = rows / kRows;",
        "test_wgrad.py::test_residual -k relu",
    ),
    # ---- dispatch.cpp
    mutant(
        "empty-isa-is-a-name", "csrc/cpu/kernels/dispatch.cpp",
        r"""if (wanted == nullptr || *wanted == '\0') {""", "if (wanted == nullptr) {",
        "test_isa.py::test_default_is_the_best_one",
    ),
]  # fmt: skip
