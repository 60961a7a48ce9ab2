"""Every Triton kernel, compiled for processors that are not here, and its machine code read.

The launchers themselves choose: they are called as usual, under a driver that only says which
processor it drives, so that what is compiled is what would run there.  Asked of the result: the
registers and spills that the kernel's header states, shared memory that the processor has, the
matrix instructions meant, loads of 16 bytes.  Another compiler than the header's may spend registers
otherwise; the rest must hold with any.

This file is two programs: the tests, and the compiling, a process of its own because that of the
tests may interpret Triton.  ``python tests/test_compile_targets.py`` prints what it finds, a JSON
object a line.
"""

from __future__ import annotations

import atexit
import collections
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Shared memory that a block may have.  sm_80 stands for all NVIDIA processors before sm_90.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
KERNELS = {"fwd": "attention_fwd", "dq": "attention_dq", "dkdv": "attention_dkdv"}
WIDTHS = (64, 128, 256)

# ---- Compiling: runs in a process of its own ----------------------------------------------------


class Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


BAND = [0, 1 << 30, 0, 1 << 30, 1 << 30, 0]  # causal
EXTRAS = [
    "bias", "bias_index", "bias2", "bias2_index", "weight", "weight_index", "sinks", "visible", "blocks",
    "heads", "cu_q", "cu_k", "seed", "slots_q", "slots_k",
]  # fmt: skip


def attend(
    attention, dtype, D, Hk=128, N=128, dlse=True, mask=BAND, softcap=0.0, low=0.0, dropout=0.0, topk=0.0, **given
) -> None:  # fmt: skip
    B = 1 if "cu_q" in given and "slots_q" not in given else 2
    q, dq, o, do = (torch.empty(B, 128, N, D, dtype=dtype) for _ in range(4))
    k, dk, v, dv = (torch.empty(B, Hk, N, D, dtype=dtype) for _ in range(4))
    lse, rest = torch.empty(B, 128, N), torch.empty(B, 128, 3, N)
    extras = [given.get(name) for name in EXTRAS]
    numbers = (D**-0.5, softcap, low, 1.0, dropout, 0.0, topk)
    grads = [given.get(name) for name in ("bias", "bias2", "weight", "sinks")]
    needs = [True, True, True, *(t is not None for t in grads)]
    dlse = lse if dlse else None
    attention.forward(o, lse, rest, q, k, v, *extras, mask, numbers)
    attention.backward(
        dq, dk, dv, *grads, do, dlse, q, k, v, *extras, o, lse, rest, mask, numbers, needs
    )  # fmt: skip


def features() -> dict[str, dict]:
    """What may come beside a band and a scale, a few at a time, with its gradients."""
    table, index, ends, heads = (torch.empty(128, 255), *(torch.empty(n, dtype=torch.int32) for n in (
        (128, 128), 3, 128)))  # fmt: skip
    seed, layout = torch.empty(1, dtype=torch.int64), torch.empty(16, dtype=torch.bool)
    slots = [torch.zeros(1, 128, 2, 128, dtype=torch.int32) for _ in "qk"]
    return {
        "bias": {"bias": torch.empty(1, 128, 128, 128, dtype=torch.bfloat16)},
        "tables": {"bias": table, "bias_index": index, "bias2": table},
        "rows": {"bias": torch.empty(2, 1, 1, 128), "weight": torch.empty(1, 128, 128, 1)},
        "blocks": {"mask": [3, 0, 1, 4, 4, 32], "blocks": layout},
        "sinks": {"softcap": 20.0, "sinks": torch.empty(128)},
        "dropout": {"dropout": 0.1, "low": -0.03, "seed": seed},
        "packed": {"cu_q": ends, "cu_k": ends, "heads": heads},
        "groups": {"cu_q": ends, "cu_k": ends, "slots_q": slots[0], "slots_k": slots[1]},
        "topk": {"topk": 8.0},
        "cached": {"cu_q": ends, "cu_k": ends, "slots_k": slots[1][:, :, :1]},
    }


