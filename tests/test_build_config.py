"""What setup.py decides: with or without CUDA, by which toolkit, for which architectures. No compiler runs here."""

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_config  # noqa: E402

KIT = build_config.Toolkit(Path("/opt/cuda"), "13.0", ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0"))
OLD_KIT = build_config.Toolkit(Path("/opt/cuda"), "12.4", ("5.0", "8.0", "8.6", "9.0"))


def make_home(folder, lib="lib64"):
    for name in ("bin/nvcc", "include/cuda_runtime.h", f"{lib}/libcudart_static.a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_the_environment_names_the_toolkit(tmp_path, name):
    home = make_home(tmp_path / "cuda")
    assert build_config.find_cuda_home({name: str(home)}) == (home, f"{name}={home}")


def test_a_wrong_cuda_home_is_not_replaced_by_another(tmp_path):
    make_home(tmp_path / "good")
    environ = {"CUDA_HOME": str(tmp_path / "bad"), "CUDA_PATH": str(tmp_path / "good"), "PATH": os.environ["PATH"]}
    assert build_config.find_cuda_home(environ) == (None, f"CUDA_HOME={tmp_path / 'bad'}")


@pytest.fixture
def no_usual_place(monkeypatch):
    whole = build_config._is_home
    monkeypatch.setattr(build_config, "_is_home", lambda home: home != Path("/usr/local/cuda") and whole(home))


def test_nvcc_of_the_path_may_be_a_wrapper(tmp_path, no_usual_place):
    home = make_home(tmp_path / "cuda-13.0")
    script(home / "bin" / "nvcc", f"echo '#$ _SPACE_= ' >&2; echo '#$ TOP={home}/bin/..' >&2\n")
    script(tmp_path / "wrappers" / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    found, where = build_config.find_cuda_home({"PATH": str(tmp_path / "wrappers")})
    assert found == home.resolve() and str(tmp_path / "wrappers") in where


def test_nvcc_of_the_path_without_headers(tmp_path, no_usual_place):
    script(tmp_path / "bin" / "nvcc", "exit 1\n")
    assert build_config.find_cuda_home({"PATH": str(tmp_path / "bin")})[0] is None


def test_no_nvcc(tmp_path, no_usual_place):
    found, where = build_config.find_cuda_home({"PATH": str(tmp_path)})
    assert found is None and "PATH" in where


def test_toolkit_asks_its_nvcc(tmp_path):
    home = make_home(tmp_path)
    script(
        home / "bin" / "nvcc",
        'case "$1" in --version) echo "Cuda compilation tools, release 12.8, V12.8.93";;\n'
        "--list-gpu-arch) printf 'compute_75\\ncompute_100\\ncompute_90\\n';; esac\n",
    )
    kit = build_config.toolkit_at(home)
    assert kit.version == "12.8" and kit.archs == ("7.5", "9.0", "10.0")
    script(home / "bin" / "nvcc", "echo what\n")
    with pytest.raises(SystemExit, match="expected a release"):
        build_config.toolkit_at(home)


@pytest.mark.parametrize("lib", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_the_static_runtime(tmp_path, lib):
    home = make_home(tmp_path, lib)
    kit = build_config.Toolkit(home, "13.0", ("9.0",))
    assert kit.lib == home / lib and kit.include == home / "include"
    (home / lib / "libcudart_static.a").unlink()
    with pytest.raises(SystemExit, match=r"no libcudart_static\.a"):
        _ = kit.lib


@pytest.mark.parametrize(
    "force,torch_cuda,home,expected,reason",
    [
        (None, "13.0", KIT.home, True, "torch has CUDA 13.0"),
        ("", "13.0", KIT.home, True, "torch has CUDA 13.0"),
        (None, None, KIT.home, False, "this torch has no CUDA"),
        (None, "13.0", None, False, "no CUDA toolkit"),
        ("1", None, KIT.home, True, "FORCE_CUDA=1"),
        ("1", "13.0", KIT.home, True, "FORCE_CUDA=1"),
        ("0", "13.0", KIT.home, False, "FORCE_CUDA=0"),
        ("0", None, None, False, "FORCE_CUDA=0"),
    ],
)
def test_with_or_without_cuda(force, torch_cuda, home, expected, reason):
    wanted, text = build_config.wants_cuda(force, torch_cuda, home, "here")
    assert wanted is expected and reason in text and "\n" not in text
    assert text.startswith("CPU and CUDA kernels" if expected else "CPU kernels only")


@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
def test_forced_cuda_without_a_toolkit_fails(torch_cuda):
    with pytest.raises(SystemExit, match=r"FORCE_CUDA=1, but no CUDA toolkit .* looked in CUDA_HOME=/nowhere"):
        build_config.wants_cuda("1", torch_cuda, None, "CUDA_HOME=/nowhere")


@pytest.mark.parametrize("home", [None, KIT.home])
def test_force_cuda_is_0_or_1(home):
    with pytest.raises(SystemExit, match="FORCE_CUDA: expected 0 or 1, got 'yes'"):
        build_config.wants_cuda("yes", "13.0", home, "here")


@pytest.mark.parametrize(
    "nvcc,torch_cuda,warns",
    [("13.0", "12.8", True), ("12.8", "13.0", False), ("13.1", "13.0", False), ("13.0", None, False)],
)
def test_a_newer_nvcc_than_torchs_needs_a_newer_driver(nvcc, torch_cuda, warns):
    assert bool(build_config.driver_warning(nvcc, torch_cuda)) is warns


@pytest.mark.parametrize(
    "requested,visible,kit,expected",
    [
        (None, [], KIT, "8.0 9.0 10.0 12.0+PTX"),
        (" ", [], KIT, "8.0 9.0 10.0 12.0+PTX"),
        (None, [], OLD_KIT, "8.0 9.0+PTX"),
        (None, [(9, 0), (9, 0), (8, 6)], KIT, "8.6 9.0"),
        (None, [(12, 0)], OLD_KIT, "9.0+PTX"),
        (None, [(8, 9)], KIT, "8.6+PTX"),
        ("8.0;9.0+PTX", [(8, 6)], KIT, "8.0 9.0+PTX"),
        ("7.5 8.0 9.0a 9.0a", [], KIT, "7.5 8.0 9.0a"),
        ("7.0 8.0", [], KIT, "8.0"),
        ("9.0;", [], KIT, "9.0"),
    ],
)
def test_architectures(requested, visible, kit, expected):
    archs, too_old = build_config.choose_archs(requested, visible, kit)
    assert " ".join(archs) == expected
    assert too_old == (("7.0",) if requested and "7.0" in requested else ())


@pytest.mark.parametrize(
    "requested,visible,message",
    [
        ("Hopper", [], "TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0+PTX', got 'Hopper'"),
        ("90", [], "got '90'"),
        ("9.0;99.0", [], "those of nvcc 13.0, from 7.5 on; got 99.0"),
        ("7.0", [], "got 7.0"),
        (None, [(7, 0)], "got 7.0"),
    ],
)
def test_architectures_that_cannot_be(requested, visible, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        build_config.choose_archs(requested, visible, KIT)


def test_only_a_library_for_tuning_can_be_tuned():
    for off in ({}, {"CONV1X1_TUNING": ""}, {"CONV1X1_TUNING": "0"}):
        assert build_config.tuning_macros(off) == []
    assert build_config.tuning_macros({"CONV1X1_TUNING": "1"}) == [("CONV1X1_TUNING", "1")]
    with pytest.raises(SystemExit, match="expected 0 or 1, got 'yes'"):
        build_config.tuning_macros({"CONV1X1_TUNING": "yes"})


def test_gencode_flags():
    assert build_config.gencode_flags(["8.0", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_every_source_is_listed_once():
    sources = build_config.LIBRARY_SOURCES + build_config.CUDA_SOURCES + build_config.NO_CUDA_SOURCES
    assert len(set(sources)) == len(sources)
    files = (path for path in build_config.CSRC.rglob("*.c*") if path.suffix in (".cpp", ".cu"))
    there = {path.relative_to(build_config.CSRC).as_posix() for path in files}
    assert there == {*sources, "cpu/kernels/table_pybind.cpp"}
