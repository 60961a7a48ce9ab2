"""On what a kernel is about to run, and how to launch it there."""

import contextlib
import functools

import torch
import triton

from fastattn.kernels.common.triton_dtypes import INTERPRETED


@functools.cache
def target(device):
    """The kind of processor that tables of tiles go by; ``device`` is its number, None on the CPU.

    "sm_90"        NVIDIA with 224 KiB of shared memory a block: Hopper and Blackwell for servers
    "sm"           the other NVIDIA processors, at least 96 KiB
    "gfx"          AMD, 64 KiB
    "interpreter"  Triton's interpreter
    """
    if INTERPRETED.value:
        return "interpreter"
    found = triton.runtime.driver.active.get_current_target()
    if found.backend != "cuda":
        return "gfx"
    return "sm_90" if found.arch in (90, 100, 103) else "sm"


def on(t):
    """Context in which launches go to the device of ``t``; torch leaves that to the caller."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def block(width):
    """The power of two that holds ``width`` columns, at least 16, the least a tensor core takes."""
    return max(16, triton.next_power_of_2(width))