def normalise(norm, D, kind, given) -> None:
    x, s, one, w = (torch.empty(*n) for n in ((64, D), (64, D), (64,), (D,)))
    x, s = x.bfloat16(), s.bfloat16()
    residual, *parameters = (
        t if name in given else None
        for name, t in (("residual", s), ("bias", w), ("weight", w), ("beta", w))
    )
    norm.forward(x, s, one, one, x, residual, *parameters, 1e-5, kind)
    norm.backward(x, w, w, w, x, residual, s, *parameters, one, one, 1e-5, kind)


def look_back(decode, dtype, D, page_size=None, Hk=8, Nq=1) -> None:
    """The plainest call, and with a page size one with everything that a call may have."""
    q, o = (torch.empty(2, 32, Nq, D, dtype=dtype) for _ in range(2))
    shape = (64, page_size, Hk, D) if page_size else (2, Hk, 1024, D)
    k, v = (torch.empty(shape, dtype=dtype) for _ in range(2))
    new = torch.empty(2, Hk, Nq, D, dtype=dtype)
    lengths, lse = torch.zeros(2, dtype=torch.int32), torch.empty(2, 32, Nq)
    table = torch.zeros(2, 1024 // page_size, dtype=torch.int32) if page_size else None
    per_head = torch.zeros(32) if page_size else None
    softcap = 30.0 if page_size else 0.0
    if page_size:
        decode.append(k, v, new, new, lengths, table)
    decode.forward(
        o, lse, q, k, v, lengths, table, per_head, per_head, 1, BAND, D**-0.5, softcap, 0
    )


def calls(attention, norm, decode) -> Iterator[tuple[str, tuple[str, ...], Callable[[], None]]]:
    """(label, targets, call) of everything to compile."""
    every = tuple(SHARED)
    half, wide = torch.bfloat16, torch.float32
    for D in WIDTHS:
        yield f"bfloat16 {D}", every, lambda D=D: attend(attention, half, D)
        yield f"float32 {D}", ("sm_90", "gfx942"), lambda D=D: attend(attention, wide, D)
    yield "float16 128", ("sm_90",), lambda: attend(attention, torch.float16, 128)
    yield "few 128", ("sm_80", "sm_90"), lambda: attend(attention, half, 128, N=32)
    yield "grouped 128", ("sm_90",), lambda: attend(attention, half, 128, Hk=32, N=1024)
    yield "padded 40", ("sm_90",), lambda: attend(attention, half, 40, dlse=False)
    for label, given in features().items():
        yield f"{label} 128", every, lambda given=given: attend(attention, half, 128, **given)
    for D in WIDTHS:
        yield f"decode bfloat16 {D}", every, lambda D=D: look_back(decode, half, D)
        yield f"decode float32 {D}", ("sm_90", "gfx942"), lambda D=D: look_back(decode, wide, D)
    yield "decode pages 128", every, lambda: look_back(decode, half, 128, 16, Nq=3)
    yield "decode float16 64", ("sm_90",), lambda: look_back(decode, torch.float16, 64, 1)
    everything = "residual bias weight beta"
    for D, kind, given in (
        (768, 0, everything),
        (4096, 1, "residual weight"),
        (16384, 1, "weight"),
    ):
        yield f"norm {D}", every, lambda D=D, k=kind, g=given: normalise(norm, D, k, g)


def compile_all(say: Callable[[dict], None]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastattn.kernels.attention import triton as attention
    from fastattn.kernels.common import triton_launch
    from fastattn.kernels.decode import triton as decode
    from fastattn.kernels.norm import triton as norm

    targets = {
        name: GPUTarget("cuda", int(name[3:]), 32) for name in SHARED if name.startswith("sm")
    }
    targets["gfx942"] = GPUTarget("hip", "gfx942", 64)
    run, found = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tile = {n: options[n] for n in ("num_warps", "num_stages") if n in options}
        sizes = [a.size for a in args if hasattr(a, "size") and hasattr(a, "mask")]
        for size in (*sizes, *(a for a in args if hasattr(a, "SPLIT"))):
            tile |= {"BM": size.BM.value, "BN": size.BN.value}
        found.append((self.__name__, tile, kernel))

    JITFunction.run = compile_only
    for target, processor in targets.items():
        driver.set_active(Driver(processor))
        triton_launch.target.cache_clear()
        for module in (attention, attention.gradients, attention.groups, norm, decode):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
        for label, wanted, call in calls(attention, norm, decode):
            if target in wanted:
                found.clear()
                call()
                for name, tile, kernel in found:
                    say({
                        "target": target, "label": label, "kernel": name, **tile,
                        "triton": triton.__version__, "shared": kernel.metadata.shared,
                        **read(kernel.asm),
                    })  # fmt: skip


def read(asm) -> dict:
    """Registers, spills, and how often each instruction occurs that a test asks about."""
    if "cubin" not in asm:
        text = asm["amdgcn"]
        regs, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        words = re.findall(r"^\s*(v_mfma_\w+|(?:buffer|global)_load_\w+)", text, re.MULTILINE)
        return {"regs": regs, "spills": spills, "code": collections.Counter(words)}
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.check_output([tool, option, file.name], text=True)
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    words = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|FFMA|LDGSTS|LDG)\b(\S*)", sass)
    words = [name + (".128" if ".128" in rest else "") for name, rest in words]
    regs, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"regs": int(regs), "spills": int(stack), "code": collections.Counter(words)}


