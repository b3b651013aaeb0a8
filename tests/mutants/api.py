"""Faults between torch and the kernels: checks, strides, lowering, the binding."""

from .mutant import mutant

CHECKS = "csrc/api/checks.cpp"
STRIDES = "csrc/api/strides.cpp"
LOWER = "csrc/problem/lower.cpp"
BINDING = "csrc/api/binding.cpp"
OPS = "csrc/api/ops.cpp"
CPU = "csrc/cpu/conv1x1_cpu.cpp"

MUTANTS = [
    # ---- checks.cpp
    mutant(
        "check-groups-may-be-zero", CHECKS,
        "args.groups <= 0", "args.groups < 0",
        "test_errors.py::test_eager -k groups",
    ),
    mutant(
        "check-kernel-size-of-the-last-dimension-alone", CHECKS,
        "for (int64_t d = 2; d < w.ndim; ++d)\n    if (w.size[d] != 1)",
        "for (int64_t d = w.ndim - 1; d < w.ndim; ++d)\n    if (w.size[d] != 1)",
        "test_errors.py::test_eager -k kernel",
    ),
    mutant(
        "check-kernel-size-but-of-the-last-dimension", CHECKS,
        "for (int64_t d = 2; d < w.ndim; ++d)\n    if (w.size[d] != 1)",
        "for (int64_t d = 2; d + 1 < w.ndim; ++d)\n    if (w.size[d] != 1)",
        "test_errors.py::test_eager -k kernel",
    ),
    mutant(
        "check-bias-of-any-size", CHECKS,
        "if (b.ndim != 1 || b.size[0] != w.size[0])", "if (b.ndim != 1)",
        "test_errors.py::test_eager -k bias",
    ),
    mutant(
        "check-bias-of-any-dimensions", CHECKS,
        "if (b.ndim != 1 || b.size[0] != w.size[0])", "if (b.size[0] != w.size[0])",
        "test_errors.py::test_eager -k bias",
    ),
    mutant(
        "check-residual-of-any-dtype", CHECKS,
        'return error.empty() ? check_like_input("residual", args.residual, args.input) : error;', "return error;",
        "test_errors.py::test_eager -k residual",
    ),
    mutant(
        "check-residual-of-the-inputs-shape", CHECKS,
        "shape.push_back(output_size(args.input.size[channel + 1 + d], args.stride_of(d)));",
        "shape.push_back(args.input.size[channel + 1 + d]);",
        "test_errors.py::test_eager -k residual",
    ),
    mutant(
        "check-no-index-of-a-device", CHECKS,
        "a.device_type == b.device_type && (a.device_type == 0 || a.device_index == b.device_index)",
        "a.device_type == b.device_type",
        "test_cuda_routes.py::test_fake_errors_name_the_device",
    ),
    mutant(
        "check-fewer-strides-than-dimensions", CHECKS,
        "args.stride_count != 1 && args.stride_count != args.spatial()",
        "args.stride_count > args.spatial()",
        "test_errors.py::test_eager -k strides",
    ),
    mutant(
        "check-a-stride-of-zero", CHECKS,
        "if (args.stride[d] <= 0)", "if (args.stride[d] < 0)",
        "test_errors.py::test_eager -k stride",
    ),
    mutant(
        "check-backward-of-any-activation", CHECKS,
        "if (!masks_from_output(args.activation))", "if (false)",
        "test_errors.py::test_backward_operator",
    ),
    mutant(
        "check-backward-without-the-output", CHECKS,
        'return args.activation == Activation::kNone ? "" : expected(',
        'return true ? "" : expected(',
        "test_errors.py::test_backward_operator",
    ),
    mutant(
        "check-pooled-gradient-is-batched", CHECKS,
        "shape.resize(args.batched() ? 2 : 1);", "shape.resize(2);",
        "test_avg_pool.py::test_gradcheck",
    ),
    # ---- strides.cpp
    mutant(
        "strides-of-one-pixel-are-channels-last", STRIDES,
        "    if (d == 0 && least == stride[1]) return false;  // ambiguous (N, 1, 1, 1): contiguous\n", "",
        "test_strides.py::test_strides_of_stock",
    ),
    mutant(
        "strides-of-a-1d-input-always-count", STRIDES,
        "args.spatial() > 1 || is_contiguous(x)", "true",
        "test_strides.py::test_strides_of_stock",
    ),
    mutant(
        "strides-of-the-weight-do-not-count", STRIDES,
        "return is_channels_last_in_conv(args.weight, args.weight.ndim) ||\n", "return\n",
        "test_strides.py",
    ),
    mutant(
        "strides-in-3d-as-in-2d", STRIDES,
        "suggests_channels_last(args) && (args.spatial() < 3 || torch_3d_knows_channels_last(args, threads))",
        "suggests_channels_last(args) && (args.spatial() < 4 || torch_3d_knows_channels_last(args, threads))",
        "test_strides.py::test_strides_of_stock",
    ),
    mutant(
        "strides-dense-in-the-wrong-order", STRIDES,
        "for (int64_t d = ndim - 1; d >= (channels_last ? 2 : 0); --d) place(d);",
        "for (int64_t d = channels_last ? 2 : 0; d < ndim; ++d) place(d);",
        "test_strides.py::test_strides_of_stock",
    ),
    mutant(
        "weight-gradient-of-a-transposed-weight", STRIDES,
        "(in == 1 || si == out)", "(in == 1 || si == in)",
        "test_wgrad.py::test_weight_gradient_has_the_weights_strides",
    ),
    # ---- lower.cpp
    mutant(
        "axis-merged-whatever-the-other-tensor-has", LOWER,
        "axis.stride[last] == strides[d] * sizes[d] && axis.aux_stride[last] == a * sizes[d]",
        "axis.stride[last] == strides[d] * sizes[d]",
        "test_fprop.py::test_epilogue -k 'sliced or permuted'",
    ),
    mutant(
        "axis-with-strides-exchanged", LOWER,
        "input_sized && d > 0 ? p.stride[d - 1] : 1", "input_sized && d > 0 ? p.stride[3 - d] : 1",
        "test_fprop.py::test_shapes",
    ),
    mutant(
        "forward-ignores-the-stride", LOWER,
        "const Matrix x = activation_matrix(p, p.x, nullptr, in, true), y =",
        "const Matrix x = activation_matrix(p, p.x, nullptr, in, false), y =",
        "test_fprop.py::test_shapes",
    ),
    mutant(
        "residual-of-the-first-group", LOWER,
        "matrix.aux_group_stride = aux ? channels * aux->stride[1] : 0;", "matrix.aux_group_stride = 0;",
        "test_fprop.py::test_epilogue",
    ),
    mutant(
        "dgrad-weight-groups-apart-by-input-channels", LOWER,
        "weight_matrix(p.w, in, p.w.stride_in, out, p.w.stride_out, out * p.w.stride_out)",
        "weight_matrix(p.w, in, p.w.stride_in, out, p.w.stride_out, in * p.w.stride_out)",
        "test_dgrad.py::test_shapes",
    ),
    mutant(
        "dgrad-without-its-mask", LOWER,
        "GemmProblem g = pixelwise(p, wt, dz, dx, dx);\n  g.mask = mask;",
        "GemmProblem g = pixelwise(p, wt, dz, dx, dx);",
        "test_dgrad.py::test_activations -k relu",
    ),
    mutant(
        "mask-of-relu6-without-its-upper-bound", LOWER,
        "return Mask::kReLU6;", "return Mask::kReLU;",
        "test_edges.py::test_special_values_in_the_gradient_mask",
    ),
    mutant(
        "pooled-images-run-together", LOWER,
        "g.n_segment = p.pixels();", "g.n_segment = pixels;",
        "test_avg_pool.py::test_layouts",
    ),
    mutant(
        "accumulated-gradient-read-elsewhere", LOWER,
        "for (Axis* axis : {&g.d.row, &g.d.col})", "for (Axis* axis : {&g.d.row})",
        "test_avg_pool.py::test_backward_in_pieces",
    ),
    mutant(
        "accumulated-bias-gradient-forgotten", LOWER,
        "g.row_sums_accumulate = p.accumulate_dw;", "g.row_sums_accumulate = false;",
        "test_avg_pool.py::test_backward_in_pieces",
    ),
    # ---- binding.cpp, ops.cpp, cpu/conv1x1_cpu.cpp
    mutant(
        "bias-read-as-if-contiguous", BINDING,
        "args.bias.size[0] == 1 ? 1 : args.bias.stride[0]", "1",
        "test_fprop.py::test_bias_of_any_stride",
    ),
    mutant(
        "masked-gradient-made-and-not-used", BINDING,
        "    p.dy = p.dx;\n    p.y = ActivationView();\n", "    p.y = ActivationView();\n",
        "test_wgrad.py::test_residual -k relu",
    ),
    mutant(
        "skipped-pixels-left-as-they-were", BINDING,
        "    if (p.strided()) backend.zero_fill(p);\n", "",
        "test_dgrad.py -k 'pixels_that_were_not_read or test_shapes'",
    ),
    mutant(
        "panels-of-any-tag", BINDING,
        "*tag == tag_of(backend, g) ? tag + 1 : nullptr", "true ? tag + 1 : nullptr",
        "test_prepack.py::test_the_bits_of_a_call_that_packs",
    ),
    mutant(
        "pooling-keeps-no-bits-for-relu6", BINDING,
        "(p.activation == Activation::kReLU || p.activation == Activation::kReLU6)",
        "p.activation == Activation::kReLU",
        "test_memory.py::test_average_pooling_saves_its_arguments_and_a_bit_for_each_output",
    ),
    mutant(
        "pool-mask-of-any-size", BINDING,
        "bits.stride[0] != 1 ||\n        bits.size[0] != p.pool_mask_bytes())", "bits.stride[0] != 1)",
        "test_avg_pool.py::test_a_mask_of_other_arguments_is_refused",
    ),
    mutant(
        "pool-mask-not-zeroed", BINDING,
        "    TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(mask->get()));\n", "",
        "test_avg_pool.py -k keeps",
    ),
    mutant(
        "pooled-gradients-channels-side-by-side", BINDING,
        "p.dy.stride[1] = dy.stride[args.batched() ? 1 : 0];", "p.dy.stride[1] = 1;",
        "test_avg_pool.py::test_grad_output_of_any_strides",
    ),
    mutant(
        "config-of-any-activation", "csrc/api/tensor_checks.h",
        "config <= 0 || (config & 7) >= kActivationCount", "config <= 0",
        "test_errors.py::test_private_operators_refuse_a_foreign_config",
    ),
    mutant(
        "fake-check-takes-pooling-for-a-convolution", OPS,
        "const bool pools = values[6] != 0;", "const bool pools = false;",
        "test_operator.py::test_opcheck_of_avg_pool_backward",
    ),
    mutant(
        "pooled-bias-gradient-not-zeroed", CPU,
        "    if (p.dbias.data) std::memset(p.dbias.data, 0, c_out * size);\n", "",
        "test_avg_pool.py::test_gradients -k relu",
    ),
]  # fmt: skip
