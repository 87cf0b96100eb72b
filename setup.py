"""The native extension; everything else about the package stands in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "kvfs._native._core",
            sources=sorted(glob("kvfs/_native/*.c")),
            depends=sorted(glob("kvfs/_native/*.h")),
            # No -march: one build runs everywhere, and the kernels pick their instruction set at run time.
            # -fwrapv is among Python's own flags, and keeps gcc from vectorising loops of the codec.
            # No fused operations: the codec gives the same bits on every CPU, and on GPUs.
            extra_compile_args=[
                "-O3",
                "-std=c11",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-fno-wrapv",
                "-Wall",
                "-Wextra",
            ],
        )
    ]
)
