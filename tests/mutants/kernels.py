"""Faults in what every kernel shares: packing, conversions, activations, sums. Each in one instruction set's copy."""

from .mutant import mutant

PACKING = "csrc/cpu/kernels/common/packing.h"
CONVERT = "csrc/cpu/kernels/common/convert.h"
ACTIVATIONS = "csrc/cpu/kernels/common/activations.h"
SUMS = "csrc/cpu/kernels/common/sums.h"
AVX2 = {"unit": "cpu/kernels/fma/avx2.cpp", "isa": "avx2"}
SCALAR = {"unit": "cpu/kernels/fma/portable.cpp", "isa": "scalar"}

MUTANTS = [
    # ---- packing.h
    mutant(
        "transpose-drops-the-last-row", PACKING,
        "for (; r < nr; ++r) {\n      const char* s", "for (; r + 1 < nr; ++r) {\n      const char* s",
        "test_fprop.py::test_channel_tails -k channels_last",
        **AVX2,
    ),
    mutant(
        "transpose-drops-the-tail-of-k", PACKING,
        "for (; k < end; ++k)\n        for (int i = 0; i < 4; ++i)",
        "for (; k + 1 < end; ++k)\n        for (int i = 0; i < 4; ++i)",
        "test_fprop.py::test_channel_tails -k channels_last",
        **AVX2,
    ),
    mutant(
        "transpose-exchanges-rows", PACKING,
        "x[1] = __builtin_shufflevector(lo0, lo1, 2, 3, 6, 7);",
        "x[1] = __builtin_shufflevector(lo0, lo1, 2, 3, 7, 6);",
        "test_fprop.py::test_shapes -k channels_last",
        **AVX2,
    ),
    mutant(
        "every-second-of-four-from-the-first-load", PACKING,
        "__builtin_shufflevector(low, high, 0, 2, 5, 7);", "__builtin_shufflevector(low, high, 0, 2, 4, 6);",
        "test_fprop.py -k 'test_shapes or test_layouts'",
        "test_wgrad.py::test_shapes",
        **AVX2,
    ),
    mutant(
        "every-second-of-eight-from-the-first-load", PACKING,
        "__builtin_shufflevector(low, high, 0, 2, 4, 6, 9, 11, 13, 15);",
        "__builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);",
        "test_fprop.py -k 'test_shapes or test_layouts'",
        "test_wgrad.py::test_shapes",
        **AVX2,
    ),
    mutant(
        "mask-of-the-first-piece", PACKING,
        "mask_line<M>(passed, s + j, x + j, piece);", "mask_line<M>(passed, s + j, x, piece);",
        "test_wgrad.py::test_lines_of_half_types_longer_than_are_masked_at_a_time",
        **AVX2,
    ),
    mutant(
        "mask-of-another-stride", PACKING,
        "} else if ((q.ks == 1 || q.ks == 2) && (!mask || q.aks == q.ks)) {",
        "} else if (q.ks == 1 || q.ks == 2) {",
        "test_dgrad.py::test_grad_output_of_any_layout",
        "test_wgrad.py::test_grad_output_of_any_layout",
        **AVX2,
    ),
    mutant(
        "rows-apart-converted-as-one-line", PACKING,
        "q.ks == 1 && q.rs == q.nk && ld == q.nk)", "q.ks == 1 && ld == q.nk)",
        "test_fprop.py -k 'test_layouts or test_shapes'",
        "test_wgrad.py::test_residual",
        **AVX2,
    ),
    mutant(
        "strided-outputs-stored-side-by-side", PACKING,
        "store_as(to + j * run_c.stride, from[j]);", "store_as(to + j, from[j]);",
        "test_dgrad.py::test_shapes",
        **AVX2,
    ),
    mutant(
        "packed-rows-of-the-first-segment", PACKING,
        "copy_line<T, M>(d, s + g->offset, x + g->aux_offset, g->length);",
        "copy_line<T, M>(d, s + g->offset, x + segments->aux_offset, g->length);",
        "test_wgrad.py -k 'test_shapes or any_layout'",
        **AVX2,
    ),
    mutant(
        "pooling-drops-the-last-channel", PACKING,
        "for (; c < channels; ++c)\n    for (int64_t i = 0; i < pixels; ++i) sums[c]",
        "for (; c + 1 < channels; ++c)\n    for (int64_t i = 0; i < pixels; ++i) sums[c]",
        "test_avg_pool.py::test_forward",
        **AVX2,
    ),
    mutant(
        "bits-of-a-shared-byte-replaced", PACKING,
        "(b == 0 && shift != 0) || (b + 1 == bytes && end % 8 != 0)", "b == 0 && shift != 0",
        "test_avg_pool.py -k keeps",
        **AVX2,
    ),
    mutant(
        "bits-of-nan-not-kept", PACKING,
        "const auto passes = ~(y <= least) & ~(y >= most);", "const auto passes = (y > least) & ~(y >= most);",
        "test_avg_pool.py::test_a_nan_preactivation_passes_the_gradient",
        **AVX2,
    ),
    mutant(
        "bits-taken-from-one-byte", PACKING,
        "(byte[0] | byte[1] << 8) >>", "byte[0] >>",
        "test_avg_pool.py -k keeps",
        **AVX2,
    ),
    # ---- convert.h
    mutant(
        "lines-cut-to-whole-pieces", CONVERT,
        "if (n > PIECE) return f(n - PIECE, lanes);", "if (n > PIECE) return;",
        "test_wgrad.py::test_channel_tails",
        **AVX2,
    ),
    mutant(
        "mask-passes-zeros", CONVERT,
        "x = y <= zero ? zero : x;", "x = y < zero ? zero : x;",
        "test_edges.py::test_special_values_in_the_gradient_mask -k relu",
        **AVX2,
    ),
    mutant(
        "mask-passes-sixes", CONVERT,
        "x = y >= zero + S(6) ? zero : x;", "x = y > zero + S(6) ? zero : x;",
        "test_edges.py::test_special_values_in_the_gradient_mask -k relu6",
        **AVX2,
    ),
    mutant(
        "mask-stops-negative-nans", CONVERT,
        "(y <= zero + uint16_t(0x8000 | infinity))", "(y <= zero + uint16_t(0xffff))",
        "test_edges.py::test_special_values_in_the_gradient_mask",
        "test_dgrad.py",
        **AVX2,
    ),
    mutant(
        "mask-of-half-types-passes-sixes", CONVERT,
        "constexpr uint16_t six = bfloat ? 0x40c0 : 0x4600,", "constexpr uint16_t six = bfloat ? 0x40c1 : 0x4601,",
        "test_edges.py::test_special_values_in_the_gradient_mask",
        **AVX2,
    ),
    mutant(
        "bfloat16-rounded-by-cutting", CONVERT,
        "rounded = u + 0x7fffu + ((u >> 16) & 1u);", "rounded = u;",
        "test_edges.py::test_halves_are_rounded_to_nearest_even",
        **SCALAR,
    ),
    mutant(
        "bfloat16-ties-away-from-even", CONVERT,
        "rounded = u + 0x7fffu + ((u >> 16) & 1u);", "rounded = u + 0x8000u;",
        "test_edges.py::test_halves_are_rounded_to_nearest_even",
        **SCALAR,
    ),
    mutant(
        "float16-infinity-read-as-a-number", CONVERT,
        "(magnitude >= 0x0f800000u ? special : finite)", "finite",
        "test_edges.py::test_special_values_pass_the_activation_as_in_torch",
        **SCALAR,
    ),
    mutant(
        "float16-nan-stored-as-infinity", CONVERT,
        "a > 0x7f800000u ? 0x7e00u : 0x7c00u", "0x7c00u",
        "test_edges.py::test_special_values_pass_the_activation_as_in_torch",
        **SCALAR,
    ),
    mutant(
        "float16-denormals-stored-as-normal", CONVERT,
        "(a < 0x38800000u ? denormal : normal)", "normal",
        "test_edges.py::test_halves_are_rounded_to_nearest_even",
        **SCALAR,
    ),
    mutant(
        "lines-in-pieces-of-sixteen", CONVERT,
        "if constexpr (PIECE > kVector && PIECE > 4) {", "if constexpr (PIECE > 16) {",
        "test_packed_code.py -k avx2",
        **AVX2,
    ),
    # ---- activations.h
    mutant(
        "silu-of-the-other-sign", ACTIVATIONS,
        "(1.0f + exp_of(-x))", "(1.0f + exp_of(x))",
        "test_fprop.py::test_activations_reach_both_ends",
        **AVX2,
    ),
    mutant(
        "exp-overflows-early", ACTIVATIONS,
        "const Ints i = bit_cast<Ints>(shifted) - 0x4b400000, half = i >> 1;",
        "const Ints i = bit_cast<Ints>(shifted) - 0x4b400000, half = {};",
        "test_fprop.py::test_activations_reach_both_ends",
        "test_edges.py::test_special_values_pass_the_activation_as_in_torch",
        **AVX2,
    ),
    mutant(
        "exp-cut-at-minus-eighty", ACTIVATIONS,
        "x = x < -104.0f ? Floats{} - 104.0f : x;", "x = x < -10.0f ? Floats{} - 10.0f : x;",
        "test_fprop.py::test_activations_reach_both_ends",
        **AVX2,
    ),
    mutant(
        "erf-series-past-its-range", ACTIVATIONS,
        "return a < 0.9375f ? near", "return a < 1.5f ? near",
        "test_fprop.py::test_epilogue -k gelu",
        **AVX2,
    ),
    mutant(
        "hardswish-not-clipped-above", ACTIVATIONS,
        "clipped = low > 6.0f ? X{} + 6.0f : low;", "clipped = low;",
        "test_fprop.py::test_activations_reach_both_ends",
        **AVX2,
    ),
    mutant(
        "gelu-of-half-the-argument", ACTIVATIONS,
        "static_cast<float>(0.70710678118654752440)", "static_cast<float>(0.5)",
        "test_fprop.py::test_epilogue -k gelu",
        **AVX2,
    ),
    # ---- sums.h
    mutant(
        "row-sums-without-their-tail", SUMS,
        "  if (all > whole) {\n", "  if (all < whole) {\n",
        "test_wgrad.py::test_shapes",
        **AVX2,
    ),
    mutant(
        "row-sums-of-one-row-less", SUMS,
        "for (int64_t half = 4; half >= rows; half /= 2)", "for (int64_t half = 4; half > rows; half /= 2)",
        "test_wgrad.py::test_channel_tails",
        **AVX2,
    ),
    mutant(
        "column-sums-of-whole-pieces", SUMS,
        "const int64_t end = steps - k < kShort ? steps : k + kShort;",
        "const int64_t end = steps - k < kShort ? k : k + kShort;",
        "test_wgrad.py::test_dz_as_the_vector_operand",
        **AVX2,
    ),
]  # fmt: skip
