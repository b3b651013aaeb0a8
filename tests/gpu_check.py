"""Everything that needs a GPU, in one command of at most ten minutes: ``python tests/gpu_check.py`` (make gpu-check).

Needs a GPU, nvcc, torch with CUDA, pytest; installs and downloads nothing. Steps: build in place for the visible GPU;
the PTX wrappers against the hardware; the suite on the GPU and, beside it, compute-sanitizer's tools; alone again, as
it measures, the operator benchmark. Each has a time limit, and one that fails does not stop the next, except that
nothing runs without a build. --out gets gpu_check.json, a log of each step and the benchmark's own JSON. Exit status:
0 if every step passed, 1 if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from cuda_toolkit import find_nvcc, find_sanitizer  # noqa: E402

# Collected, but not here: all of it is the CPU's or needs no GPU, or the step before ran it.
NOT_HERE = (
    "test_amx", "test_bench", "test_determinism", "test_groups", "test_isa", "test_microkernels", "test_packed_weight",
    "test_parts", "test_prepack", "test_cuda_build", "test_cuda_emulated", "test_cuda_on_cpu_shim", "test_gpu_check",
    "test_cuda_ptx", "test_covering", "test_freeze", "test_object_cache", "test_mutants", "test_sources",
    "test_autocast", "test_packed_code", "test_shared",
)  # fmt: skip
# The longest first, so that no process is left with one at the end.
LONGEST = ("test_cuda", "test_operator", "test_fprop", "test_strides", "test_wgrad", "test_avg_pool", "test_dgrad")
# Files that several processes share, so that no part lasts longer than test_cuda. Not test_cuda itself: its tensors of
# more than 2^31 elements would meet on the GPU.
PARTS = {"test_operator": 4, "test_fprop": 2, "test_strides": 2}
NO_TESTS = "failed (exit status 5)"
SANITIZER = ("memcheck", "racecheck", "synccheck", "initcheck")


def run_limited(command: Sequence[str | Path], limit: float, log: Path, env: Mapping[str, str] | None = None) -> str:
    """Runs a command in the repository's root, its output into ``log``; its whole process group dies at the limit.

    Returns:
        "passed", "failed (exit status N)" or "timed out after N s".
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        out.write(f"$ {' '.join(map(str, command))}\n")
        out.flush()
        process = subprocess.Popen(
            [str(c) for c in command], cwd=ROOT, env={**os.environ, **(env or {})}, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"timed out after {limit:.0f} s"
    return "passed" if code == 0 else f"failed (exit status {code})"


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, the reasons of the skips, and the failures with their first lines, of one pytest run."""
    counts: collections.Counter[str] = collections.Counter()
    skips: collections.Counter[str] = collections.Counter()
    failures = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "message": (problem.get("message") or "")[:500]})
        elif skipped is not None:
            counts["skipped"] += 1
            skips[skipped.get("message") or ""] += 1
        else:
            counts["passed"] += 1
    return {"counts": dict(counts), "skips": dict(skips), "failures": failures}


def suite_files(tests: Path = ROOT / "tests") -> list[Path]:
    """The files to run on the GPU, the longest first."""
    files = [p for p in tests.glob("test_*.py") if p.stem not in NOT_HERE]
    return sorted(files, key=lambda p: (LONGEST.index(p.stem) if p.stem in LONGEST else len(LONGEST), p.stem))


def joined(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of a file's parts as the file's: seconds are the longest's."""
    bad = [r["status"] for r in results if r["status"] != "passed"]
    whole: dict[str, Any] = {"status": ", ".join(dict.fromkeys(bad)) or "passed"}
    seconds = [r["seconds"] for r in results if "seconds" in r]
    if seconds:
        whole["seconds"] = max(seconds)
    for key in ("counts", "skips"):
        found = [collections.Counter(r[key]) for r in results if key in r]
        if found:
            whole[key] = dict(sum(found, collections.Counter()))
    if any("failures" in r for r in results):
        whole["failures"] = [f for r in results for f in r.get("failures", [])]
    return whole


def run_suite(
    files: Sequence[Path],
    workers: int,
    limit: float,
    out: Path,
    env: Mapping[str, str] | None = None,
    parts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """``workers`` plain pytest processes, a file each at a time: no plugin needed, and a crash costs one file.

    ``parts`` names the files that several processes share (tests/conftest.py says how); they collect the same tests by
    having the same seed.
    """
    seed = os.environ.get("CONV1X1_TEST_SEED") or str(random.SystemRandom().randrange(1 << 31))
    deadline = time.monotonic() + limit
    waiting: queue.SimpleQueue[tuple[Path, int, int]] = queue.SimpleQueue()
    found: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        count = (parts or {}).get(path.stem, 1)
        found[path.stem] = [{} for _ in range(count)]
        for part in range(count):
            waiting.put((path, part, count))

    def run_part(path: Path, part: int, count: int) -> dict[str, Any]:
        left = deadline - time.monotonic()
        if left < 5:
            return {"status": "not run: no time was left"}
        name = path.stem if count == 1 else f"{path.stem}-{part + 1}"
        junit, log = out / f"{name}.xml", out / "tests" / f"{name}.log"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", f"--junitxml={junit}", path]
        begin = time.monotonic()
        shared = {"CONV1X1_TEST_SEED": seed, "CONV1X1_TEST_PART": f"{part + 1}/{count}"}
        status = run_limited(command, left, log, {**(env or {}), **shared})
        result = {"status": status, "seconds": round(time.monotonic() - begin, 1)}
        if status == NO_TESTS:  # a whole file skipped; the reason is in its results
            result["status"] = "passed"
        if junit.exists():
            result |= read_junit(junit)
            junit.unlink()
        return result

    def work() -> None:
        while True:
            try:
                path, part, count = waiting.get_nowait()
            except queue.Empty:
                return
            found[path.stem][part] = run_part(path, part, count)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = {name: joined(of_parts) for name, of_parts in found.items()}
    totals: collections.Counter[str] = collections.Counter()
    for result in results.values():
        totals.update(result.get("counts", {}))
    bad = {name: r["status"] for name, r in results.items() if r["status"] != "passed"}
    status = "passed" if not bad else "failed: " + "; ".join(f"{name} {what}" for name, what in sorted(bad.items()))
    return {"status": status, "counts": dict(totals), "files": dict(sorted(results.items()))}


class Check:
    """The steps' results as they come, and the time that is left."""

    def __init__(self, out: Path, budget: float, facts: Mapping[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self._deadline = time.monotonic() + budget
        self._lock = threading.Lock()
        self._logs = itertools.count()
        self.data: dict[str, Any] = {**facts, "budget_s": budget, "steps": {}}

    def left(self) -> float:
        return self._deadline - time.monotonic()

    def step(self, name: str, limit: float, run: Callable[[float], Mapping[str, Any]]) -> bool:
        """Runs a step with its limit in seconds, less where less is left; writes the JSON after each."""
        limit = min(limit, self.left())
        with self._lock:
            print(f"{name}: at most {limit:.0f} s ...", flush=True)
        begin = time.monotonic()
        result: Mapping[str, Any]
        if limit < 5:
            result = {"status": "not run: no time was left"}
        else:
            try:
                result = run(limit)
            except Exception as error:
                result = {"status": f"failed: {type(error).__name__}: {error}"}
        entry = {**result, "seconds": round(time.monotonic() - begin, 1), "limit_s": round(limit, 1)}
        with self._lock:
            self.data["steps"][name] = entry
            (self.out / "gpu_check.json").write_text(json.dumps(self.data, indent=1) + "\n")
            print(f"{name}: {entry['status']} in {entry['seconds']} s", flush=True)
        return bool(entry["status"] == "passed")

    def side_by_side(self, steps: Sequence[tuple[str, float, Callable[[float], Mapping[str, Any]]]]) -> None:
        """Runs steps, each as step() would, at the same time; the JSON has them in the order given."""
        for name, _, _ in steps:
            self.data["steps"][name] = {"status": "not finished"}
        threads = [threading.Thread(target=self.step, args=step) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def command(self, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Callable[[float], Any]:
        """A step that is one command; its log's tail is kept where it failed."""

        def run(limit: float) -> dict[str, Any]:
            log = self.out / f"{next(self._logs):02d}.log"
            status = run_limited(command, limit, log, env)
            tail = [] if status == "passed" else log.read_text(errors="replace").splitlines()[-30:]
            return {"status": status, "log": log.name, **({"tail": tail} if tail else {})}

        return run

    def failed(self) -> list[str]:
        return [name for name, entry in self.data["steps"].items() if entry["status"] != "passed"]

    def summary(self) -> str:
        lines = ["", *(f"{e['seconds']:7.1f} s  {name:<22} {e['status']}" for name, e in self.data["steps"].items())]
        for name, entry in self.data["steps"].items():
            if "counts" in entry:
                lines.append(f"{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(entry["counts"].items())))
            for file in entry.get("files", {}).values():
                lines += [f"  FAILED {f['test']}: {f['message'][:150]}" for f in file.get("failures", [])[:5]]
            lines += [f"  {line}" for line in entry.get("tail", [])[-8:]]
        failed = self.failed()
        lines.append("every step passed" if not failed else f"{len(failed)} steps did not pass: {', '.join(failed)}")
        return "\n".join(lines)


def benchmark(check: Check, seconds: float) -> Callable[[float], dict[str, Any]]:
    """bench.op over a budget; its JSON's rows come into ours, and its table into the log."""

    def run(limit: float) -> dict[str, Any]:
        rows = check.out / "bench.json"
        budget = min(seconds, limit - 20)
        options = ["--device", "cuda", "--quick", "--budget", f"{budget:.0f}", "--json", rows]
        result: dict[str, Any] = check.command([sys.executable, "-m", "bench.op", *options])(limit)
        if rows.exists():
            result["bench"] = json.loads(rows.read_text())
        return result

    return run


def describe() -> dict[str, Any]:
    """Device, driver and versions. Imports nothing of ours: there may be no library yet."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = f"nvidia-smi: {error}"
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": properties.name if properties else "none",
        "capability": f"{properties.major}.{properties.minor}" if properties else "none",
        "nvidia_smi": smi,
        "versions": {
            "python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "nvcc": version.strip().splitlines()[-1] if version else "missing",
        },
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_check")
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything")
    parser.add_argument("--bench-seconds", type=float, default=90)
    parser.add_argument("--workers", type=int, default=max(2, min(12, (os.cpu_count() or 4) // 2)), help="of the suite")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="STEP", help="build, ptx, suite, a sanitizer's tool, bench"
    )
    args = parser.parse_args(argv)
    facts = describe()
    print(json.dumps(facts, indent=1), flush=True)
    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} finds no GPU; this command needs one", file=sys.stderr)
        return 2
    check = Check(args.out.resolve(), args.budget, facts)
    python = sys.executable
    if "build" not in args.skip:
        environment = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": facts["capability"]}
        build = check.command([python, "setup.py", "build_ext", "--inplace"], environment)
        if find_nvcc() is None:
            build = lambda limit: {"status": "failed: no nvcc; set CUDA_HOME"}  # noqa: E731
        if not check.step("build", 240, build):
            print(check.summary())
            return 1
    info = [
        python,
        "-c",
        "import conv1x1_ext as c; i = c.build_info(); print(i); exit(i['cuda_archs'].startswith('none'))",
    ]
    check.step("library has CUDA", 60, check.command(info))
    if "ptx" not in args.skip:
        check.step("ptx", 60, check.command([python, "-m", "pytest", "-q", "-rs", "tests/test_cuda_ptx.py"]))
    # None of these measures time, and none keeps the GPU busy by itself.
    beside: list[tuple[str, float, Callable[[float], Mapping[str, Any]]]] = []
    if "suite" not in args.skip:
        threads = max(1, (os.cpu_count() or 4) // args.workers)  # of the float64 reference on the CPU
        env = {"CONV1X1_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": str(threads)}
        parts = {name: min(count, max(1, args.workers // 2)) for name, count in PARTS.items()}
        suite = lambda limit: run_suite(suite_files(), args.workers, limit, check.out, env, parts)  # noqa: E731
        beside.append(("suite", 240, suite))
    sanitizer = find_sanitizer()
    for tool in (t for t in SANITIZER if t not in args.skip):
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", "9", python, "tests/cuda_sanitizer_cases.py"]
        run = check.command(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"})
        if sanitizer is None:
            run = lambda limit: {"status": "failed: no compute-sanitizer in the CUDA toolkit"}  # noqa: E731
        beside.append((tool, 240, run))
    check.side_by_side(beside)
    if "bench" not in args.skip:
        check.step("bench", args.bench_seconds + 60, benchmark(check, args.bench_seconds))
    print(check.summary())
    return 1 if check.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
