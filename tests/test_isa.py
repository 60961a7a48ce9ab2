"""What the compiler made of the CPU kernels: each instruction set in its own namespace and nowhere else.

One instruction of AVX in a function that every processor runs is a crash on the processors without it, and
no test on a machine with AVX can see it: so the machine code is read.
"""

import collections
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastattn import _cpu

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("csrc/cpu/*.cc"), *ROOT.glob("kernels/*/cpu*.cc")])

# Instructions as objdump prints them, bytes first. In 64-bit code AVX, AVX2, FMA and F16C begin with the byte
# c4 or c5 (after an address prefix), AVX-512 with 62, or with c4 or c5 when they compute masks.
PREFIX = "(6[457] |[23]e )*"
AVX512 = re.compile(rf"^{PREFIX}62 |\tk[a-z]+ ")
AVX = re.compile(rf"^{PREFIX}(c4|c5|62) ")
DOT = re.compile(r"\t(vdpbf16ps|vcvtne2?ps2?\w*bf16\w*|vpdpbusds?|vpdpwssds?) ")
FORBIDDEN = {"avx512bf16": None, "avx512": DOT, "avx2": AVX512, "scalar": AVX, "": AVX}


@pytest.fixture(scope="module")
def instructions():
    """{namespace: {instruction: a function that has it}}; the namespace is "" outside the kernels."""
    if platform.machine() != "x86_64":
        pytest.skip("reads x86 machine code")
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    listing = subprocess.run(
        ["objdump", "-d", "--insn-width=15", _cpu.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    namespace = function = ""
    for line in listing.splitlines():
        if symbol := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = symbol[1]
            own = re.match(r"_ZNK?8fastattn3cpu\d+(avx512bf16|avx512|avx2|scalar)\d", function)
            namespace = own[1] if own else ""
        elif "\t" in line:
            found[namespace][line.split("\t", 1)[1].strip()] = function
    assert found[""], "the module has no symbols"
    return found


@pytest.mark.parametrize("namespace", FORBIDDEN)
def test_no_instruction_of_a_better_processor(instructions, namespace):
    if forbidden := FORBIDDEN[namespace]:
        wrong = {f: i for i, f in instructions[namespace].items() if forbidden.search(i)}
        assert not wrong, f"{len(wrong)} functions, such as {next(iter(wrong.items()))}"


@pytest.mark.parametrize(
    ("namespace", "expected"),
    [("avx512bf16", "%zmm"), ("avx512bf16", "vdpbf16ps"), ("avx512", "%zmm"), ("avx512", "vfmadd"),
     ("avx2", "%ymm"), ("avx2", "vfmadd"), ("avx2", "vcvtph2ps"), ("scalar", "mulps")],
)  # fmt: skip
def test_each_instruction_set_is_used(instructions, namespace, expected):
    assert any(expected in i for i in instructions[namespace])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_what_is_compiled_once_is_included_above_the_regions(source):
    """A header with ``#pragma once`` below isa.h would be compiled for the best processor and shared with all."""
    above, mark, below = source.read_text().partition('#include "csrc/cpu/isa.h"')
    assert mark
    assert f'#define FASTATTN_CPU_FILE "{source.relative_to(ROOT).as_posix()}"' in above
    for header in re.findall(r'#include [<"](.+)[>"]', below):
        assert (ROOT / header).exists(), (
            f"{header} is a system header; it belongs above csrc/cpu/isa.h"
        )
        assert "#pragma once" not in (ROOT / header).read_text(), (
            f"{header} belongs above csrc/cpu/isa.h"
        )


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_the_scalar_build_compiles_for_another_architecture(source):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if not compiler:
        pytest.skip("aarch64-linux-gnu-g++ is not installed")
    flags = [
        "-std=c++20",
        "-O1",
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    subprocess.run([compiler, *flags, f"-I{ROOT}", "-c", source, "-o", "/dev/null"], check=True)
