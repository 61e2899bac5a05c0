"""The kernels in C++: built where there is a compiler for them; without, torch's own operations run in their place.

All else is in pyproject.toml. One library per level of x86-64's vector instructions, the best of which is taken when it
is first needed; elsewhere the last one alone.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("perexfx/ir/native")
LEVELS = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "default": [],
}
FLAGS = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
is_x86 = platform.machine().lower() in {"x86_64", "amd64"}

setup(
    ext_modules=[
        Extension(
            f"perexfx.ir.native._kernels_{level}",
            sorted(map(str, NATIVE.glob("*.cpp"))),
            depends=sorted(map(str, NATIVE.glob("*.h"))),
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-fopenmp"],
            optional=True,  # a compiler may lack OpenMP or vectors of its own
        )
        for level, flags in LEVELS.items()
        if is_x86 or level == "default"
    ]
)
