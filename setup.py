"""Builds conv1x1_ext/_C.so: one library against the LibTorch stable ABI, loaded with torch.ops.load_library."""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_config  # noqa: E402

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:  # pragma: no cover
    raise SystemExit(
        "conv1x1_ext is built against an installed torch (>= 2.10), and there is none here. Install torch first; with "
        "build isolation, pip installs one as pyproject.toml asks."
    ) from error

# The compiler, not the number of cores, decides how much memory a job takes: about 400 MB each.
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

setup(
    ext_modules=[
        CppExtension(
            name="conv1x1_ext._C",
            sources=[f"csrc/{source}" for source in build_config.LIBRARY_SOURCES],
            define_macros=[("TORCH_TARGET_VERSION", build_config.TORCH_TARGET)],
            extra_compile_args={"cxx": build_config.CXX_FLAGS},
            extra_link_args=build_config.LINK_FLAGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
