"""The runner: plants each mutant of the lists, runs the tests named for it, and tells what became of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import SimpleQueue

from . import lists, tree
from .mutant import ISA_FLAGS, Mutant, Stale, digest

SECONDS = 90  # of the tests named for a mutant, what they import included; without the fault, of half of it
FULL_SECONDS = 30 * 60
LEAST_CAUGHT = 0.95
MEMORY = 12 << 30
SEED = "20231117"  # of the tests' random inputs: the same fault meets the same tests


@dataclass
class Result:
    name: str
    key: str
    outcome: str  # caught, survived, error, or not here
    by: str = ""
    seconds: float = 0
    build_seconds: float = 0
    full: str = ""  # what the whole suite said of a survivor: caught, survived


@dataclass(frozen=True)
class Run:
    """What a run of pytest came to: passed, failed, or nothing (nothing was run)."""

    outcome: str
    by: str
    seconds: float


def run_pytest(
    job: tree.Job, arguments: Sequence[str], environment: dict[str, str], seconds: float, limited: bool = True
) -> Run:
    """In a process whose faults cannot take the machine's memory, and whose children end with it."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments]  # -q: pyproject.toml
    begin = time.monotonic()
    process = subprocess.Popen(
        command, cwd=job.copy, env={**environment, "CONV1X1_TEST_SEED": SEED}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if limited and "sanitizers" not in " ".join(arguments):  # which reserve what they do not use
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        output = None
    finally:
        if process.poll() is None:  # and the processes that its tests have started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Run(*_told(process.returncode, output), time.monotonic() - begin)


def named_tests(job: tree.Job, mutant: Mutant, environment: dict[str, str], seconds: float) -> Run:
    spent = 0.0
    for test in mutant.tests:
        file, *rest = shlex.split(test)
        run = run_pytest(job, [f"tests/{file}", *rest], environment, max(seconds - spent, 1))
        spent += run.seconds
        if run.outcome != "passed":
            return Run(run.outcome, run.by, spent)
    return Run("passed", "", spent)


def _told(status: int, output: str | None) -> tuple[str, str]:
    """Outcome and reason of a pytest that ended with this status; no output: it was ended."""
    if output is None:
        return "failed", "timeout"
    if status < 0:
        return "failed", f"crash ({signal.Signals(-status).name})"
    found = re.search(r"^(?:FAILED|ERROR) (\S+?\[.*?\](?= - |$)|\S+)", output, re.MULTILINE)
    if status == 1:
        return "failed", found.group(1).removeprefix("tests/") if found else "a failure without a name"
    if status == 0 and re.search(r"\b\d+ passed", output):
        return "passed", ""
    if status in (0, 5):
        return "nothing", "no test was run"
    return "nothing", f"pytest ended with {status}: {' '.join(output.strip().splitlines()[-1:])}"


class Records:
    """Results as lines of JSON: a run that was ended goes on where it was."""

    def __init__(self, fresh: bool) -> None:
        self.path = tree.BUILD / "results.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        if fresh:
            self.path.unlink(missing_ok=True)
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # cut off
                continue
        self.results = {r["key"]: Result(**r) for r in found if "key" in r}
        self.baselines = {r["baseline"]: "" for r in found if "baseline" in r}

    def add(self, line: dict) -> None:
        with self.lock, open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


class Session:
    """What all mutants of a run share."""

    def __init__(self, names: list[str], seconds: float, fresh: bool) -> None:
        self.names, self.seconds = names, seconds
        self.tree = tree.tree_hash(names)
        self.records = Records(fresh)
        self.flags = tree.cpu_flags()

    def key(self, mutant: Mutant) -> str:
        """What a result is kept by: the fault, the sources, and the files of the tests named for it."""
        return mutant.key(self._tree_of(mutant))

    def _tree_of(self, mutant: Mutant) -> str:
        return digest(self.tree, [(name, (tree.ROOT / name).read_bytes()) for name in tree.test_files(mutant)])

    def here(self, mutant: Mutant) -> bool:
        return mutant.isa is None or ISA_FLAGS[mutant.isa] <= self.flags

    def baseline(self, job: tree.Job, mutant: Mutant) -> str:
        """What is wrong with a mutant's tests where nothing is planted; empty if they pass, or they would prove
        nothing."""
        key = digest(self._tree_of(mutant), mutant.tests, mutant.isa)
        known = self.records.baselines
        if key not in known:
            run = named_tests(job, mutant, job.environment_of(mutant), self.seconds)
            known[key] = "" if run.outcome == "passed" else f"without it: {run.by}"
            if not known[key] and run.seconds > self.seconds / 2:  # or a slower machine would call any fault caught
                known[key] = f"its tests take {run.seconds:.0f} s without it: name fewer"
            if not known[key]:
                self.records.add({"baseline": key, "seconds": round(run.seconds, 1)})
        return known[key]

    def run(self, job: tree.Job, mutant: Mutant) -> Result:
        result = Result(mutant.name, self.key(mutant), "error")
        try:
            result.by = self.baseline(job, mutant)
            if result.by:
                return result
            begin = time.monotonic()
            with job.planted(mutant):
                environment = job.environment_of(mutant)
                result.build_seconds = round(time.monotonic() - begin, 1)
                run = named_tests(job, mutant, environment, self.seconds)
        except (Stale, tree.BuildFailed) as error:
            result.by = str(error)
            return result
        result.seconds = round(run.seconds, 1)
        result.outcome = {"passed": "survived", "failed": "caught"}.get(run.outcome, "error")
        result.by = run.by
        return result

    def run_full(self, job: tree.Job, mutant: Mutant) -> str:
        """What the whole suite says of a survivor. The list of mutants knows that it does not fit: it is left out."""
        workers = os.cpu_count() or 1
        spread = ["-n", str(workers)] if workers > 1 else []
        with job.planted(mutant):
            ignored = ["--ignore=tests/test_mutants.py"]
            run = run_pytest(job, ["tests", *ignored, *spread], job.environment, FULL_SECONDS, limited=False)
        return {"passed": "survived", "failed": f"caught by {run.by}"}.get(run.outcome, run.by)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__)
    parser.add_argument("--list", action="store_true", help="names, files and tests; runs nothing")
    parser.add_argument("--only", action="append", metavar="NAME", help="this one, or all whose name begins so")
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree that work at once (2)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for a mutant's tests ({SECONDS})")
    parser.add_argument("--no-full", action="store_true", help="do not run the whole suite against survivors")
    return parser.parse_args()


