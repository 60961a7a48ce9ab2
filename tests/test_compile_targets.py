"""Every Triton kernel, compiled ahead of time for processors that are not here, and its machine code read.

The launchers themselves choose: they are called as usual, under a driver that only says which processor it
drives, so that what is compiled is what would run there.  Asked of the result: the registers and spills that
the kernel's header states, shared memory that the processor has, the matrix instructions meant, loads of
16 bytes.  A compiler of another version than the header's may spend registers otherwise; the rest must hold.

This file is two programs: the tests, and the compiling, which has to be a process of its own because the
tests' may interpret Triton (``python tests/test_compile_targets.py`` prints what it finds, a JSON object a line).
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

SHARED = {
    "sm_80": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # bytes a block may have
KERNELS = {"fwd": "attention_fwd", "dq": "attention_dq", "dkdv": "attention_dkdv"}
WIDTHS = (64, 128, 256)

# ---- Compiling: runs in a process of its own ----------------------------------------------------------


class Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


def calls(attention, norm):
    """(label, targets, call) of everything to compile; a call is a launch as users' calls end in it."""
    every = tuple(SHARED)

    def attend(dtype, D, DV=None, Hk=128, N=128, layout=None, dlse=True):
        Hq, DV = 128, DV or D
        q, dq = (torch.empty(2, Hq, N, D, dtype=dtype) for _ in range(2))
        k, dk = (torch.empty(2, Hk, N, D, dtype=dtype) for _ in range(2))
        v, dv = (torch.empty(2, Hk, N, DV, dtype=dtype) for _ in range(2))
        o, do = (torch.empty(2, Hq, N, DV, dtype=dtype) for _ in range(2))
        lse = torch.empty(2, Hq, N)
        mask = [0, 1 << 30, 0, 1 << 30, 1 << 30]
        attention.forward(o, lse, q, k, v, mask, D**-0.5)
        attention.backward(dq, dk, dv, do, lse if dlse else None, q, k, v, o, lse, mask, D**-0.5)

    def normalise(dtype, D, kind, given):
        x = torch.empty(64, D, dtype=dtype)
        rows, parameter = torch.empty(64), torch.empty(D)
        bias, weight, beta = (
            parameter if name in given.split() else None for name in ("bias", "weight", "beta")
        )
        residual = x if "residual" in given.split() else None
        norm.forward(x, x, rows, rows, x, residual, bias, weight, beta, 1e-5, kind)
        norm.backward(
            x,
            parameter,
            parameter,
            parameter,
            x,
            residual,
            x,
            bias,
            weight,
            beta,
            rows,
            rows,
            1e-5,
            kind,
        )

    for D in WIDTHS:
        yield f"bfloat16 {D}", every, lambda D=D: attend(torch.bfloat16, D)
        yield f"float32 {D}", ("sm_90", "gfx942"), lambda D=D: attend(torch.float32, D)
    yield "float16 128", ("sm_90",), lambda: attend(torch.float16, 128)
    yield "few 128", ("sm_80", "sm_90"), lambda: attend(torch.bfloat16, 128, N=32)
    yield "grouped 128", ("sm_90",), lambda: attend(torch.bfloat16, 128, Hk=32, N=1024)
    yield "padded 40", ("sm_90",), lambda: attend(torch.bfloat16, 40, dlse=False)
    for D, kind, given in (
        (768, 0, "residual bias weight beta"),
        (4096, 1, "residual weight"),
        (16384, 1, "weight"),
    ):
        yield f"norm {D}", every, lambda D=D, k=kind, g=given: normalise(torch.bfloat16, D, k, g)


def compile_all(say) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastattn.kernels.attention import triton as attention
    from fastattn.kernels.common import triton_launch
    from fastattn.kernels.norm import triton as norm

    targets = {
        name: GPUTarget("cuda", int(name[3:]), 32) for name in SHARED if name.startswith("sm")
    }
    targets["gfx942"] = GPUTarget("hip", "gfx942", 64)
    run, found = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        size = next((a._asdict() for a in args if hasattr(a, "BN")), {})
        tile = {name: side.value for name, side in size.items() if name in ("BM", "BN")}
        found.append((self.__name__, tile | options, kernel))

    JITFunction.run = compile_only
    for target, processor in targets.items():
        driver.set_active(Driver(processor))
        triton_launch.target.cache_clear()
        for module in (attention, norm):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
        for label, wanted, call in calls(attention, norm):
            if target in wanted:
                found.clear()
                call()
                for name, options, kernel in found:
                    chosen = {
                        n: options[n]
                        for n in ("BM", "BN", "num_warps", "num_stages")
                        if n in options
                    }
                    say({
                        "target": target, "label": label, "kernel": name, "shared": kernel.metadata.shared,
                        "triton": triton.__version__, **chosen, **read(kernel.asm),
                    })  # fmt: skip