# ---- Testing ------------------------------------------------------------------------------------

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed"
)


@functools.cache
def begin() -> tuple[subprocess.Popen, list]:
    """Compiling, beside the tests of other files: conftest.py calls this before them, and these tests come last."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    out = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdout=out[0], stderr=out[1]
    )
    for end in (process.kill, *(file.close for file in out)):
        atexit.register(end)
    return process, out


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str, str], dict]:
    """{(target, label, kernel): what came out}"""
    process, out = begin()
    process.wait(timeout=3000)
    found, errors = (file.seek(0) or file.read() for file in out)
    assert process.returncode == 0, errors
    results: dict[tuple[str, str, str], dict] = {}
    for r in map(json.loads, found.splitlines()):
        where = r["target"], r["label"], r["kernel"]
        if (
            where not in results or results[where]["spills"] < r["spills"]
        ):  # the worst, if there are several
            results[where] = r
    return results


def header(op: str) -> tuple[str, str]:
    """The header of an op's Triton kernels, and the version of Triton that its table is from."""
    path = importlib.util.find_spec(f"fastattn.kernels.{op}.triton").origin
    text = Path(path).read_text().split('"""')[1]
    return text, re.search(r"from: Triton (\d+\.\d+\.\d+)", text)[1]


def check(cells: list[str], result: dict, version: str) -> None:
    """[tile, registers, spills] of a header, or [registers, spills], against the compiler's."""
    *tile, regs, spills = cells
    if tile:
        names = ("BM", "BN", "num_warps", "num_stages")
        assert tile == ["{}x{}/{}/{}".format(*(result[n] for n in names))]
    if result["triton"] == version:
        assert (result["regs"], result["spills"]) == (int(regs), int(spills))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("D", WIDTHS)
def test_attention_is_as_its_header_says(compiled, kernel, D):
    text, version = header("attention")
    rows = re.findall(rf"^ +{kernel} +{D} +(\S.*)$", text, re.MULTILINE)
    half, single = (row.split() for row in rows)
    for label, target, cells in (
        ("bfloat16", "sm_90", half[0:3]),
        ("bfloat16", "sm_100", half[3:5]),
        ("bfloat16", "sm_80", half[5:8]),
        ("bfloat16", "gfx942", half[8:11]),
        ("float32", "sm_90", single[0:3]),
        ("float32", "gfx942", single[3:6]),
    ):
        check(cells, compiled[target, f"{label} {D}", KERNELS[kernel]], version)
    grouped = compiled["sm_90", "grouped 128", "attention_dkdv"]
    said = re.search(r"With grouped heads dkdv at 128 on sm_90 spills (\d+) bytes", text)[1]
    check([grouped["regs"], said], grouped, version)


