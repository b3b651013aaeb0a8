"""The CUDA benchmark's own logic, on the CPU with a clock instead of events: checks, budget, report, options."""

import json
import time

import pytest
import torch

from bench import cuda_harness, cuda_peers, cuda_report, cuda_tiles, op, op_cuda
from bench.harness import Layer


class Clock:
    """A cuda_harness.Timer that captures by keeping the calls."""

    def eager(self, calls):
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) * 1e6 / len(calls)

    def capture(self, calls):
        return calls

    def graph(self, captured, count):
        return self.eager(captured)


@pytest.fixture
def settings():
    """The run changes global settings of torch."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def run(monkeypatch, settings):
    layers = {Layer(1, 16, 8, 6, 5): ["a"], Layer(2, 8, 16, 7, 7, 2): ["b"]}
    monkeypatch.setattr(cuda_harness, "MAX_COPIES", 3)
    monkeypatch.setattr(op_cuda, "load_shapes", lambda nets, batches: layers)

    def measure(*options, peers=None):
        args = op.parse(["--device", "cuda", "--quick", *options])
        args.device, args.rounds = "cpu", 3
        if peers is not None:
            monkeypatch.setattr(cuda_peers, "PEERS", peers)
        return op_cuda.measure(args, Clock())

    return measure


def test_a_run_has_every_layer_dtype_and_direction(run):
    data = json.loads(json.dumps(run("--dtype", "float32", "bfloat16")))
    assert [(r["label"], r["dtype"], r["train"]) for r in data["results"]] == [
        (label, dtype, train)
        for label in ("1x 16->8 6x5", "2x 8->16 7x7 /2")
        for dtype in ("float32", "bfloat16")
        for train in (False, True)
    ]
    for result in data["results"]:
        assert {"ours NCHW", "ours NHWC", "stock NCHW", "stock NHWC"} <= set(result["peers"])
        assert ("linear NHWC" in result["peers"]) == (result["layer"]["stride"] == 1)
        assert ("addmm_relu NHWC" in result["skipped"]) == (result["train"] or result["layer"]["stride"] == 2)
        assert all(p["median_us"] > 0 and p["graph_us"] > 0 for p in result["peers"].values())
    text = cuda_report.text(data)
    rows = [line for line in text.splitlines() if line.startswith("1x 16->8 6x5") and " float32 " in line]
    assert len(rows) == 4 and "no gradient" in text and "left out" not in text


def test_a_spent_budget_names_what_it_left_out(run):
    data = run("--dtype", "float32", "--forward", "--budget", "0.000001")
    assert data["results"] == []
    assert data["left_out"] == ["1x 16->8 6x5 float32 forward", "2x 8->16 7x7 /2 float32 forward"]
    assert "left out (2)" in cuda_report.text(data)


def test_a_wrong_peer_is_not_timed_and_a_wrong_ours_ends_the_run(run):
    wrong = cuda_peers.Peer("wrong", "NCHW", lambda layer, dtype: lambda x, w, b: torch.relu(torch.conv2d(x, w)))
    args = ("--dtype", "float32", "--forward", "--layout", "NCHW")
    good = [p for p in cuda_peers.PEERS if p.name in ("ours", "stock")]
    with pytest.raises(AssertionError, match="ours NCHW"):
        run(*args, peers=[cuda_peers.Peer("ours", "NCHW", wrong.build), *good[2:]])
    linear = cuda_peers.Peer("linear", "NCHW", wrong.build)
    same_shape, other_shape = run(*args, peers=[*good, linear])["results"]  # it ignores the bias and the stride
    assert "linear NCHW" not in {*same_shape["peers"], *other_shape["peers"]}
    assert same_shape["skipped"]["linear NCHW"].startswith("wrong: relative errors")
    assert other_shape["skipped"]["linear NCHW"].startswith("AssertionError: shapes")


def test_a_candidate_that_cannot_be_captured_is_still_timed():
    class NoGraphs(Clock):
        def capture(self, calls):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    stats, reasons = cuda_harness.sample(NoGraphs(), {"a": [lambda: None] * 3}, 3)
    assert "graph_us" not in stats["a"] and stats["a"]["rounds"] == 3 and stats["a"]["inner"] == 3
    assert reasons == {"a": "no CUDA graph: operation not permitted when stream is capturing"}


def test_copies_exceed_the_cache():
    l2 = 50 << 20
    for size in (1, 1000, 1 << 20, 30 << 20, 1 << 30):
        count = cuda_harness.copies_for(size, l2)
        assert count == cuda_harness.MAX_COPIES or (count >= 2 and count * size >= 2 * l2)
    assert cuda_harness.copies_for(1 << 30, l2) == 2 and cuda_harness.copies_for(1, l2) == cuda_harness.MAX_COPIES


def test_floor_is_the_slower_of_arithmetic_and_traffic():
    layer = Layer(1, 1000, 1000, 10, 10)  # 2e8 operations; 1.2e6 elements
    assert cuda_harness.floor_us(layer, "float32", False, tflops=1, copy_gbs=1e9) == pytest.approx(200)
    assert cuda_harness.floor_us(layer, "float32", False, tflops=1e9, copy_gbs=1) == pytest.approx(4800)
    assert cuda_harness.floor_us(layer, "bfloat16", True, tflops=1e9, copy_gbs=1) == pytest.approx(7200)


def test_losses_are_marked_and_named():
    peers = {
        f"{name} NCHW": {"name": name, "layout": "NCHW", "median_us": us, "graph_us": us / 2}
        for name, us in (("ours", 10.0), ("stock", 20.0), ("linear", 8.0))
    }
    result = {
        "label": "the layer", "dtype": "float16", "train": False, "floor_us": 2.5, "peers": peers, "skipped": {},
    }  # fmt: skip
    assert cuda_report.compare(result, "NCHW", "median_us") == (10.0, 2.0, 0.8, "linear")
    assert cuda_report.compare(result, "NHWC", "median_us") is None
    data = {
        "results": [result], "left_out": [], "other_work": 0, "device": {"name": "a GPU"}, "versions": {"torch": "1"},
        "ceilings": {"matmul_tflops": {"float16": 1.0}, "copy_gbs": 1.0},
    }  # fmt: skip
    text = cuda_report.text(data)
    assert "0.80!" in text and "2.00 " in text
    assert "0.80x best peer (geometric mean of 1), worst 0.80x on the layer; slower on 1: the layer (0.80, " in text
    row = next(line for line in text.splitlines() if line.startswith("the layer"))
    assert row.split()[-1] == "50"  # the floor, of the graph's 5 us


@pytest.mark.parametrize(
    "options,message",
    [
        (["--device", "cuda", "--dtype", "float64"], "--dtype: expected some of float32, tf32"),
        (["--dtype", "tf32"], "--dtype: expected some of float32, float64, bfloat16, float16 on cpu, got tf32"),
        (["--device", "cuda", "--peers", "onnxruntime"], "--peers: expected some of ours, stock, cudnn_fused"),
        (["--budget", "5"], "--budget: not with --device cpu"),
        (["--device", "cuda", "--markdown"], "--markdown: not with --device cuda"),
    ],
)
def test_options_of_the_other_device(options, message, capsys):
    with pytest.raises(SystemExit):
        op.parse(options)
    assert message in capsys.readouterr().err


def test_the_sweep_of_tiles_needs_a_library_for_it():
    with pytest.raises(SystemExit, match="CONV1X1_TUNING=1"):
        cuda_tiles.tune()


def test_fit_finds_a_model_that_chooses_well():
    """Of two choices a problem, the better one depends on a threshold, which is the model's only constant here."""
    times = [{"large/1": 10.0 + i, "small/1": 20.0} for i in range(20)]

    def choose(model):
        return ["large/1" if i < model[0] else "small/1" for i in range(20)]

    start = [2.0] + [1.0] * 13
    score, model = cuda_tiles.fit(start, choose, times, seconds=0.3)
    assert score < cuda_tiles.regret(choose(start), times) / 4 and 8 < model[0] < 13
    assert cuda_tiles.regret(["not timed"] * 20, times) == cuda_tiles.regret(
        ["small/1" if i < 10 else "large/1" for i in range(20)], times
    )
    assert cuda_tiles.text_of(list(range(14))) == "{{{0, 4}, {1, 5}, {2, 6}, {3, 7}}, 8, 9, 10, 11, 12, 13}"
