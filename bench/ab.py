"""Two built trees of this project against each other, layer by layer: is the new library slower anywhere?

``python -m bench.ab OLD NEW`` takes two checkouts, each with its library built in place (``python setup.py build_ext
--inplace``). Each is loaded by a process of its own. The processes are asked for samples of the same layer in turn, so
that a drift of the machine's clock meets both alike. A layer's ratio is the old median over the new one: above 1, the
new one is faster. Reported are the ratios' geometric mean and every layer below a limit. Results are not compared: that
is what the tests do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from bench.harness import DTYPES, NETS, SAMPLE_SECONDS, WARM_SECONDS, Layer, geometric_mean, keep_pages, load_shapes

LAYOUTS = ("NCHW", "NHWC")


def make_call(layer: Layer, dtype: str, layout: str, train: bool) -> Callable[[], Any]:
    """conv + bias + ReLU of the ``conv1x1_ext`` that this process imports; with ``train``, forward and backward."""
    import conv1x1_ext

    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        t = torch.randn(*size, generator=generator).to(DTYPES[dtype])
        return t.contiguous(memory_format=torch.channels_last) if layout == "NHWC" and t.dim() == 4 else t

    fan_in = layer.c_in // layer.groups
    x, w, b = normal(layer.n, layer.c_in, layer.h, layer.w), normal(layer.c_out, fan_in, 1, 1), normal(layer.c_out)
    options: dict[str, Any] = {"groups": layer.groups, "activation": "relu"}
    if not train:

        def forward() -> None:
            with torch.inference_mode():
                conv1x1_ext.conv1x1(x, w, b, layer.stride, **options)

        return forward
    leaves = [t.requires_grad_() for t in (x, w, b)]
    dy = torch.randn_like(conv1x1_ext.conv1x1(*leaves, layer.stride, **options))
    return lambda: torch.autograd.grad(conv1x1_ext.conv1x1(*leaves, layer.stride, **options), leaves, dy)


def serve() -> None:
    """The process of one tree: cases and requests for samples come as lines of JSON, microseconds go back."""
    call: Callable[[], Any] = int  # replaced by the first case
    inner = warm = 1

    def seconds(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            call()
        return (time.perf_counter_ns() - begin) * 1e-9

    for line in sys.stdin:
        request = json.loads(line)
        answer: float | str = 0.0
        if "threads" in request:
            import conv1x1_ext

            torch.set_num_threads(request["threads"])
            answer = str(Path(conv1x1_ext.__file__).parent) + ", " + conv1x1_ext.build_info()["isa"]
        elif "layer" in request:
            call = make_call(Layer(*request["layer"]), request["dtype"], request["layout"], request["train"])
            seconds(2)
            once = max(min(seconds(1) for _ in range(3)), 1e-7)
            inner, warm = (max(1, round(s * request["length"] / once)) for s in (SAMPLE_SECONDS, WARM_SECONDS))
        else:
            seconds(warm)
            answer = seconds(inner) / inner * 1e6
        print(json.dumps(answer), flush=True)


class Tree:
    """A checkout's process."""

    def __init__(self, tree: Path, isa: str | None) -> None:
        env = os.environ | {"PYTHONPATH": str(tree.resolve()), "OMP_WAIT_POLICY": "passive"}
        env |= {"CONV1X1_ISA": isa} if isa else {}
        # This file, and not the tree's own: an old one may have none, or another one.
        command = [sys.executable, "-c", f"import runpy; runpy.run_path({__file__!r}, run_name='serve')"]
        self.process = subprocess.Popen(
            command, env=env, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a tree's process ended: exit status {self.process.wait()}")
        return json.loads(answer)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.ab", description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=NETS, default=["seed", "resnet50", "mobilenet_v2"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--isa", help="CONV1X1_ISA of both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=float, default=0.5, help="of samples, of bench.harness's 10 ms")
    parser.add_argument("--pass", dest="passes", choices=["forward", "train", "both"], default="both")
    parser.add_argument("--below", type=float, default=0.95, help="list every layer below this ratio")
    parser.add_argument("--again", type=int, default=3, metavar="N", help="measure those with N times the rounds")
    args = parser.parse_args(argv)
    if argv is None:
        keep_pages()

    trees = [Tree(args.old, args.isa), Tree(args.new, args.isa)]
    for name, tree in zip(("old", "new"), trees, strict=True):
        print(f"{name}: {tree.ask(threads=args.threads)}")
    order = random.Random(0)

    def ratio(case: dict[str, Any], rounds: int) -> float:
        for tree in trees:
            tree.ask(**case, length=args.length)
        samples: list[list[float]] = [[], []]
        for _ in range(rounds):
            for i in order.sample((0, 1), 2):
                samples[i].append(trees[i].ask())
        return statistics.median(samples[0]) / statistics.median(samples[1])

    trainings = {"forward": [False], "train": [True], "both": [False, True]}[args.passes]
    everything = []
    for dtype in args.dtype:
        for train in trainings:
            for layout in LAYOUTS:
                ratios = {}
                for layer in load_shapes(args.shapes, args.batch):
                    case = {"layer": astuple(layer), "dtype": dtype, "layout": layout, "train": train}
                    ratios[str(layer)] = ratio(case, args.rounds)
                    if ratios[str(layer)] < args.below:
                        ratios[str(layer)] = ratio(case, args.rounds * args.again)
                values = list(ratios.values())
                everything += values
                low = ", ".join(f"{k} {v:.2f}" for k, v in sorted(ratios.items(), key=lambda i: i[1]) if v < args.below)
                what = f"{dtype} {layout} {'training' if train else 'forward'}"
                mean = f"{geometric_mean(values):.3f} (geometric mean of {len(values)})"
                spread = f"lowest {min(values):.2f}, highest {max(values):.2f}"
                print(f"{what}: {mean}, {spread}; below {args.below}: {low or 'none'}", flush=True)
    print(f"all {len(everything)}: {geometric_mean(everything):.3f}")


if __name__ == "__main__":
    main()
elif __name__ == "serve":
    serve()
