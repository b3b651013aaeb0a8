"""The benchmarks' own arithmetic; their results as files, and the tables that the README and the docs make of them."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

sys.path.insert(0, str(ROOT))
from bench import blocks, csv_results, harness, microkernel, op, peers, readme, scaling, small_calls
from bench.harness import NETS, Layer, load_shapes

pytestmark = pytest.mark.cpu_only(reason="the CPU's benchmarks")
FILES = sorted((ROOT / "bench" / "results").glob("*/*.csv"))
COMMANDS = {"blocks": blocks, "scaling": scaling, "small_calls": small_calls, "microkernel": microkernel}


def test_every_shape_file_is_read():
    for net in NETS:
        for layer in load_shapes([net], [2]):
            assert layer.n == 2 and layer.c_in % layer.groups == layer.c_out % layer.groups == 0
    grouped = Layer(1, 60, 240, 28, 28, 1, 3)
    assert grouped in load_shapes(["shufflenet"], [1]) and str(grouped) == "1x 60->240 28x28 g3"
    assert grouped.flops == 2 * 28 * 28 * 240 * 20
    assert grouped.bytes(4) == 4 * (28 * 28 * (60 + 240) + 240 * 20)


@pytest.mark.parametrize("stride,groups", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_the_reference_is_the_convolution(stride, groups):
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 6, 5, 4), (9, 6 // groups, 1, 1), (9,)))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = F.relu(F.conv2d(x, w, b, stride, groups=groups))
    dy = torch.randn_like(y)
    expected = [y, *torch.autograd.grad(y, leaves, dy)]
    found = peers.products(*(t.detach() for t in leaves), dy, stride, groups)
    torch.testing.assert_close(list(found), expected)


@pytest.mark.parametrize("train", [False, True])
def test_peers_agree_on_a_grouped_layer(train):
    """Preparing compares every candidate with the reference."""
    case = peers.Case(Layer(2, 12, 18, 6, 5, 1, 3), "float32", torch.get_num_threads())
    chosen = [p for p in (peers.TRAIN if train else peers.FORWARD) if p.name not in ("compile", "onnxruntime")]
    with torch.inference_mode(not train):
        calls, _, skipped = op.prepare(case, chosen, train)
    assert {"ours NCHW", "ours NHWC", "stock NCHW", "stock NHWC"} <= set(calls)
    assert "linear NHWC" in skipped and not any(s.startswith("wrong") for s in skipped.values())


@pytest.mark.parametrize("layout", peers.LAYOUTS)
def test_blocks_are_checked_before_they_are_timed(layout):
    threads = torch.get_num_threads()
    first, second = (peers.Case(Layer(3, c, 8, 5, 4), "float32", threads) for c in (6, 8))
    assert set(blocks.pool_calls(first, layout, True)) == set(blocks.POOLS)
    assert set(blocks.pair_calls(first, second, layout)) == {"ours", "stock", "pieces"}


def test_compute_bound_layers():
    chosen = scaling.compute_bound(["seed", "resnet50"], [16], "float32", 40)
    assert Layer(16, 512, 512, 12, 12) in chosen and Layer(16, 8, 8, 7, 7) not in chosen


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_command_begins_anew_with_kept_pages():
    code = "import sys; from bench.harness import keep_pages, pages; keep_pages(); print(pages(), sys.argv[1:])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", code, "--rounds", "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "kept by malloc ['--rounds', '3']"


def test_a_file_gives_back_what_was_written(tmp_path):
    data = {
        "commit": "0123abc+changes",
        "machine": {"cpu": "a, b: # c", "caches": {"L1d": "32K"}, "flags": []},
        "results": [
            {"label": "1x 8->8 7x7", "train": False, "n": 1, "rate": 1.0, "peers": {"ours NCHW": {"error": 1.5e-07}}},
            {"label": 'quoted "words", and a comma', "text": "16", "empty": "", "none": None, "skipped": {}},
            {"label": "two\nlines", "list": [1, 2], "skipped": {"linear NHWC": "stride 1 only"}, "true": "true"},
        ],
        "other_work": 0.25,
    }
    csv_results.write(tmp_path / "new" / "run.csv", data)
    found = csv_results.read(tmp_path / "new" / "run.csv")
    assert found == data
    assert [type(v) for v in found["results"][0].values()] == [type(v) for v in data["results"][0].values()]
    lines = (tmp_path / "new" / "run.csv").read_text().splitlines()
    assert lines[0] == '# commit: "0123abc+changes"' and lines[3].startswith(
        "label,train,n,rate,peers/ours NCHW/error,"
    )


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'a/b': a key with '/'"):
        csv_results.write(tmp_path / "x.csv", {"results": [{"a/b": 1}]})
    (tmp_path / "empty.csv").write_text('# commit: "1"\n')
    with pytest.raises(ValueError, match="no table"):
        csv_results.read(tmp_path / "empty.csv")


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_kept_run_says_where_it_is_from_and_is_reported(path, capsys, tmp_path):
    data = csv_results.read(path)
    assert re.match(r"[0-9a-f]{7}", data["commit"]) and re.match(r"20\d\d-\d\d-\d\d", data["date"])
    assert data["machine"]["cpu"] and data["versions"]["torch"]
    command = COMMANDS.get(path.stem.removeprefix("cpu_"), op)
    device = ["--device", "cuda"] if path.stem.startswith("cuda") else []
    command.main(
        [*device, "--from-csv", str(path), "--csv", str(tmp_path / "again.csv"), "--json", str(tmp_path / "j")]
    )
    printed = capsys.readouterr().out
    entries = data["results"]
    named = [e.get("label") or e.get("kernel") or str(e.get("c_in", e.get("layer", {}).get("c_in"))) for e in entries]
    assert all(name in printed for name in named)
    assert (tmp_path / "again.csv").read_text() == path.read_text()
    assert json.loads((tmp_path / "j").read_text()) == data


def test_results_stay_small():
    sizes = {p: p.stat().st_size for p in (ROOT / "bench" / "results").rglob("*") if p.is_file()}
    assert sum(sizes.values()) < 1 << 20, sizes


def test_every_table_is_up_to_date():
    assert readme.main(["--check"]) == 0
    for path in readme.FILES:
        for line in path.read_text().splitlines():
            assert not line.startswith("<!-- bench:") or line.split(":")[1].split()[0] in readme.TABLES


def test_a_stale_table_is_told_and_written(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- bench:gain -->\n(.*?)<!-- /bench:gain -->", text, re.DOTALL)[1]
    for stale in (text.replace(table, ""), re.sub(r"\d\.\d\d \(", "9.99 (", text, count=1)):
        assert stale != text
        path = tmp_path / "README.md"
        path.write_text(stale)
        monkeypatch.setattr(readme, "FILES", [path])
        monkeypatch.setattr(readme, "ROOT", tmp_path)
        assert readme.main(["--check"]) == 1 and "not up to date: README.md" in capsys.readouterr().out
        assert path.read_text() == stale
        assert readme.main([]) == 0 and path.read_text() == text


@pytest.mark.parametrize(
    "text,message",
    [
        ("<!-- bench:nothing -->\n<!-- /bench:nothing -->", "bench:nothing: no such table"),
        ("<!-- bench:gain -->\n", "without its end"),
        ("<!-- bench:gain -->\n<!-- /bench:losses -->", "without its end"),
    ],
)
def test_wrong_markers(text, message):
    with pytest.raises(ValueError, match=message):
        readme.regenerate(text)


def test_a_table_says_machine_commit_and_date(tmp_path, monkeypatch):
    """And its figures are those of the file: the mean of 2 and 8, of which the worst is 2."""
    results = [
        {
            "label": f"16x {c}->8 7x7", "layer": {"n": 16}, "nets": "seed", "dtype": "float32",
            "flops": 1e6, "bytes": 1e4, "ceiling_gflops": {"median": 100.0, "best": 100.0}, "skipped": {},
            "peers": {
                "ours NCHW": {"median_us": 1.0}, "stock NCHW": {"median_us": us}, "onednn NCHW": {"median_us": 0.5},
            },
        }
        for c, us in ((4, 2.0), (5, 8.0))
    ]  # fmt: skip
    data = {
        "commit": "89abcde", "date": "2027-01-02T03:04:05",
        "machine": {"cpu": "A CPU", "family-model-stepping": "1-2-3"},
        "versions": {"torch": "2.13.0"}, "arguments": {"train": False, "threads": 3}, "results": results,
        "other_work": 0.25,
    }  # fmt: skip
    csv_results.write(tmp_path / "epyc" / "cpu_fprop.csv", data)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    readme.load.cache_clear()
    try:
        text, losses = readme.summary("epyc"), readme.slower("epyc")
    finally:
        readme.load.cache_clear()
    row = "| forward, N=16, float32 NCHW | 4.00, worst 2.00 (4->8 7x7), 2 of 2 | 0.50, worst 0.50 (4->8 7x7), 0 of 2 |"
    assert row in text.splitlines()
    source = " ".join(text.splitlines()[-2:])
    assert "A CPU 1-2-3, 3 threads, torch 2.13.0; commit 89abcde, 2027-01-02, while other processes used 25%" in source
    assert "another peer alone on 2 of 2: 4->8 7x7 NCHW (onednn, 0.50), 5->8 7x7 NCHW (onednn, 0.50)." in " ".join(
        losses.split()
    )


def test_a_new_run_records_its_commit(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(harness, "SHAPES", tmp_path / "bench" / "shapes")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert harness.commit() == "unknown"
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    short = git("rev-parse", "--short", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert harness.commit() == short
    (tmp_path / "file").write_text("2")
    assert harness.commit() == f"{short}+changes"
    assert harness.describe_run({})["commit"] == f"{short}+changes"


def test_links_in_the_docs_lead_somewhere():
    """To files of this tree, and to headings as GitHub names them."""

    def anchors(path):
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}

    pages = [*readme.FILES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert len(links) > 10
    for page, link in links:
        if "://" not in link:
            target, _, anchor = link.partition("#")
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {link}"


def test_pinned_linters_agree():
    """pre-commit's environments get what the extra "lint" pins."""
    pins = dict(
        re.findall(r'"([\w-]+)==([\d.]+)"', re.search(r"^lint = .*$", (ROOT / "pyproject.toml").read_text(), re.M)[0])
    )
    hooks = re.findall(r"([\w-]+)==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and all(pins[name] == version for name, version in hooks)
