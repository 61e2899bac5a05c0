"""The kernels in C++: built for x86-64 where there is GCC or clang with OpenMP; elsewhere Python code runs instead.

All else is in pyproject.toml. There is one library per level of vector instructions, and the best one that the
processor can run is loaded when it is first needed. They are no modules of Python, and have a suffix of their own.
"""

import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("perexfx/kernels/cpp")
SOURCES = sorted(NATIVE.glob("*.cpp"))
LEVELS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
}
FLAGS = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
HAS_KERNELS = platform.machine().lower() in {"x86_64", "amd64"} and sys.platform != "win32"


def fingerprint() -> str:
    """Of all that the libraries are made from, as `perexfx.kernels.loading` makes it: with others they are not used."""
    every = sorted([*SOURCES, *NATIVE.glob("*.h")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in every)).hexdigest()[:16]


class BuildKernels(build_ext):
    """Libraries by another suffix than that of modules, built anew each time: what another build left may be old."""

    def finalize_options(self) -> None:
        """As ever, and everything again."""
        super().finalize_options()
        self.force = True

    def get_ext_filename(self, fullname: str) -> str:
        """A file's name does not depend on the version of Python."""
        return f"{Path(*fullname.split('.'))}.kernels"


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            f"perexfx.kernels.cpp.{level}",
            [str(path) for path in SOURCES],
            extra_compile_args=[*FLAGS, *flags, f'-DPEREXFX_FINGERPRINT="{fingerprint()}"'],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
        for level, flags in LEVELS.items()
        if HAS_KERNELS
    ],
)
