"""Faults in AMX's kernels, emulated where a CPU with AVX512-BF16 has none: packing, parts, feeds, what waits."""

from .mutant import mutant

FOLDER = "csrc/cpu/kernels/amx/"
AMX, FETCH, TILE, PLAIN = (FOLDER + name for name in ("instructions.h", "fetch.h", "tile.h", "plain.h"))
PENDING = FOLDER + "pending.h"
PARTS, FEED = FOLDER + "parts.h", FOLDER + "on_the_fly.h"
AMX_ISA = {"isa": "avx512_amx"}

MUTANTS = [
    mutant(
        "amx-b-not-padded-with-zeros", AMX,
        "static_cast<Pair*>(dst) + steps * ld, 0, static_cast<size_t>((whole - steps) * ld) * sizeof(Pair)",
        "static_cast<Pair*>(dst) + steps * ld, 0, static_cast<size_t>((whole - steps) * ld) * 0",
        "test_fprop.py::test_shapes -k bfloat16",
        "test_edges.py::test_padding_of_tails_does_not_meet_infinite_values",
        **AMX_ISA,
    ),
    mutant(
        "amx-a-not-padded-with-zeros", AMX,
        "        for (int64_t s = (n + 1) / 2; s < kTile; ++s)\n"
        "          for (int64_t r = 0; r < nr; ++r) group[r * kTile + s].bits = 0;\n",
        "",
        "test_fprop.py::test_shapes -k bfloat16",
        **AMX_ISA,
    ),
    mutant(
        "amx-transposed-rows-four-apart", AMX,
        "const int64_t row = 4 * odd + c;", "const int64_t row = 4 * (1 - odd) + c;",
        "test_wgrad.py::test_shapes -k bfloat16",
        **AMX_ISA,
    ),
    mutant(
        "amx-row-sums-of-the-last-tile", AMX,
        "(done + kTile > rows ? rows - kTile : done)", "done",
        "test_wgrad.py::test_shapes -k bfloat16",
        equivalent="what is read past the panel's end is thrown away, and the workspace goes on there",
        **AMX_ISA,
    ),
    mutant(
        "parts-first-one-not-rounded", PARTS,
        "if (p == 0) l = _mm512_add_epi32(l, half), h = _mm512_add_epi32(h, half);", "",
        "test_parts.py -k 'no_less_accurate or exact'",
        equivalent="cut or rounded, the sum of the parts is exact; left-out products grow within the bound",
        **AMX_ISA,
    ),
    mutant(
        "parts-mask-stops-nans", PARTS,
        "_mm512_cmp_ps_mask(saved, _mm512_setzero_ps(), _CMP_NLE_UQ)",
        "_mm512_cmp_ps_mask(saved, _mm512_setzero_ps(), _CMP_GT_OQ)",
        "test_parts.py::test_a_gradient_passes_where_the_output_is_nan",
        **AMX_ISA,
    ),
    mutant(
        "parts-of-two-images-run-together", PARTS,
        "x.then = rest.offset - run.length;", "x.then = rest.offset;",
        "test_parts.py -k 'layout or gradients'",
        **AMX_ISA,
    ),
    mutant(
        "parts-rows-ahead-by-the-wrong-group", PARTS,
        "if (++group == ahead.groups) group = 0, ++row;", "if (++group > ahead.groups) group = 0, ++row;",
        "test_parts.py::test_rows_packed_between_products",
        **AMX_ISA,
    ),
    mutant(
        "parts-never-small", PARTS,
        "_mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(2 * (kSmallBelow >> 16) - 1)) != 0", "false",
        "test_parts.py -k 'small or ends_of_the_range'",
        **AMX_ISA,
    ),
    mutant(
        "feed-second-run-like-the-first", FEED,
        "load_sixteen_masked<M>(s + v.then, y + v.aux_then, v.second)",
        "load_sixteen_masked<M>(s + v.at, y + v.aux_at, v.second)",
        "test_parts.py::test_activations_split_between_products",
        **AMX_ISA,
    ),
    mutant(
        "feed-k-past-the-end", FEED,
        "if (!WHOLE && k >= left) return _mm512_setzero_ps();", "",
        "test_parts.py::test_a_sample_has_its_bits_whatever_stands_beside_it",
        **AMX_ISA,
    ),
    mutant(
        "feed-mask-of-the-first-row", FEED,
        "      saved += aux_pitch;\n", "",
        "test_parts.py::test_activations_split_between_products -k relu",
        **AMX_ISA,
    ),
    mutant(
        "amx-bias-after-the-clamp", PENDING,
        "    if constexpr (BIAS >= 0) c[j] = V::add(c[j], bias[j]);\n    c[j] = V::max(bounds.lower, c[j]);\n",
        "    c[j] = V::max(bounds.lower, c[j]);\n    if constexpr (BIAS >= 0) c[j] = V::add(c[j], bias[j]);\n",
        "test_fprop.py::test_whole_tiles_beside_partial_ones -k bfloat16",
        **AMX_ISA,
    ),
    mutant(
        "amx-last-chain-not-joined", PENDING,
        "if (p.has_chain) join_chain<V>(whole, p.chain, p.m);", "",
        "test_parts.py::test_float32_is_no_less_accurate_than_twice_stock",
        **AMX_ISA,
    ),
    mutant(
        "amx-waiting-rows-of-the-first-tile", PENDING,
        "static_cast<const float*>(e.bias_m) + row : nullptr", "static_cast<const float*>(e.bias_m) : nullptr",
        "test_fprop.py -k 'bfloat16 and (test_shapes or whole_tiles)'",
        **AMX_ISA,
    ),
    mutant(
        "amx-overflow-not-repaired", PENDING,
        "const bool finite = _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(0x7f800000)) == 0;",
        "const bool finite = true;",
        "test_parts.py -k 'special_values or overflow'",
        **AMX_ISA,
    ),
    mutant(
        "amx-second-tile-of-rows-misplaced", TILE,
        "const int64_t second = MT == 2 ? t.m - kTile : 0,", "const int64_t second = MT == 2 ? kTile : 0,",
        "test_microkernels.py::test_nothing_behind_the_operands_is_touched -k avx512_amx",
        **AMX_ISA,
    ),
    mutant(
        "amx-plain-tile-keeps-its-sums", PLAIN,
        "      current ^= 1;\n      sums = p.whole[current];\n", "      sums = p.whole[current];\n",
        "test_fprop.py::test_whole_tiles_beside_partial_ones -k bfloat16",
        equivalent="the tile that waits is always finished before the next one is stored: a second place is not needed",
        **AMX_ISA,
    ),
    mutant(
        "amx-products-in-one-order-for-both-roles", "csrc/cpu/run/amx_block.h",
        "args.mirrored = p_.b_is_weight;", "args.mirrored = false;",
        "test_determinism.py::test_a_sample_alone_or_in_a_batch",
        **AMX_ISA,
    ),
]  # fmt: skip