def read(asm) -> dict:
    """Registers, bytes or registers spilled, and how often each instruction occurs that a test asks about."""
    if "cubin" not in asm:
        text = asm["amdgcn"]
        report = {
            n: int(m) for n, m in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)
        }
        words = re.findall(r"^\s*(v_mfma_\w+|(?:buffer|global)_load_\w+)", text, re.MULTILINE)
        return {
            "regs": report["vgpr_count"],
            "spills": report["vgpr_spill_count"],
            "code": collections.Counter(words),
        }
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    words = [
        name + (".128" if ".128" in rest else "")
        for name, rest in re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA|FFMA|LDGSTS|LDG)\b(\S*)", sass)
    ]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"regs": int(registers), "spills": int(stack), "code": collections.Counter(words)}


# ---- Testing ------------------------------------------------------------------------------------------

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed"
)


@pytest.fixture(scope="module")
def compiled() -> dict:
    """{(target, label, kernel): what came out}"""
    done = subprocess.run(
        [sys.executable, __file__],
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = map(json.loads, done.stdout.splitlines())
    return {(r["target"], r["label"], r["kernel"]): r for r in results}


def header(op: str) -> str:
    return importlib.util.find_spec(f"fastattn.kernels.{op}.triton").loader.get_source(
        f"fastattn.kernels.{op}.triton"
    )


def check_row(row: list[str], result: dict, version: str) -> None:
    """[tile, regs, spills] of a header, or [regs, spills], against the compiler's report."""
    *tile, regs, spills = row
    if tile:
        assert tile == [
            f"{result['BM']}x{result['BN']}/{result['num_warps']}/{result['num_stages']}"
        ]
    if result["triton"].startswith(version):
        assert (result["regs"], result["spills"]) == (int(regs), int(spills))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("D", WIDTHS)
def test_attention_is_as_its_header_says(compiled, kernel, D):
    text = header("attention")
    version = re.search(r"from: Triton (\d+\.\d+\.\d+)", text)[1]
    half, single = (
        re.findall(rf"^ +{kernel} +{D} +(\S.*)$", part, re.MULTILINE)
        for part in text.split("float32 ")[:2]
    )
    cells = half[0].split()
    for target, row in (
        ("sm_90", cells[0:3]), ("sm_100", cells[3:5]), ("sm_80", cells[5:8]), ("gfx942", cells[8:11]),
    ):  # fmt: skip
        check_row(row, compiled[target, f"bfloat16 {D}", KERNELS[kernel]], version)
    cells = single[0].split()
    for target, row in (("sm_90", cells[0:3]), ("gfx942", cells[3:6])):
        check_row(row, compiled[target, f"float32 {D}", KERNELS[kernel]], version)


def test_norm_is_as_its_header_says(compiled):
    text = header("norm")
    version = re.search(r"from: Triton (\d+\.\d+\.\d+)", text)[1]
    rows = re.findall(
        r"^ +(fwd|bwd|sum) +(\d+) +\S+ +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE
    )
    assert len(rows) >= 6
    for kernel, D, *cells in rows:
        check_row(cells[0:2], compiled["sm_90", f"norm {D}", f"norm_{kernel}"], version)
        check_row(cells[2:4], compiled["gfx942", f"norm {D}", f"norm_{kernel}"], version)


def test_shared_memory_fits(compiled):
    for where, result in compiled.items():
        assert result["shared"] <= SHARED[result["target"]], where


def test_matrix_instructions(compiled):
    """16-bit products on matrix units: HMMA, wgmma (HGMMA), tcgen05 (UTC..MMA), mfma.  Float32 stays float32."""
    for where, result in compiled.items():
        target, label, kernel = where
        if kernel.startswith("norm"):
            continue
        mma = {w for w in result["code"] if "MMA" in w or "mfma" in w} - {"FFMA"}
        if target == "gfx942":
            assert mma, where
            inputs = "f32" if label.startswith("float32") else "bf16"
            assert all(
                re.search(rf"v_mfma_f32_\w*{inputs}$|x\d+_?{inputs}|_{inputs}", w) for w in mma
            ), (where, mma)
        elif label.startswith("float32"):
            assert not mma, (where, mma)
            assert result["code"]["FFMA"] > 100, where
        elif target == "sm_80" or result["BN"] * result["BM"] < 64 * 64:
            assert mma == {"HMMA"}, (where, mma)
        elif target == "sm_90":
            assert mma == {"HGMMA"}, (where, mma)
        else:
            assert any(w.startswith("UTC") for w in mma), (where, mma)


def test_tiles_are_loaded_16_bytes_at_a_time(compiled):
    """Everything in the forward pass; elsewhere single numbers of rows are loaded beside the tiles."""
    for where, result in compiled.items():
        code = result["code"]
        if result["target"] == "gfx942":
            wide = sum(n for w, n in code.items() if w.endswith("_load_dwordx4"))
            narrow = sum(
                n for w, n in code.items() if "_load_" in w and not w.endswith("_load_dwordx4")
            )
        else:
            wide = code.get("LDG.128", 0) + code.get("LDGSTS.128", 0)
            narrow = code.get("LDG", 0) + code.get("LDGSTS", 0)
        assert wide, where
        if where[2] in ("attention_fwd", "norm_sum"):
            assert not narrow, where


if __name__ == "__main__":
    compile_all(lambda result: print(json.dumps(result), flush=True))