def test_attention_with_more_is_as_its_header_says(compiled):
    text, version = header("attention")
    for label in features():
        fourth = "attention_floors" if label == "topk" else "attention_dterm"
        kernels = [*KERNELS.values(), fourth]
        cells = re.search(rf"^ +{label} +((?:[-\d]+ +)*[-\d]+)$", text, re.MULTILINE)[1].split()
        for (target, kernel), cell in zip(itertools.product(SHARED, kernels), cells, strict=True):
            result = compiled.get((target, f"{label} 128", kernel))
            if result is None or cell == "-":
                assert result is None, (target, label, kernel)
                assert cell == "-", (target, label, kernel)
            elif result["triton"] == version:
                assert result["spills"] == int(cell), (target, label, kernel)


def test_norm_is_as_its_header_says(compiled):
    text, version = header("norm")
    rows = re.findall(r"^ +(fwd|bwd|sum) +(\d+) +\S+ +(.*)$", text, re.MULTILINE)
    assert len(rows) == 9
    for kernel, D, cells in rows:
        for target, pair in (("sm_90", cells.split()[:2]), ("gfx942", cells.split()[2:])):
            check(pair, compiled[target, f"norm {D}", f"norm_{kernel}"], version)


def test_decode_is_as_its_header_says(compiled):
    text, version = header("decode")
    rows = re.findall(r"^ +(\d+) +(16x\S.*)$", text, re.MULTILINE)
    assert len(rows) == 6
    for n, (D, cells) in enumerate(rows):
        half = (("sm_90", 3), ("sm_100", 2), ("sm_80", 3), ("gfx942", 3))
        cells, kind = cells.split(), "bfloat16" if n < 3 else "float32"
        for target, count in half if n < 3 else (("sm_90", 3), ("gfx942", 3)):
            check(cells[:count], compiled[target, f"decode {kind} {D}", "decode_split"], version)
            cells = cells[count:]


def test_shared_memory_fits(compiled):
    for where, result in compiled.items():
        assert result["shared"] <= SHARED[result["target"]], where


def test_matrix_instructions(compiled):
    """16-bit products on matrix units; float32 is not cut to anything less.

    HMMA before sm_90 and for tiles of fewer than 64 rows, wgmma (HGMMA), tcgen05 (UTC..MMA), mfma.
    """
    for where, result in compiled.items():
        target, label, kernel = where
        if kernel.startswith("norm") or kernel in (
            "decode_merge",
            "decode_append",
            "attention_gather",
        ):
            continue
        found = {w for w in result["code"] if "MMA" in w or "mfma" in w} - {"FFMA"}
        num_rows = result["BN" if kernel == "attention_dkdv" else "BM"]
        if target == "gfx942":
            inputs = "f32" if "float32" in label else "bf16"
            assert found, where
            assert all(re.match(rf"v_mfma_f32_\d+x\d+x\d+_?{inputs}", w) for w in found), (
                where,
                found,
            )
        elif "float32" in label:
            assert not found, (where, found)
            assert result["code"]["FFMA"] > 500, where
        elif target == "sm_80" or num_rows < 64:
            assert found == {"HMMA"}, (where, found)
        elif target == "sm_90":
            assert found == {"HGMMA"}, (where, found)
        else:
            assert found == {"UTCHMMA"}, (where, found)


def test_tiles_are_loaded_16_bytes_at_a_time(compiled):
    """All loads of the forward passes; elsewhere a few single numbers of rows stand beside tiles."""
    for where, result in compiled.items():
        if where[2] in ("decode_merge", "decode_append"):
            continue  # one row, a few bytes a thread
        code = result["code"]
        loads = {w: n for w, n in code.items() if w.startswith("LDG") or "_load_" in w}
        wide = sum(n for w, n in loads.items() if w.endswith((".128", "_load_dwordx4")))
        narrow = sum(loads.values()) - wide
        assert wide, where
        if where[1].removesuffix(" 128") in features():
            continue  # what comes beside q, k and v lies as it likes
        assert not narrow or not where[2].endswith("_fwd"), (where, loads)
        assert narrow <= wide or where[1].startswith("norm"), (where, loads)  # a page number a row


if __name__ == "__main__":
    compile_all(lambda result: print(json.dumps(result), flush=True))
