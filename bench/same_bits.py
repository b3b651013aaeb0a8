"""Two built trees of this project on the same random problems: equal plans, and equal bits where plans are equal?

``python -m bench.same_bits OLD NEW`` takes two checkouts, each with its library built in place (``python setup.py
build_ext --inplace``). For each instruction set that this CPU runs, both run ``--problems`` random problems: forward,
dgrad, wgrad, and average pooling with its gradients. AMX is emulated where the CPU has none (tests/amx). A change of
structure must show no difference at all; a change of a plan lists the problems that it concerns.

A plan is what ``explain`` prints, without the reasons. Bits may differ only where the kernel, its chains, the length of
k that is packed at a time or the number of k-slices differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_amx")
DTYPES = ("float32", "float64", "bfloat16", "float16")
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish", "gelu")
DIRECTIONS = ("fprop", "dgrad", "wgrad", "avg_pool")
# The lines of a plan that decide bits.
NUMERIC = ("kernel", "dtype", "block", "k_slices")


def problem_of(seed: int, small: bool) -> dict[str, Any]:
    """A random problem. ``small``: for the emulator."""
    choose = random.Random(seed)
    groups = choose.choice((1, 1, 1, 1, 2, 4))
    most = 96 if small else 320
    channels = [groups * max(1, round(most ** choose.random() / groups)) for _ in range(2)]
    if choose.random() < 0.4:  # as real networks have them
        channels = [groups * choose.choice((16, 32, 64, 96)) // choose.choice((1, 2)) for _ in range(2)]
    if choose.random() < 0.1:  # a long k
        channels[choose.randrange(2)] = groups * choose.choice((512, 800, 1100, 2048)) // (4 if small else 1)
    spatial = [choose.randint(1, 14 if small else 30) for _ in range(choose.choice((1, 2, 2, 2, 3)))]
    if len(spatial) == 3:
        spatial = [max(1, s // 3) for s in spatial]
    return {
        "seed": seed,
        "dtype": choose.choice(DTYPES),
        "n": choose.choice((1, 1, 2, 3, 5)),
        "channels": channels,
        "groups": groups,
        "spatial": spatial,
        "stride": choose.choice((1, 1, 1, 2)),
        "layout": choose.choice(("contiguous", "contiguous", "channels_last", "channels_last", "sliced")),
        "activation": choose.choice(ACTIVATIONS),
        "bias": choose.random() < 0.7,
        "residual": choose.random() < 0.3,
        "threads": choose.choice((1, 1, 2, 3)),
    }


def plan_of(explained: dict[str, str]) -> dict[str, str]:
    """Without the reasons, which may be worded anew."""
    plan = {key: value.split(": ")[0] for key, value in explained.items() if key not in ("isa", "workspace_bytes")}
    return {key: value.split(",")[0] if key in ("A", "B") else value for key, value in plan.items()}


def dump(count: int, seed: int, small: bool) -> None:
    """Runs the problems with this process's ``conv1x1_ext``; a line of JSON for each."""
    import torch

    import conv1x1_ext

    print(json.dumps({"file": conv1x1_ext.__file__, "isa": os.environ.get("CONV1X1_ISA")}), flush=True)
    for number in range(count):
        p = problem_of(seed + number, small)
        generator = torch.Generator().manual_seed(p["seed"])

        def normal(*size: int, p: dict = p, generator: torch.Generator = generator) -> torch.Tensor:
            t = torch.randn(*size, generator=generator).to(getattr(torch, p["dtype"]))
            if t.dim() < 3 or p["layout"] == "contiguous":
                return t
            if p["layout"] == "sliced":
                wide = torch.zeros(*size[:-1], 2 * size[-1], dtype=t.dtype)
                wide[..., ::2] = t
                return wide[..., ::2]
            return t.movedim(1, -1).contiguous().movedim(-1, 1)

        c_in, c_out = p["channels"]
        torch.set_num_threads(p["threads"])
        x = normal(p["n"], c_in, *p["spatial"]).requires_grad_()
        w = torch.randn(c_out, c_in // p["groups"], *[1] * len(p["spatial"]), generator=generator)
        w = w.to(x.dtype).requires_grad_()
        b = normal(c_out).requires_grad_() if p["bias"] else None
        leaves = [t for t in (x, w, b) if t is not None]
        options = {"groups": p["groups"], "activation": p["activation"]}
        out_size = [(s - 1) // p["stride"] + 1 for s in p["spatial"]]
        r = normal(p["n"], c_out, *out_size) if p["residual"] else None
        y = conv1x1_ext.conv1x1(x, w, b, p["stride"], residual=r, **options)
        results = [y, *torch.autograd.grad(y, leaves, normal(*y.shape))]
        pooled = conv1x1_ext.conv1x1_avg_pool(x, w, b, **options)
        results += [pooled, *torch.autograd.grad(pooled, leaves, normal(*pooled.shape))]
        explained = {}
        for direction in DIRECTIONS:
            stride = 1 if direction == "avg_pool" else p["stride"]
            residual = r if direction == "fprop" else None
            plan = conv1x1_ext.explain(x, w, b, stride, residual=residual, direction=direction, **options)
            explained[direction] = plan_of(plan)
        bits = [hashlib.sha1(bytes(t.detach().contiguous().flatten().view(torch.uint8).tolist())).hexdigest()[:12]
                for t in results]  # fmt: skip
        print(json.dumps({"problem": p, "plans": explained, "bits": bits}), flush=True)


def lines_of(tree: Path, isa: str, count: int, seed: int) -> tuple[dict, list[dict]]:
    sys.path.insert(0, str(tree / "tests"))
    emulated = isa == "avx512_amx" and "amx_bf16" not in Path("/proc/cpuinfo").read_text()
    package = str(tree)
    if emulated:
        code = "import sys; sys.path.insert(0, 'tests'); from amx import build; print(build.package())"
        built = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
        package = built.stdout.splitlines()[-1]
    environment = {**os.environ, "CONV1X1_ISA": isa, "PYTHONPATH": package, "OMP_WAIT_POLICY": "passive"}
    here = Path(__file__).resolve()
    command = [sys.executable, str(here), "--dump", "--problems", str(count), "--seed", str(seed)]
    result = subprocess.run([*command, *(["--small"] if emulated else [])], env=environment, cwd=here.parent,
                            capture_output=True, text=True)  # fmt: skip
    if result.returncode != 0:
        raise SystemExit(f"{tree}: {result.stderr[-2000:]}")
    first, *lines = [json.loads(line) for line in result.stdout.splitlines()]
    return first, lines


def numeric(plan: dict[str, str]) -> tuple[str, ...]:
    """What decides bits: of the block its k and chains, not its size in tiles."""
    return tuple(re.sub(r"^\d+ x \d+ tiles, ", "", plan.get(key, "")) for key in NUMERIC)


def compare(old: list[dict], new: list[dict], show: int) -> bool:
    different, changed_keys, wrong = 0, Counter[str](), 0
    for a, b in zip(old, new, strict=True):
        assert a["problem"] == b["problem"]
        decides = all(numeric(a["plans"][d]) == numeric(b["plans"][d]) for d in DIRECTIONS)
        keys = {f"{d}.{key}" for d in DIRECTIONS for key in a["plans"][d] | b["plans"][d]
                if a["plans"][d].get(key) != b["plans"][d].get(key)}  # fmt: skip
        changed_keys.update(keys)
        different += bool(keys)
        if a["bits"] != b["bits"] and decides:
            wrong += 1
            if wrong <= show:
                print("  other bits by the same plan:", a["problem"])
        elif keys and different <= show:
            for key in sorted(keys):
                d, name = key.split(".", 1)
                print(f"  {key}: {a['plans'][d].get(name)} -> {b['plans'][d].get(name)}: {a['problem']}")
    print(f"  {len(old)} problems: {different} with another plan {dict(changed_keys) or ''}, "
          f"{wrong} with other bits by the same plan")  # fmt: skip
    return wrong == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits", description=__doc__)
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE", help="the old tree, then the new one")
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--isa", nargs="+", choices=ISAS, help="all that this CPU runs or emulates")
    parser.add_argument("--show", type=int, default=10, help="differences to print for each instruction set")
    parser.add_argument("--dump", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dump:
        dump(options.problems, options.seed, options.small)
        return 0
    if len(options.trees) != 2:
        parser.error("two trees are wanted")
    flags = Path("/proc/cpuinfo").read_text()
    runs = {"scalar": True, "avx2": "avx2" in flags, "avx512": "avx512dq" in flags}
    runs["avx512_bf16"] = runs["avx512_amx"] = "avx512_bf16" in flags
    good = True
    for isa in options.isa or [isa for isa in ISAS if runs[isa]]:
        print(isa, flush=True)
        (first, old), (second, new) = (
            lines_of(t.resolve(), isa, options.problems, options.seed) for t in options.trees
        )
        if first["file"] == second["file"]:
            raise SystemExit(f"both trees load {first['file']}")
        good = compare(old, new, options.show) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
