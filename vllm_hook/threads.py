"""Threads that move bytes beside an engine."""

import os

import torch

from kvfs.cores import cores

__all__ = ["step_aside"]


def step_aside(which: int = 0, of: int = 1) -> None:
    """Let the calling thread run on the engine's cores, and torch's operators stay on it.

    Of threads that share their work, number ``which`` ``of`` so many gets cores that none of the others has. The kernel
    would leave two of them on one core, and to the engine's thread that only polls the other for itself.

    vLLM's CPU worker makes `torch.set_num_threads` do nothing; this sets the number for this thread alone, and the
    engine's keeps its own.
    """
    every = sorted(cores())
    os.sched_setaffinity(0, every[which::of] or every)
    torch._C.set_num_threads(1)  # noqa: SLF001 - there is no public way left
