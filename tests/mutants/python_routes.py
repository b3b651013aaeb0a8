"""Faults in conv1x1_ext: which route a call takes, formulas, fake tensors, packed weights, modules."""

from .mutant import mutant

ARGUMENTS = "conv1x1_ext/_arguments.py"
CONVERSION = "conv1x1_ext/_conversion.py"
AUTOGRAD = "conv1x1_ext/_autograd.py"
EAGER = "conv1x1_ext/_eager.py"
FORMULAS = "conv1x1_ext/_formulas.py"
LAYER = "conv1x1_ext/_layer.py"
LIBRARY = "conv1x1_ext/_library.py"
MODULES = "conv1x1_ext/modules.py"
OPS = "conv1x1_ext/ops.py"
PACKED = "conv1x1_ext/_packed.py"
PREPACK = "conv1x1_ext/_prepack.py"
RULES = "conv1x1_ext/_registrations.py"
VMAP = "conv1x1_ext/_vmap.py"

MUTANTS = [
    # ---- _eager.py: the private operators' config, what is saved, what obstructs the fast path
    mutant(
        "config-strides-reversed", EAGER,
        "config |= s << (4 + 10 * d)", "config |= s << (24 - 10 * d)",
        "test_fprop.py::test_shapes -k 'contiguous and float64'",
    ),
    mutant(
        "config-stride-of-eleven-bits", EAGER,
        "_MAX_STRIDE, _MAX_GROUPS = 1 << 10, 1 << 28", "_MAX_STRIDE, _MAX_GROUPS = 1 << 11, 1 << 28",
        "test_fprop.py::test_strides_beyond_the_compact_encoding",
    ),
    mutant(
        "config-decoded-one-dimension-off", EAGER,
        "range(max(5 - weight.dim(), 0), 3)", "range(max(6 - weight.dim(), 0), 3)",
        "test_operator.py::test_second_derivatives_with_a_stride_for_each_dimension",
    ),
    mutant(
        "backward-takes-weight-for-bias", EAGER,
        "need_bias << 2 | masked_residual << 3", "need_weight << 2 | masked_residual << 3",
        "test_wgrad.py::test_only_what_is_needed_is_computed",
    ),
    mutant(
        "backward-residual-not-masked", EAGER,
        "dz if masked_residual else grad if need_residual else None, None", "grad if need_residual else None, None",
        "test_wgrad.py::test_residual -k 'relu and float64'",
    ),
    mutant(
        "output-saved-without-a-mask", EAGER,
        "output if config & 7 else None", "output",
        "test_memory.py::test_autograd_saves_x_w_and_y_or_the_preactivation",
    ),
    mutant(
        "create-graph-takes-the-private-operator", EAGER,
        "if _grad_enabled() or forward_ad._current_level >= 0:", "if forward_ad._current_level >= 0:",
        "test_operator.py::test_first_and_second_derivatives",
    ),
    mutant(
        "activation-fused-where-its-gradient-needs-z", EAGER,
        "config if fused else config & ~7,", "config,",
        "test_dgrad.py::test_activations -k 'silu and float64'",
    ),
    mutant(
        "autocast-does-not-obstruct", EAGER,
        "        and not autocasting()\n", "",
        "test_operator.py::test_autocast_as_conv2d",
    ),
    mutant(
        "forward-ad-does-not-obstruct", EAGER,
        "        and forward_ad._current_level < 0\n", "",
        "test_operator.py::test_dual_numbers",
    ),
    mutant(
        "dispatch-modes-do-not-obstruct", EAGER,
        "        and not _dispatch_modes()\n", "",
        "test_avg_pool.py::test_modes_and_transforms_see_the_public_operators",
    ),
    mutant(
        "transforms-do-not-obstruct", EAGER,
        "        and not _functorch_active()\n", "",
        "test_operator.py::test_functional_derivatives",
    ),
    mutant(
        "dead-wrapper-kept", EAGER,
        "_apply_avg_pool(_unwrap_if_dead(input), _unwrap_if_dead(weight),",
        "_apply_avg_pool(input, weight,",
        "test_avg_pool.py::test_a_tensor_that_outlived_a_transform_keeps_its_gradient",
    ),
    mutant(
        "tf32-for-every-dtype", EAGER,
        "return input.is_cuda and input.dtype == torch.float32 and conv_uses_tf32()",
        "return input.is_cuda and conv_uses_tf32()",
        "test_cuda_routes.py::test_only_float32_cuda_tensors_ask",
    ),
    mutant(
        "tf32-by-the-wrong-setting", EAGER,
        '_get_fp32_precision_getter("cuda", "conv")', '_get_fp32_precision_getter("cuda", "matmul")',
        "test_cuda_routes.py -k 'test_tf32_by'",
    ),
    mutant(
        "stride-of-any-type", ARGUMENTS,
        "    if any(item is None for item in found):", "    if False:",
        "test_errors.py::test_stride_of_the_wrong_type",
    ),
    # ---- _formulas.py
    mutant(
        "relu6-derivative-without-its-upper-bound", FORMULAS,
        "_aten.hardtanh_backward(grad, z, 0.0, 6.0)", "_aten.threshold_backward(grad, z, 0)",
        "test_operator.py::test_functional_derivatives_beyond_both_kinks -k relu6",
    ),
    mutant(
        "silu-derivative-sign", FORMULAS,
        "s * (1 + z * (1 - s))", "s * (1 - z * (1 - s))",
        "test_operator.py::test_per_sample_gradients -k silu",
    ),
    mutant(
        "pooled-gradient-not-divided", FORMULAS,
        ".expand_as(z) / pixels, z)", ".expand_as(z), z)",
        "test_operator.py::test_per_sample_gradients -k True",
    ),
    mutant(
        "formula-residual-not-masked", FORMULAS,
        "(dz if masked else grad) if need_residual else None", "grad if need_residual else None",
        "test_operator.py::test_first_and_second_derivatives -k 'public and relu'",
    ),
    # ---- ops.py
    mutant(
        "autocast-casts-float64", OPS,
        "t.is_floating_point() and t.dtype != torch.float64 and", "t.is_floating_point() and",
        "test_operator.py::test_autocast_leaves_float64_alone",
    ),
    mutant(
        "integers-pooled-before-they-are-refused", OPS,
        "if pools_first and input.dtype in _DTYPES:", "if pools_first:",
        "test_errors.py::test_avg_pool",
    ),
    mutant(
        "reference-activates-before-the-residual", OPS,
        "return apply_activation(z if residual is None else z + residual, activation)",
        "return apply_activation(z, activation) + (0 if residual is None else residual)",
        "test_operator.py::test_dual_numbers",
    ),
    # ---- _arguments.py, _packed.py, _prepack.py, _layer.py, _conversion.py and modules.py
    mutant(
        "integer-takes-a-bool", ARGUMENTS,
        "if isinstance(value, bool) or (", "if (",
        "test_arguments.py::test_what_is_no_integer",
    ),
    mutant(
        "config-of-what-is-not-an-int", EAGER,
        "        if type(stride) is type(groups) is int:", "        if True:",
        "test_arguments.py::test_no_call_depends_on_the_arguments_of_others",
    ),
    mutant(
        "padding-taken-where-one-dimension-has-none", ARGUMENTS,
        "    if any(size != 0 for size in found):", "    if all(size != 0 for size in found):",
        "test_arguments.py::test_edited_attributes_are_heeded",
    ),
    mutant(
        "packed-weight-does-not-see-writes", PACKED,
        "            or weight._version != self._version\n", "",
        "test_freeze.py::test_a_call_after_a_change_that_torch_knows_of_raises",
    ),
    mutant(
        "packed-weight-does-not-see-moved-storage", PACKED,
        "            or weight.data_ptr() != self._address\n", "",
        "test_freeze.py -k change",
    ),
    mutant(
        "packed-weight-lets-its-memory-be-used-again", PACKED,
        "        self._storage = weight.untyped_storage()\n", "",
        "test_freeze.py::test_no_other_weight_comes_to_lie_at_its_address",
    ),
    mutant(
        "packed-weight-where-a-gradient-is-needed", PACKED,
        "        if _eager.needs_grad(input, weight, bias, residual):\n"
        "            self.refuse_gradients(input, weight, bias, residual)\n", "",
        "test_freeze.py::test_gradients_are_refused",
    ),
    mutant(
        "training-keeps-the-packed-weight", LAYER,
        "        if mode and self._packed is not None:", "        if False:",
        "test_freeze.py::test_what_would_make_it_stale_is_refused",
    ),
    mutant(
        "loading-keeps-the-packed-weight", LAYER,
        "        if self._packed is not None and given:", "        if False:",
        "test_freeze.py::test_what_would_make_it_stale_is_refused",
    ),
    mutant(
        "prepack-leaves-buffers-as-the-run-left-them", PREPACK,
        "                buffer.copy_(copy)\n", "                pass\n",
        "test_freeze.py -k whole_model",
    ),
    mutant(
        "module-keeps-the-config-of-another-activation", LAYER,
        "                or activation is not self.activation\n", "",
        "test_arguments.py::test_attributes_may_change_between_calls",
    ),
    mutant(
        "module-keeps-the-config-of-another-padding", LAYER,
        "                or padding is not self.padding\n", "",
        "test_arguments.py::test_edited_attributes_are_heeded",
    ),
    mutant(
        "module-keeps-the-config-of-a-list", LAYER,
        "[value if _fixed(value) else _ANEW for value in", "[value for value in",
        "test_arguments.py::test_lists_changed_in_place",
    ),
    mutant(
        "from-conv2d-takes-padding", CONVERSION,
        "any(p != 0 for p in conv.padding)", "all(p != 0 for p in conv.padding)",
        "test_conversion.py::test_other_layers_are_refused",
    ),
    mutant(
        "from-conv2d-takes-a-subclass", CONVERSION,
        "            if defined:\n", "            if False:\n",
        "test_conversion.py::test_layers_of_another_function_are_refused",
    ),
    mutant(
        "from-conv2d-drops-hooks", CONVERSION,
        "        if getattr(conv, hooks):\n", "        if False:\n",
        "test_conversion.py::test_what_a_layer_would_lose_is_named",
    ),
    mutant(
        "mlpconv-of-shifted-widths", MODULES,
        "zip(widths, (*widths[1:], out_channels), strict=True)",
        "zip(widths, (*widths[:-1], out_channels), strict=True)",
        "test_modules.py -k mlpconv",
    ),
    # ---- _registrations.py and _library.py: fake tensors, transforms, FLOPs
    mutant(
        "fake-stride-rounds-up", RULES,
        "[0 if s == 0 else (s - 1) // t + 1 for", "[0 if s == 0 else s // t + 1 for",
        "test_strides.py::test_fake_tensors_of_nothing_have_the_real_sizes",
    ),
    mutant(
        "fake-weight-gradient-of-a-transposed-weight", RULES,
        "if row_major or column_major:\n        return weight.new_empty_strided",
        "if row_major:\n        return weight.new_empty_strided",
        "test_strides.py::test_fake_gradients_have_the_real_strides",
    ),
    mutant(
        "fake-mask-a-byte-short", RULES,
        "(pooled + 7) // 8 + 1", "(pooled + 7) // 8",
        "test_avg_pool.py::test_fake_masks_are_as_the_real_ones",
    ),
    mutant(
        "vmap-shares-a-batched-bias", VMAP,
        "    if at_weight is None and at_bias is None:\n        x, r =", "    if at_weight is None:\n        x, r =",
        "test_operator.py::test_vmap",
    ),
    mutant(
        "vmap-groups-of-one-example", VMAP,
        "op(b.groups(input, at_input), w, c, r, stride, groups * size, *rest)",
        "op(b.groups(input, at_input), w, c, r, stride, size, *rest)",
        "test_transforms.py::test_a_batch_is_one_call",
    ),
    mutant(
        "batched-gradients-of-the-wrong-level", VMAP,
        "            level -= 1\n        level += 1\n", "            level -= 1\n",
        "test_transforms.py::test_batched_gradients",
    ),
    mutant(
        "inner-transform-hides-the-outer", AUTOGRAD,
        "torch.set_grad_enabled(reverse), forward_ad._set_fwd_grad_enabled(forward)",
        "torch.set_grad_enabled(False), forward_ad._set_fwd_grad_enabled(forward)",
        "test_operator.py::test_functional_derivatives",
    ),
    mutant(
        "tangent-without-the-weights", AUTOGRAD,
        "    if d_weight is not None:\n        total,", "    if False:\n        total,",
        "test_transforms.py::test_dual_numbers_of_operators",
    ),
    mutant(
        "tangent-of-a-gradient-without-the-inputs", AUTOGRAD,
        "    if need_weight and d_input is not None:\n", "    if False:\n",
        "test_transforms.py::test_dual_numbers_of_operators",
    ),
    mutant(
        "second-derivative-by-the-wrong-weight", AUTOGRAD,
        "_ops.conv1x1.default(input, d_weight, d_bias, total", "_ops.conv1x1.default(input, weight, d_bias, total",
        "test_operator.py::test_second_derivatives_of_parts",
    ),
    mutant(
        "second-derivative-not-masked", AUTOGRAD,
        "        d_grad = d_grad if output is None else DERIVATIVES[activation](d_grad, output)\n", "",
        "test_operator.py::test_first_and_second_derivatives",
    ),
    mutant(
        "flops-of-both-gradients-always", RULES,
        "* (need_input + need_weight)\n", "* 2\n",
        "test_operator.py::test_flops_as_conv2d",
    ),
    mutant(
        "fake-backward-does-not-check-the-output", RULES,
        "grad_output=grad_output, output=output)", "grad_output=grad_output)",
        "test_errors.py::test_backward_operator",
    ),
    mutant(
        "fake-check-takes-three-strides-of-four", LIBRARY,
        "values += [len(stride), *list(stride[:3])", "values += [min(len(stride), 3), *list(stride[:3])",
        "test_errors.py -k 'fake or meta'",
    ),
]  # fmt: skip
