"""Builds conv1x1_ext/_C.so: one library against the LibTorch stable ABI, loaded with torch.ops.load_library.

Which torch it is built against does not matter to the torch it runs with, so the cheapest one is taken: that of the
environment, also under pip's build isolation, which hides it. Only where there is none does isolation install one.

CUDA kernels are built where there is nvcc and torch has CUDA. FORCE_CUDA=1 builds them for any torch, or fails;
FORCE_CUDA=0 leaves them out. CUDA_HOME and TORCH_CUDA_ARCH_LIST are honoured (csrc/build_config.py has the rules).
CONV1X1_TUNING=1 makes a library for bench/cuda_tiles.py, whose plans can be told what to choose.
"""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_config  # noqa: E402

if importlib.util.find_spec("torch") is None:
    sys.path.append(sysconfig.get_path("purelib"))
if importlib.util.find_spec("torch") is None:
    if "egg_info" not in sys.argv:
        raise SystemExit("conv1x1_ext is built against an installed torch (>= 2.10), and there is none here.")
    setup(setup_requires=["torch>=2.10"])  # asked what the build needs
    sys.exit()

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))  # a job takes about 400 MB

home, where = build_config.find_cuda_home(os.environ)
with_cuda, reason = build_config.wants_cuda(os.environ.get("FORCE_CUDA"), torch.version.cuda, home, where)
messages = [reason]
sources = build_config.LIBRARY_SOURCES + (build_config.CUDA_SOURCES if with_cuda else build_config.NO_CUDA_SOURCES)
options = {
    "define_macros": [("TORCH_TARGET_VERSION", build_config.TORCH_TARGET)],
    "extra_compile_args": {"cxx": build_config.CXX_FLAGS},
    "extra_link_args": build_config.LINK_FLAGS,
}

if with_cuda:
    toolkit = build_config.toolkit_at(home)
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    archs, too_old = build_config.choose_archs(
        os.environ.get("TORCH_CUDA_ARCH_LIST"), [torch.cuda.get_device_capability(gpu) for gpu in gpus], toolkit
    )
    messages.append(f"nvcc {toolkit.version}, architectures {' '.join(archs)}")
    messages += [f"left out: {' '.join(too_old)}: the kernels need 7.5"] * bool(too_old)
    warning = build_config.driver_warning(toolkit.version, torch.version.cuda)
    messages += [f"WARNING: {warning}"] * bool(warning)
    names = {"CONV1X1_CUDA_ARCHS": " ".join(archs), "CONV1X1_NVCC": toolkit.version}
    options["define_macros"] += [(name, f'"{value}"') for name, value in names.items()]
    options["define_macros"] += build_config.tuning_macros(os.environ)
    options["extra_compile_args"]["nvcc"] = build_config.NVCC_FLAGS + build_config.gencode_flags(archs)
    options["extra_link_args"] = build_config.CUDA_LINK_FLAGS + build_config.LINK_FLAGS
    options["include_dirs"] = [str(toolkit.include)]
    options["library_dirs"] = [str(toolkit.lib)]
    options["libraries"] = list(build_config.CUDA_LIBRARIES)
    # torch fixes it at import, to None for a torch without CUDA; and refuses an nvcc of another major version than
    # torch's, which does not concern a library without torch's CUDA headers (build_config.driver_warning).
    cpp_extension.CUDA_HOME = str(home)
    cpp_extension._check_cuda_version = lambda *versions: None


class BuildExtension(cpp_extension.BuildExtension):
    """torch's; says what it builds, and never takes a library that was built with other options for up to date."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # ninja, where there is one, still compiles only what has changed

    def build_extensions(self) -> None:
        for message in messages:
            print(f"conv1x1_ext: {message}", flush=True)
        super().build_extensions()


setup(
    ext_modules=[
        cpp_extension.CppExtension(
            name="conv1x1_ext._C", sources=[f"csrc/{source}" for source in sources], py_limited_api=True, **options
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
