"""Builds conv1x1_ext/_C.so: one library against the LibTorch stable ABI, loaded with torch.ops.load_library.

Which torch it is built against does not matter to the torch it runs with, so the cheapest one is taken: that of the
environment, also under pip's build isolation, which hides it. Only where there is none does isolation install one.
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

from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402

os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))  # a job takes about 400 MB

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
