"""The cache of objects: what is compiled when, by how many processes, and that no header is overlooked."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from amx import build as amx_build
from cuda_on_cpu import build as cuda_build
from helpers import ROOT, expect_ok, run_python

from bench import object_cache
from bench.microkernel_table import table_units
from bench.object_cache import CXX, Unit, included

pytestmark = pytest.mark.cpu_only(reason="the host's compiler")

# Takes the compiler's place: writes down what it is asked to make, and is slow enough for others to come.
COMPILER = """#!/bin/sh
case "$*" in *--version*) ;; *) echo "$*" >> "{log}"; sleep 0.2;; esac
exec {compiler} "$@"
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository of three sources and a header that two of them include, by way of another one."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "inner.h").write_text("#pragma once\n#define VALUE 1\n")
    (tmp_path / "sub" / "outer.h").write_text('#include "../inner.h"\n')
    for name, value in (("a", "VALUE"), ("b", "10 * VALUE"), ("c", "100")):
        header = '#include "sub/outer.h"\n' if "VALUE" in value else ""
        (tmp_path / f"{name}.cpp").write_text(f'{header}extern "C" int {name}() {{ return {value}; }}\n')
    (tmp_path / "compiler").write_text(COMPILER.format(log=tmp_path / "log", compiler=CXX))
    (tmp_path / "compiler").chmod(0o755)
    for name, value in (("ROOT", tmp_path), ("CACHE", tmp_path / "cache"), ("CXX", str(tmp_path / "compiler"))):
        monkeypatch.setattr(object_cache, name, value)
    return tmp_path


def units(folder, *flags):
    return [Unit(folder / f"{name}.cpp", ("-fPIC", *flags)) for name in "abc"]


def compiled(folder):
    """The sources that were compiled since the last call, and how many libraries were linked."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    sources = [word.rsplit("/", 1)[1] for line in lines for word in line.split() if word.endswith(".cpp")]
    return sorted(sources), sum("-shared" in line.split() for line in lines)


def values(path):
    library = ctypes.CDLL(str(path))
    return [getattr(library, name)() for name in "abc"]


def test_only_what_changed_is_compiled_again(project):
    first = object_cache.build("it", units(project))
    assert values(first) == [1, 10, 100]
    assert compiled(project) == (["a.cpp", "b.cpp", "c.cpp"], 1)
    assert object_cache.build("it", units(project)) == first and compiled(project) == ([], 0)
    (project / "inner.h").write_text("#pragma once\n#define VALUE 2\n")
    assert values(object_cache.build("it", units(project))) == [2, 20, 100]
    assert compiled(project) == (["a.cpp", "b.cpp"], 1)
    (project / "inner.h").write_text("#pragma once\n#define VALUE 1\n")
    assert object_cache.build("it", units(project)) == first and compiled(project) == ([], 0)


def test_flags_compiler_and_versions_count(project, monkeypatch):
    object_cache.build("it", units(project))
    compiled(project)
    object_cache.build("it", units(project, "-DMORE"))
    assert compiled(project) == (["a.cpp", "b.cpp", "c.cpp"], 1)
    object_cache.build("it", [Unit(unit.source, unit.flags, ("2.0",)) for unit in units(project)[:1]])
    assert compiled(project) == (["a.cpp"], 1)
    monkeypatch.setattr(object_cache, "_compiler", lambda command: "another version")
    object_cache.compile_units(units(project)[2:])
    assert compiled(project) == (["c.cpp"], 0)


def test_link_flags_count(project):
    object_cache.build("it", units(project))
    compiled(project)
    object_cache.build("it", units(project), ["-Wl,-O1"])
    assert compiled(project) == ([], 1)


def test_a_shared_object_is_compiled_once(project):
    """Libraries that differ in one source."""
    object_cache.build("it", units(project))
    compiled(project)
    first, *others = units(project)
    library = object_cache.build("other", [Unit(first.source, (*first.flags, "-DVALUE=7", "-w")), *others])
    assert compiled(project) == (["a.cpp"], 1) and values(library)[1:] == [10, 100]


def test_a_define_is_for_the_sources_that_name_it(project):
    (project / "inner.h").write_text("#pragma once\n#ifndef VALUE\n#define VALUE 1\n#endif\n")
    object_cache.build("it", units(project))
    compiled(project)
    library = object_cache.build("it", object_cache.defining(units(project), "VALUE=7"))
    assert compiled(project) == (["a.cpp", "b.cpp"], 1) and values(library) == [7, 70, 100]
    with pytest.raises(RuntimeError, match="no source names VAL"):
        object_cache.defining(units(project), "VAL")


def test_errors_are_the_compilers_and_leave_nothing(project):
    (project / "b.cpp").write_text("int b() { return nothing; }\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"b\.cpp(.|\n)*nothing(.|\n)* was not declared|use of undeclared"):
            object_cache.build("it", units(project))
    assert compiled(project)[0].count("b.cpp") == 2
    (project / "b.cpp").write_text('extern "C" int b() { return 3; }\n')
    assert values(object_cache.build("it", units(project))) == [1, 3, 100]


def test_what_a_killed_process_left_is_not_taken(project):
    target = object_cache.object_of(units(project)[0])
    target.parent.mkdir()
    target.with_suffix(".partial").write_text("half an object")
    assert values(object_cache.build("it", units(project))) == [1, 10, 100]


WORKER = """
import os, sys
from pathlib import Path
from bench import object_cache
root = Path({root!r})
object_cache.ROOT, object_cache.CACHE, object_cache.CXX = root, root / "cache", str(root / "compiler")
open(root / f"ready{{os.getpid()}}", "w").close()
while not (root / "go").exists(): pass
units = [object_cache.Unit(root / f"{{name}}.cpp", ("-fPIC",)) for name in "abc"]
print(object_cache.build("it", units))
"""


def test_processes_share_the_work(project):
    """Workers of pytest-xdist that want the same library at once: nothing twice, and different objects side by side."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "PYTEST_XDIST_WORKER_COUNT": "64"}
    command = [sys.executable, "-c", WORKER.format(root=str(project))]
    workers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    while len(list(project.glob("ready*"))) < 3:
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.01)
    (project / "go").touch()
    paths = {worker.communicate()[0].strip() for worker in workers}
    assert len(paths) == 1 and values(paths.pop()) == [1, 10, 100]
    assert compiled(project) == (["a.cpp", "b.cpp", "c.cpp"], 1)


