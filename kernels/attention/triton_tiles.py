"""Which tiles attention's kernels work on: as large as the registers of each kind of processor allow.

What the compilers made of them stands in the header of triton.py.
"""

from typing import NamedTuple

import triton

from fastattn.kernels.common import triton_launch as launch


class Tile(NamedTuple):
    """BM queries x BN keys a step, and how many warps and load stages work on it."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By the bytes of a number, the kind of processor and the kernel: for widths to 64, 128 and 256.
TILES = {
    2: {
        "sm_90": {
            "fwd": (Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
            "dq": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
            "dkdv": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 32, 8, 2)),
        },
        "sm": {
            "fwd": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
            "dq": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 16, 8, 2)),
            "dkdv": (Tile(32, 128, 8, 2), Tile(64, 64, 8, 2), Tile(16, 32, 8, 2)),
        },
        "gfx": {
            "fwd": (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(64, 32, 4, 2)),
            "dq": (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
            "dkdv": (Tile(32, 64, 4, 2), Tile(32, 64, 4, 1), Tile(16, 32, 4, 2)),
        },
    },
    4: {
        "sm": {
            "fwd": (Tile(64, 32, 8, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 1)),
            "dq": (Tile(64, 32, 8, 2), Tile(32, 16, 8, 2), Tile(16, 16, 8, 2)),
            "dkdv": (Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
        },
        "gfx": {
            "fwd": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 8, 1)),
            "dq": (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
            "dkdv": (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
        },
    },
}
TILES[4]["sm_90"] = TILES[4]["sm"]
# Masks that are no bands, biases and weights want registers and shared memory of their own; tiles of
# the gradients of biases are square.
RICH = {
    2: {
        "sm_90": {
            "fwd": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
            "dq": (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
            "dkdv": (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
            "dterm": (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(16, 16, 8, 1)),
        },
        "sm": {
            "fwd": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
            "dq": (Tile(64, 64, 8, 1), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
            "dkdv": (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
            "dterm": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        },
        "gfx": {
            "fwd": (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
            "dq": (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1)),
            "dkdv": (Tile(32, 64, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)),
            "dterm": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        },
    },
    4: {
        "sm": {
            "fwd": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
            "dq": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
            "dkdv": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
            "dterm": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
        },
        "gfx": {
            "fwd": (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
            "dq": (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
            "dkdv": (Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
            "dterm": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        },
    },
}
RICH[4]["sm_90"] = RICH[4]["sm"]
# Where programs that own 128 rows each have too few rows, or are too few to fill a GPU, they own 64.
SMALL = {"fwd": Tile(64, 64, 4, 2), "dq": Tile(64, 64, 4, 2), "dkdv": Tile(32, 64, 4, 2)}
FEW_PROGRAMS = 128


def choose(name, q, width, heads=1, N=1, is_plain=False):
    """The tile for a kernel that owns the N rows, queries or keys, of so many heads; q says where, and of what."""
    target, itemsize = launch.target(q.device.index), q.element_size()
    if target == "interpreter":
        return Tile(64, 64, 1, 1)
    at = 0 if width <= 64 else 1 if width <= 128 else 2
    if not is_plain:
        return RICH[itemsize][target][name][at]
    tile = TILES[itemsize][target][name][at]
    owned = tile.BN if name == "dkdv" else tile.BM
    few = N <= 64 or heads * triton.cdiv(N, 128) <= FEW_PROGRAMS
    return SMALL[name] if few and owned == 128 and width <= 128 and target != "gfx" else tile
