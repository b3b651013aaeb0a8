"""gpu_check's own logic, without a GPU: failing, crashing and endless steps, the suite's results, JSON, exit code."""

import json
import re
import shutil
import sys
import time

import gpu_check
import pytest
import torch
from gpu_check import Check, read_junit, run_limited, run_suite, suite_files

FACTS = {"device": "none"}


def python(code):
    return [sys.executable, "-c", code]


def test_a_failing_step_does_not_stop_the_next(tmp_path):
    check = Check(tmp_path, 60, FACTS)
    assert check.step("good", 20, check.command(python("print('fine')")))
    assert not check.step("bad", 20, check.command(python("print('the reason'); raise SystemExit(3)")))
    assert not check.step("raises", 20, lambda limit: {}["key"])
    assert check.step("after", 20, lambda limit: {"status": "passed", "counts": {"passed": 7}})
    data = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(data["steps"]) == ["good", "bad", "raises", "after"] and data["device"] == "none"
    assert data["steps"]["bad"]["status"] == "failed (exit status 3)" and "the reason" in data["steps"]["bad"]["tail"]
    assert data["steps"]["raises"]["status"].startswith("failed: KeyError")
    assert check.failed() == ["bad", "raises"]
    text = check.summary()
    assert "the reason" in text and "after: 7 passed" in text and text.endswith("2 steps did not pass: bad, raises")


def test_steps_side_by_side(tmp_path):
    """Each waits for the file that the other writes, so neither passes alone; one more fails and stops neither."""

    def meet(ours, other):
        ours, other = str(tmp_path / ours), str(tmp_path / other)
        return python(
            f"import os, time; print('met by', {ours!r}); open({ours!r}, 'w')\n"
            f"while not os.path.exists({other!r}): time.sleep(0.05)"
        )

    check = Check(tmp_path / "out", 60, FACTS)
    steps = [("a", 30, check.command(meet("a", "b"))), ("bad", 30, check.command(python("raise SystemExit(3)")))]
    check.side_by_side([*steps, ("b", 30, check.command(meet("b", "a")))])
    data = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert {name: entry["status"] for name, entry in data["steps"].items()} == {
        "a": "passed", "bad": "failed (exit status 3)", "b": "passed",
    }  # fmt: skip
    assert list(data["steps"]) == ["a", "bad", "b"] and check.failed() == ["bad"]
    for name in ("a", "b"):  # a log each
        log = (tmp_path / "out" / data["steps"][name]["log"]).read_text()
        assert [other for other in ("a", "b") if f"\nmet by {tmp_path / other}\n" in log] == [name]
    assert check.summary().endswith("1 steps did not pass: bad")


def test_a_step_dies_at_its_limit_with_its_children(tmp_path):
    """The child would write a file some time after its parent was killed."""
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_limited(python(parent), 1, tmp_path / "log") == "timed out after 1 s"
    time.sleep(3.5)
    assert not (tmp_path / "alive").exists()


def test_no_step_starts_without_time(tmp_path):
    check = Check(tmp_path, 4, FACTS)
    assert not check.step("late", 100, lambda limit: pytest.fail("started"))
    assert check.data["steps"]["late"]["status"] == "not run: no time was left"


SUITES = {
    "test_good.py": "def test_a(): pass\ndef test_b(): pass\n",
    "test_bad.py": "def test_a(): assert 1 == 2\ndef test_b():\n    import pytest\n    pytest.skip('no moon')\n",
    "test_absent.py": "import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass\n",
    "test_crash.py": "import os\ndef test_a(): os._exit(7)\n",
}


@pytest.fixture
def suite(tmp_path):
    for name, text in SUITES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_results_of_the_suite(suite):
    found = run_suite(sorted(suite.glob("test_*.py")), 2, 60, suite / "out")
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 2}
    assert found["status"] == "failed: test_bad failed (exit status 1); test_crash failed (exit status 7)"
    bad = found["files"]["test_bad"]
    assert bad["skips"] == {"no moon": 1} and bad["failures"][0]["test"].endswith("test_bad::test_a")
    assert "assert 1 == 2" in bad["failures"][0]["message"]
    assert found["files"]["test_absent"]["status"] == "passed" and found["files"]["test_absent"]["skips"]
    assert run_suite([suite / "test_good.py"], 1, 60, suite / "out")["status"] == "passed"


def test_a_file_in_parts(tmp_path, monkeypatch):
    """By this suite's own conftest.py: every test runs once, in one of the parts, and the file's results are whole. The
    parts have one seed, or their covering arrays would differ."""
    monkeypatch.delenv("CONV1X1_TEST_SEED")
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(gpu_check.ROOT / "tests" / "conftest.py", tests)
    (tests / "test_many.py").write_text(
        "import os, pathlib, pytest\n"
        "SEED = os.environ['CONV1X1_TEST_SEED']\n"
        "@pytest.mark.parametrize('i', range(20))\n"
        "def test_a(i):\n"
        f"    with open({str(tmp_path / 'ran')!r}, 'a') as f: f.write(f'{{os.getpid()}} {{i}} {{SEED}}\\n')\n"
        "    assert i != 5\n"
        "    if i in (6, 7): pytest.skip('no moon')\n"
    )
    found = run_suite([tests / "test_many.py"], 3, 120, tmp_path / "out", None, {"test_many": 3})
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert sorted(int(i) for _, i, _ in ran) == list(range(20)) and len({process for process, _, _ in ran}) > 1
    assert len({seed for _, _, seed in ran}) == 1
    assert found["counts"] == {"passed": 17, "failed": 1, "skipped": 2}
    file = found["files"]["test_many"]
    assert file["counts"] == found["counts"] and file["skips"] == {"no moon": 2} and len(file["failures"]) == 1
    assert found["status"] == "failed: test_many failed (exit status 1)" == f"failed: test_many {file['status']}"
    assert sorted(p.name for p in (tmp_path / "out" / "tests").iterdir()) == [f"test_many-{i}.log" for i in (1, 2, 3)]


def test_a_suite_out_of_time_names_what_did_not_run(suite):
    found = run_suite([suite / "test_good.py"], 1, 1, suite / "out")
    assert found["files"] == {"test_good": {"status": "not run: no time was left"}}
    assert found["status"].startswith("failed")


def test_junit_of_errors_outside_the_tests(tmp_path):
    case = "<testcase classname='a' name='b'><error message='at setup'/></testcase>"
    (tmp_path / "x.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    assert read_junit(tmp_path / "x.xml")["failures"] == [{"test": "a::b", "message": "at setup"}]


def test_which_files_run_on_the_gpu():
    names = [p.stem for p in suite_files()]
    assert names[0] == "test_cuda" and {"test_fprop", "test_strides", "test_errors"} <= set(names)
    assert not set(names) & set(gpu_check.NOT_HERE)
    assert set(gpu_check.PARTS) <= set(names) and set(gpu_check.LONGEST) <= set(names)


def test_what_only_the_cpu_has_is_not_run_on_the_gpu():
    """No file that would only be skipped, and none that compiles the CPU's microkernels, which takes minutes."""
    for path in suite_files():
        text = path.read_text()
        assert not re.search(r"^pytestmark = pytest\.mark\.cpu_only", text, re.MULTILINE), path
        assert not re.search(r"^def \w+\([^)]*\btable\b|load_table", text, re.MULTILINE), path
    stems = {path.stem for path in (gpu_check.ROOT / "tests").glob("test_*.py")}
    assert set(gpu_check.NOT_HERE) <= stems


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "finds no GPU" in capsys.readouterr().err