def chosen(only: list[str] | None) -> list[Mutant]:
    found = [m for m in lists.MUTANTS if not only or any(m.name.startswith(name) for name in only)]
    if not found:
        raise SystemExit(f"mutants: none is named {', '.join(only or [])}")
    return found


def main() -> int:
    options = arguments()
    mutants = chosen(options.only)
    if options.list:
        for m in mutants:
            print(f"{m.name:<48} {m.file:<44} {'; '.join(m.tests)}")
        print(f"{len(mutants)} mutants")
        return 0
    sys.path.insert(0, str(tree.ROOT))
    session = Session(tree.files(), options.seconds, options.fresh)
    known = session.records.results
    todo = [m for m in mutants if session.key(m) not in known and session.here(m)]
    print(f"{len(mutants)} mutants, {len(todo)} to run; seed {SEED}; results in {session.records.path}", flush=True)
    tree.link_objects(tree.ROOT / "build" / "objects", tree.OBJECTS)
    count = max(1, min(options.jobs, len(todo)))
    jobs: SimpleQueue[tree.Job] = SimpleQueue()
    first = tree.Job(0, session.names)  # which compiles what the others then find
    jobs.put(first)
    for number in range(1, count):
        jobs.put(tree.Job(number, session.names))

    def work(mutant: Mutant) -> None:
        job = jobs.get()
        try:
            result = session.run(job, mutant)
        finally:
            jobs.put(job)
        known[result.key] = result
        if result.outcome != "error":  # which is to be mended, and then run again
            session.records.add(asdict(result))
        line = f"{result.outcome:<9} {result.name:<48} {result.by.splitlines()[0] if result.by else ''}"
        print(f"{line}  ({result.build_seconds:.0f} + {result.seconds:.0f} s)", flush=True)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, todo))

    results = [known.get(session.key(m), Result(m.name, "", "not here")) for m in mutants]
    if not options.no_full:
        for m, result in zip(mutants, results, strict=True):
            if result.outcome == "survived" and not result.full:
                print(f"the whole suite against {m.name}", flush=True)
                result.full = session.run_full(first, m)
                session.records.add(asdict(result))
    return report(mutants, results)


def report(mutants: list[Mutant], results: list[Result]) -> int:
    width = min(100, shutil.get_terminal_size((120, 0)).columns - 60)
    print(f"\n{'':<9} {'mutant':<48} {'seconds':>7}  by")
    for result in results:
        by = (result.by.splitlines() or [""])[0]
        if result.full:
            by += f"the whole suite: {result.full}"
        print(f"{result.outcome:<9} {result.name:<48} {result.build_seconds + result.seconds:>7.0f}  {by[:width]}")
    run = [r for r in results if r.outcome in ("caught", "survived")]
    caught = [r for r in run if r.outcome == "caught" or r.full.startswith("caught")]
    ways = {"timeout": 0, "crash": 0}
    for r in caught:
        for way in ways:
            ways[way] += r.by.startswith(way)
    told = ", ".join(f"{n} by {way}" for way, n in ways.items())
    print(f"\ncaught {len(caught)} of {len(run)} ({told}); {sum(r.outcome == 'not here' for r in results)} not here")
    good = True
    for m, result in zip(mutants, results, strict=True):
        if result.outcome == "error":
            print(f"\nerror: {m.name}: {result.by}")
            good = False
        elif result in run and result not in caught:
            print(f"survived: {m.name}: {m.equivalent or 'NO REASON IS GIVEN'}")
            good = good and bool(m.equivalent)
        elif result in caught and m.equivalent:
            print(f"caught, though its list says: {m.name}: {m.equivalent}")
        if result in caught and result.outcome == "survived":
            print(f"only the whole suite caught it: {m.name}: name that test for it")
    if run and len(caught) < LEAST_CAUGHT * len(run):
        print(f"fewer than {LEAST_CAUGHT:.0%} are caught")
        good = False
    return 0 if good else 1