def test_an_include_without_a_name_is_refused(project):
    (project / "c.cpp").write_text("#define HEADER <cmath>\n#include HEADER\n")
    with pytest.raises(RuntimeError, match="#include HEADER: expected"):
        object_cache.build("it", units(project))


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for workers, jobs in (("1", 8), ("2", 4), ("16", 1)):
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
        assert object_cache.jobs() == jobs


def all_units():
    emulated = [Unit(source, tuple(cuda_build.FLAGS)) for source in (*cuda_build.kernel_sources(), *cuda_build.SHIM)]
    return [*table_units(), *amx_build.emulating(amx_build.library_units()), *emulated]


def test_every_header_that_the_compiler_reads_is_seen():
    for unit in {unit.source: unit for unit in all_units()}.values():
        command = [CXX, *unit.flags, "-x", "c++", "-MM", str(unit.source)]
        rule = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        read = {Path(word).resolve() for word in rule.replace("\\\n", " ").split(":", 1)[1].split()}
        ours = {path for path in read - {unit.source.resolve()} if path.is_relative_to(ROOT)}
        assert ours <= set(included(unit.source, unit.flags)), unit.source


def test_kernels_are_compiled_once_for_both_tables_and_the_emulated_library():
    """What differs is what asks for the define, and what knows Python or torch."""
    plain, table, package = (
        {unit.source.name: object_cache.object_of(unit) for unit in made}
        for made in (table_units(), amx_build.emulating(table_units()), amx_build.emulating(amx_build.library_units()))
    )
    assert {name for name in plain if plain[name] != table[name]} == {"dispatch.cpp"}
    assert {name for name in table if name in package and package[name] != table[name]} == set()
    assert set(plain) - set(package) == {"table_pybind.cpp"}


def test_a_process_that_only_looks_imports_no_torch():
    code = "import sys, cuda_on_cpu.build; assert 'torch' not in sys.modules"
    expect_ok(run_python(code))
