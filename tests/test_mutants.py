"""The list of mutants fits the sources and tests, and planting one changes what it says and nothing else."""

import shlex

import pytest
from helpers import ROOT
from mutants import mutant as rules
from mutants.lists import MUTANTS
from mutants.run import _told

pytestmark = pytest.mark.cpu_only(reason="text")


def fits(planted):
    rules.once_replaced((ROOT / planted.file).read_text(), planted.old, planted.new, planted.name)
    assert planted.tests, planted.name
    for test in planted.tests:
        names = [word for word in shlex.split(test) if word.startswith("test_") and ".py" in word]
        assert names, (planted.name, test)
        for name in names:
            file, *function = name.split("::")
            text = (ROOT / "tests" / file).read_text()
            assert all(f"def {f}(" in text for f in function), (planted.name, name)


def test_texts_occur_once_and_tests_exist():
    stale = []
    for planted in MUTANTS:
        try:
            fits(planted)
        except (rules.Stale, OSError, AssertionError) as error:
            stale.append(str(error))
    assert not stale, "\n".join(stale)


@pytest.fixture
def tree(tmp_path):
    files = {
        "csrc/unit.cpp": '#include "outer.inc"\nint a;\n',
        "csrc/other.cpp": '#include "outer.inc"\n',
        "csrc/outer.inc": '#include "inner.inc"\n',
        "csrc/inner.inc": "one = 1; two = 2;\n",
        "csrc/guarded.h": "#pragma once\nthree = 3;\n",
        "csrc/guarded.cpp": '#include "guarded.h"\n',
        "conv1x1_ext/x.py": "x = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path, files


def texts(root):
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_planted_and_put_back(tree):
    root, files = tree
    before = rules.plant(root, rules.mutant("name", "conv1x1_ext/x.py", "x = 1", "x = 2", "test_x.py"))
    assert texts(root) == {**files, "conv1x1_ext/x.py": "x = 2\n"}
    rules.put_back(before)
    assert texts(root) == files


def test_one_unit_alone_includes_the_fault(tree):
    root, files = tree
    fault = rules.mutant("name", "csrc/inner.inc", "two = 2", "two = 3", "test_x.py", unit="unit.cpp")
    before = rules.plant(root, fault)
    planted = texts(root)
    assert {name: planted[name] for name in files if name != "csrc/unit.cpp"} == {
        name: text for name, text in files.items() if name != "csrc/unit.cpp"
    }
    reached = rules.closure(root / "csrc" / "unit.cpp", root / "csrc")
    assert any("two = 3" in path.read_text() for path in reached)
    assert not any("two = 2" in path.read_text() for path in reached)
    rules.put_back(before)
    assert texts(root) == files


@pytest.mark.parametrize(
    ("file", "old", "new", "unit", "message"),
    [
        ("csrc/inner.inc", "four", "five", None, "occurs 0 times"),
        ("csrc/inner.inc", " = ", "", None, "occurs 2 times"),
        ("csrc/inner.inc", "one", "one", None, "the new text is the old one"),
        ("csrc/none.inc", "one", "two", None, "there is no csrc/none.inc"),
        ("csrc/inner.inc", "one", "two", "guarded.cpp", "does not include"),
        ("csrc/guarded.h", "three", "four", "none.cpp", "does not include"),
    ],
)
def test_a_stale_one_is_named_and_changes_nothing(tree, file, old, new, unit, message):
    root, files = tree
    with pytest.raises(rules.Stale, match=f"name.*{message}"):
        rules.plant(root, rules.mutant("name", file, old, new, "test_x.py", unit=unit))
    assert texts(root) == files


@pytest.mark.parametrize(
    ("status", "output", "told"),
    [
        (1, "..F\nFAILED tests/test_x.py::test_y[1 - 2] - assert 1 == 2\n", ("failed", "test_x.py::test_y[1 - 2]")),
        (0, "3 passed in 1.00s", ("passed", "")),
        (0, "3 skipped in 1.00s", ("nothing", "no test was run")),
        (5, "no tests ran in 1.00s", ("nothing", "no test was run")),
        (-11, "", ("failed", "crash (SIGSEGV)")),
        (4, "found no collectors", ("nothing", "pytest ended with 4: found no collectors")),
        (-9, None, ("failed", "timeout")),
    ],
)
def test_what_became_of_a_run(status, output, told):
    assert _told(status, output) == told
