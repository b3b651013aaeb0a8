"""Faults in the tiles in registers and their epilogues: tails, masks, chains, strips, pieces, stores."""

from .mutant import mutant

FOLDER = "csrc/cpu/kernels/fma/"
TILE, EPILOGUE, PAIRS = (FOLDER + name for name in ("tile.h", "tile_epilogue.h", "../common/pairs.h"))
AVX2 = {"unit": "cpu/kernels/fma/avx2.cpp", "isa": "avx2"}
AVX512 = {"unit": "cpu/kernels/fma/avx512.cpp", "isa": "avx512"}
BF16 = {"unit": "cpu/kernels/fma/avx512_bf16.cpp", "isa": "avx512_bf16"}

MUTANTS = [
    # ---- tile.h: the mainloop
    mutant(
        "tile-reads-whole-vectors-of-b", TILE,
        "bv[NV - 1] = V::load_op(columns + (NV - 1) * W, tail);", "bv[NV - 1] = V::load_op(columns + (NV - 1) * W);",
        "test_microkernels.py::test_nothing_behind_the_operands_is_touched -k avx2",
        **AVX2,
    ),
    mutant(
        "tile-stores-whole-vectors", TILE,
        "V::store(c + i * ld + j * W, acc[i][j], tail);", "V::store(c + i * ld + j * W, acc[i][j]);",
        "test_fprop.py::test_channel_tails",
        **AVX2,
    ),
    mutant(
        "tile-first-chain-not-joined", TILE,
        "if (in) CONV1X1_EACH(i, j) acc[i][j] = V::add(read(in",
        "if (in && from > 0) CONV1X1_EACH(i, j) acc[i][j] = V::add(read(in",
        "test_fprop.py::test_k_of_several_blocks",
        **AVX2,
    ),
    mutant(
        "tile-all-chains-but-the-first-in-one", TILE,
        "end = to - end < t.chain ? to : end + t.chain;", "end = to;",
        "test_fprop.py::test_k_of_several_blocks",
        "test_microkernels.py -k 'avx2 and (lengths_of_k or strip)'",
        **AVX2,
    ),
    mutant(
        "tile-joins-chains-by-the-callers-pitch", TILE,
        "      in = partial;\n      ld_in = NV * W;\n", "      in = partial;\n",
        "test_fprop.py::test_k_of_several_blocks",
        **AVX2,
    ),
    mutant(
        "tile-partial-sums-of-a-strip-share-a-place", TILE,
        "(t.k > t.piece ? done * (M * NV * W) : 0);", "0;",
        "test_fprop.py::test_k_of_several_blocks",
        **AVX2,
    ),
    mutant(
        "tile-next-piece-reads-the-one-before", TILE,
        "rows.move(t, done - 1, 0, 0);", "rows.move(t, done - 1, 0, from - to);",
        "test_fprop.py::test_k_of_several_blocks",
        **AVX2,
    ),
    mutant(
        "tile-strip-reads-its-second-rows-again", TILE,
        "row[i] = static_cast<const char*>(rows[i]) + to * t.a_step;",
        "row[i] = static_cast<const char*>(rows[i]) + t.a_step;",
        "test_fprop.py::test_shapes",
        **AVX2,
    ),
    mutant(
        "tile-every-fourth-row-misplaced", TILE,
        "(i % 4 == 3 ? pitch3 : i % 4 * pitch)", "(i % 4 == 3 ? pitch : i % 4 * pitch)",
        "test_fprop.py -k 'test_shapes or test_channel_tails'",
        **AVX512,
    ),
    # ---- tile.h: the common epilogue
    mutant(
        "tile-bias-of-the-strips-first-rows", TILE,
        "V::set1(bias[done * M + i])", "V::set1(bias[i])",
        "test_fprop.py::test_whole_tiles_beside_partial_ones -k float32",
        **AVX2,
    ),
    mutant(
        "tile-clamps-before-the-bias", TILE,
        "        if (const T* bias = static_cast<const T*>(e->bias_n))\n"
        "          CONV1X1_EACH(i, j) acc[i][j] = V::add(acc[i][j], read(bias, j));\n"
        "        const Reg lower = V::set1(static_cast<T>(e->lower)), upper = V::set1(static_cast<T>(e->upper));\n"
        "        CONV1X1_EACH(i, j) acc[i][j] = V::min(upper, V::max(lower, acc[i][j]));\n",
        "        const Reg lower = V::set1(static_cast<T>(e->lower)), upper = V::set1(static_cast<T>(e->upper));\n"
        "        CONV1X1_EACH(i, j) acc[i][j] = V::min(upper, V::max(lower, acc[i][j]));\n"
        "        if (const T* bias = static_cast<const T*>(e->bias_n))\n"
        "          CONV1X1_EACH(i, j) acc[i][j] = V::add(acc[i][j], read(bias, j));\n",
        "test_fprop.py::test_epilogue",
        **AVX2,
    ),
    mutant(
        "tile-clamp-replaces-nan", TILE,
        "V::min(upper, V::max(lower, acc[i][j]))", "V::min(upper, V::max(acc[i][j], lower))",
        "test_edges.py::test_special_values_pass_the_activation_as_in_torch -k relu",
        **AVX2,
    ),
    mutant(
        "tile-strip-of-halves-stored-far-apart", TILE,
        "out += M * t.ld_out * out_bytes;", "out += M * t.ld_out * static_cast<int64_t>(sizeof(T));",
        "test_fprop.py::test_shapes",
        **BF16,
    ),
    mutant(
        "tile-half-of-the-last-vector-stored-whole", TILE,
        "const auto lanes = j == NV - 1 ? tail : V::first(W);", "const auto lanes = V::first(W);",
        "test_fprop.py::test_shapes",
        **BF16,
    ),
    # ---- tile_epilogue.h
    mutant(
        "residual-taken-for-none", EPILOGUE,
        "return !e.residual && !t.splits && (e.store", "return !t.splits && (e.store",
        "test_fprop.py::test_epilogue",
        **AVX2,
    ),
    mutant(
        "split-columns-stored-as-one-run", EPILOGUE,
        "return !e.residual && !t.splits && (e.store", "return !e.residual && (e.store",
        "test_fprop.py -k 'test_shapes or test_layouts'",
        **AVX512,
    ),
    mutant(
        "residual-of-the-strips-first-rows", EPILOGUE,
        "const int64_t residual = (first + i) * e.ld_residual,", "const int64_t residual = i * e.ld_residual,",
        "test_fprop.py::test_shapes",
        **AVX2,
    ),
    mutant(
        "residual-added-after-the-clamp", EPILOGUE,
        "      if (has_residual) x = V::add(x, c.load(residual + j * W, lanes));\n"
        "      x = V::min(upper, V::max(lower, x));\n",
        "      x = V::min(upper, V::max(lower, x));\n"
        "      if (has_residual) x = V::add(x, c.load(residual + j * W, lanes));\n",
        "test_fprop.py::test_epilogue",
        **AVX2,
    ),
    mutant(
        "bias-of-rows-in-memory-of-the-first-tile", EPILOGUE,
        "V::set1(bias_m[first + i])", "V::set1(bias_m[i])",
        "test_fprop.py::test_shapes",
        **AVX2,
    ),
    mutant(
        "split-vectors-second-run-lost", EPILOGUE,
        "          if (two) c.store(to + s.then, x, two);\n", "",
        "test_fprop.py -k 'test_shapes or test_layouts'",
        **AVX512,
    ),
    mutant(
        "split-residual-added-twice", EPILOGUE,
        "x = V::add(x, c.load(residual + s.at, one), one);", "x = V::add(x, c.load(residual + s.at, lanes), lanes);",
        "test_fprop.py -k 'test_shapes or test_epilogue'",
        **AVX512,
    ),
    mutant(
        "bfloat16-residual-read-as-float16", EPILOGUE,
        "return V::load_half(residual + at, m, bfloat);", "return V::load_half(residual + at, m, !bfloat);",
        "test_fprop.py::test_shapes",
        **AVX512,
    ),
    # ---- avx2.cpp, pairs.h
    mutant(
        "avx2-mask-of-one-lane-more", FOLDER + "avx2.cpp",
        "(kLanes32 + 8 - lanes)", "(kLanes32 + 7 - lanes)",
        "test_fprop.py::test_channel_tails",
        isa="avx2",
    ),
    mutant(
        "pairs-odd-last-k-with-its-neighbour", PAIRS,
        "for (int64_t r = 0; r < g->length; ++r) d[r].bits &= 0xffffu;",
        "for (int64_t r = 0; r < g->length; ++r) d[r].bits |= 0;",
        "test_wgrad.py::test_shapes",
        **BF16,
    ),
    mutant(
        "pairs-across-images-one-k-off", PAIRS,
        "const int64_t head = k & 1,", "const int64_t head = 0,",
        "test_wgrad.py::test_shapes",
        **BF16,
    ),
    mutant(
        "pairs-rows-of-odd-k-not-ended", PAIRS,
        "  if (nk & 1)\n    for (int64_t r = 0; r < nr; ++r) static_cast<BFloat16*>",
        "  if (nk < 0)\n    for (int64_t r = 0; r < nr; ++r) static_cast<BFloat16*>",
        "test_edges.py::test_what_an_earlier_call_left_in_the_workspace_does_not_show -k bfloat16",
        **BF16,
    ),
]  # fmt: skip
