"""``python -m bench.op --device cuda``: every layer of bench/shapes, ours against cuDNN, cuBLASLt and Inductor.

How it measures is in bench/cuda_harness.py, what it compares with in bench/cuda_peers.py. Each candidate is checked
once a layer against float64: ours failing that ends the run, a peer that fails or does not exist is listed with the
reason. Results have the CPU benchmark's format; beside it each candidate has "graph_us" and each result "floor_us".
With --budget the run stops between layers, and lists what it left out.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from typing import Any

import torch

from bench import csv_results, cuda_harness, cuda_peers, cuda_report
from bench.cuda_harness import CudaTimer, Timer
from bench.cuda_peers import Copy, Peer
from bench.harness import Layer, OtherWork, describe_run, load_shapes

Work = tuple[Layer, list[str], str, bool]


def chosen_peers(args: argparse.Namespace) -> list[Peer]:
    """Ours and stock always; the rest as asked, "compile" only if asked."""
    names = {"ours", "stock", *(args.peers or [n for n in cuda_peers.NAMES if n != "compile"])}
    if args.compile:
        names.add("compile")
    layouts = cuda_peers.LAYOUTS if args.layout == "both" else (args.layout,)
    return [p for p in cuda_peers.PEERS if p.name in names and p.layout in layouts]


def plan(args: argparse.Namespace) -> list[Work]:
    """Layer by layer, every dtype and direction of one before the next: a budget cuts off whole layers."""
    layers = load_shapes(args.shapes, args.batch)
    directions = [True] if args.train else [False] if args.forward else [False, True]
    return [
        (layer, nets, dtype, train) for layer, nets in layers.items() for dtype in args.dtype for train in directions
    ]


def prepare(
    work: Work, peers: list[Peer], device: str, l2_bytes: int
) -> tuple[dict[str, list[cuda_harness.Call]], dict[str, float], dict[str, str], int]:
    """Calls that were found right, their errors, the reasons of those left out, and the number of copies.

    Raises:
        AssertionError: ours, or stock, is wrong.
    """
    layer, _, dtype, train = work
    item = cuda_harness.DTYPES[dtype].itemsize
    read = item * (layer.c_in * layer.n * layer.h * layer.w + layer.weights)
    count = cuda_harness.copies_for(read + (item * layer.pixels * layer.c_out if train else 0), l2_bytes)
    calls: dict[str, list[cuda_harness.Call]] = {}
    found: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for layout in dict.fromkeys(p.layout for p in peers):
        copies: list[Copy] = cuda_peers.make_copies(layer, dtype, layout, count, train, device)
        expected = cuda_peers.reference(copies[0], layer.stride, train, layer.groups)
        for peer in (p for p in peers if p.layout == layout):
            reason = peer.unavailable(layer, train)
            if reason is None:
                try:
                    function = peer.build(layer, dtype)
                    own = [peer.call(function, layer, copy, train) for copy in copies]
                    found[peer.key] = cuda_peers.errors(peer.outputs(own[0](), layer), expected)
                    calls[peer.key] = own
                except Exception as error:
                    if peer.name in ("ours", "stock"):
                        raise
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if reason is not None:
                skipped[peer.key] = reason
        del expected
    stock = [max(e) for e in zip(*(e for key, e in found.items() if key.startswith("stock")), strict=True)]
    for key, own_errors in found.items():
        bound = cuda_peers.BOUNDS[dtype]
        wrong = [f"{e:.1e}" for e, s in zip(own_errors, stock, strict=True) if not e <= max(2 * s, bound)]
        if wrong and key.startswith("ours"):
            raise AssertionError(f"{key}, {layer}, {dtype}, train={train}: relative errors {wrong}, stock's {stock}")
        if wrong:
            skipped[key] = f"wrong: relative errors {', '.join(wrong)}"
            del calls[key]
    return calls, {key: max(e) for key, e in found.items()}, skipped, count


def measure_layer(
    work: Work, peers: list[Peer], args: argparse.Namespace, ceilings: dict[str, Any], timer: Timer, deadline: float
) -> dict[str, Any]:
    """One entry of the results."""
    layer, nets, dtype, train = work
    cuda_harness.allow_tf32(dtype == "tf32")
    with torch.inference_mode(not train):
        calls, errors, skipped, copies = prepare(work, peers, args.device, args.l2_bytes)
        stats, reasons = cuda_harness.sample(timer, calls, args.rounds, deadline)
    rate, copy = ceilings["matmul_tflops"][dtype], ceilings["copy_gbs"]
    flops = layer.flops * (3 if train else 1)
    results = {p.key: {**stats[p.key], "error": float(f"{errors[p.key]:.3g}")} for p in peers if p.key in stats}
    return {
        "label": str(layer), "layer": asdict(layer), "nets": " ".join(nets), "dtype": dtype, "train": train,
        "flops": flops,
        "bytes": layer.bytes(cuda_harness.DTYPES[dtype].itemsize) * (3 if train else 1), "copies": copies,
        "floor_us": round(cuda_harness.floor_us(layer, dtype, train, rate, copy), 3),
        "ceiling_gflops": {by: rate * 1e3 for by in ("median", "best", "graph")},
        "peers": results, "skipped": skipped | {f"{key} graph": reason for key, reason in reasons.items()},
    }  # fmt: skip


def measure(args: argparse.Namespace, timer: Timer | None = None) -> dict[str, Any]:
    """The whole run, as it goes into its file."""
    begin = time.monotonic()
    deadline = begin + args.budget if args.budget else math.inf
    timer = timer or CudaTimer()
    torch.backends.cudnn.benchmark = True
    data = describe_run(csv_results.settings(args))
    data["method"] = " ".join((cuda_harness.__doc__ or "").split("Method. ")[1].split())
    data["device"] = cuda_harness.gpu() if args.device.startswith("cuda") else {"name": args.device}
    args.l2_bytes = int(data["device"].get("l2_mib", 1) * 2**20)
    sizes = {} if args.device.startswith("cuda") else {"size": 64, "copy_bytes": 1 << 24}
    data["ceilings"] = cuda_harness.ceilings(timer, args.dtype, args.device, **sizes)
    peers, other_work = chosen_peers(args), OtherWork()
    data["results"], data["left_out"] = [], []
    work = plan(args)
    for i, item in enumerate(work):
        label = f"{item[0]} {item[2]} {'train' if item[3] else 'forward'}"
        if time.monotonic() > deadline:
            data["left_out"].append(label)
            continue
        print(f"[{time.monotonic() - begin:6.0f} s] {i + 1}/{len(work)} {label}", flush=True)
        try:
            data["results"].append(measure_layer(item, peers, args, data["ceilings"], timer, deadline))
        except torch.cuda.OutOfMemoryError as error:
            data["left_out"].append(f"{label}: {str(error).splitlines()[0]}")
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    data["other_work"] = round(other_work.share(), 3)
    data["seconds"] = round(time.monotonic() - begin, 1)
    return data


def report(data: dict[str, Any]) -> None:
    print(cuda_report.text(data))
