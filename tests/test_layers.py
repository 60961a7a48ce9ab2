"""Who may import or include what; how long files may be; what importing the package loads.

One file because the rules of one tree are read together.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "kernels", "fastattn", "bench", "tests")
CPP = (".h", ".cc", ".cu", ".cuh")

SOURCES = (ROOT / "csrc").is_dir()


def files(*endings: str, under: tuple[str, ...] = FOLDERS) -> Iterator[Path]:
    if not SOURCES:
        pytest.skip("the sources are not beside the tests")
    for folder in under:
        yield from sorted(
            p
            for p in (ROOT / folder).rglob("*")
            if p.suffix in endings and "__pycache__" not in p.parts
        )


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def report(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


# ---- C++: #include ------------------------------------------------------------------------------------

STANDARD = r"<[a-z_]+>|<(?:cstd)?[a-z]+>"
# The first pattern that matches a file says what it may include.  {op} is the kernel's own folder.
MAY_INCLUDE = (
    (r"csrc/core/.*", (STANDARD, r'"csrc/core/.*"')),
    (
        r"csrc/cpu/parallel\.h",
        (STANDARD, r"<omp\.h>", r"<pthread\.h>", r"<sys/mman\.h>", r'"csrc/core/.*"'),
    ),
    (r"csrc/cpu/.*", (STANDARD, r"<immintrin\.h>", r'"csrc/(core|cpu)/.*"', "FASTATTN_CPU_FILE")),
    (r"csrc/cuda/.*", (STANDARD, r"<cuda.*>", r'"csrc/(core|cuda|emulate)/.*"')),
    (r"csrc/emulate/.*", (STANDARD, r'"csrc/(core|cuda|emulate)/.*"')),
    (
        r"csrc/python/.*",
        (
            STANDARD,
            r"<pybind11/.*>",
            r"<cpuid\.h>",
            r'"csrc/(core|python)/.*"',
            r'"csrc/cpu/(parallel|ceilings)\.h"',
            r'"kernels/\w+/op\.h"',
        ),
    ),
    (r"kernels/(?P<op>\w+)/op\.h", (STANDARD, r'"csrc/core/.*"')),
    (
        r"kernels/(?P<op>\w+)/cpu(_\w+)?\.(cc|h)",
        (STANDARD, r'"kernels/{op}/(op|cpu(_\w+)?)\.h"', r'"csrc/(core|cpu)/.*"'),
    ),
    (
        r"kernels/(?P<op>\w+)/cuda\w*\.cu",
        (STANDARD, r'"kernels/{op}/op\.h"', r'"csrc/(core|cuda)/.*"'),
    ),
    (r"tests/.*", (STANDARD, r'"(csrc|kernels)/.*"')),
)


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a C++ file without comments."""
    text = re.sub(
        r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), path.read_text(), flags=re.DOTALL
    )
    for number, line in enumerate(text.splitlines(), 1):
        yield number, re.sub(r"//.*", "", line)


def test_includes():
    found = []
    for path in files(*CPP):
        rule = next((r for r in MAY_INCLUDE if re.fullmatch(r[0], name(path))), None)
        if rule is None:
            found.append(f"{name(path)}: no rule says what this file may include")
            continue
        own = re.fullmatch(rule[0], name(path)).groupdict()
        allowed = [pattern.replace("{op}", own.get("op", "")) for pattern in rule[1]]
        for number, line in code_lines(path):
            if (m := re.match(r"\s*#\s*include\s+(.*\S)", line)) and not any(
                re.fullmatch(p, m[1]) for p in allowed
            ):
                found.append(f"{name(path)}:{number}: {m[0].strip()}")
    report(found)


# (files, what must not stand in them outside comments, why)
FORBIDDEN = (
    (r".*", r"#\s*include.*(torch/|ATen|c10/)", "no torch header anywhere"),
    (
        r"(csrc/core|kernels)/.*",
        r"\b(getenv|printf|puts|std::c(out|err)|fopen|fstream)\b",
        "kernels do no I/O",
    ),
    (
        r"(?!csrc/cpu/parallel\.h).*",
        r"#\s*pragma omp|\bpthread_|std::j?thread\b",
        "threads are parallel.h's",
    ),
    (
        r"kernels/.*",
        r"\b(malloc|calloc|realloc)\b|\bnew \w",
        "memory comes from Python or scratch()",
    ),
    (r"kernels/.*", r"<<<", "kernels are launched through launch.h"),
    (r".*", r"\bassert\(", "an assertion is no answer to a user: FASTATTN_CHECK"),
)


def test_forbidden_words():
    found = []
    for path in files(*CPP, under=("csrc", "kernels")):
        for number, line in code_lines(path):
            found += [
                f"{name(path)}:{number}: {line.strip()}   ({why})"
                for where, what, why in FORBIDDEN
                if re.fullmatch(where, name(path)) and re.search(what, line)
            ]
    report(found)


def test_macros_are_few_and_named():
    macros = {}
    for path in files(*CPP, under=("csrc", "kernels")):
        for number, line in code_lines(path):
            if m := re.match(r"\s*#\s*define\s+(\w+)", line):
                macros.setdefault(m[1], f"{name(path)}:{number}: #define {m[1]}")
    report([where for macro, where in macros.items() if not macro.startswith("FASTATTN_")])
    assert len(macros) < 10, "\n".join(macros.values())


# ---- Python: import -----------------------------------------------------------------------------------

STDLIB = rf"({'|'.join(sorted(sys.stdlib_module_names))})(\..*)?"
TORCH, OWN_TABLE = (
    r"torch(\..*)?",
    r"fastattn\.(op|arguments|backends|transforms|groups|choice|masks|bias|dropout|rows|checks|testing)",
)
MAY_IMPORT = (
    (r"kernels/(?P<op>\w+)/reference\.py", (TORCH,)),
    (r"kernels/common/.*", (TORCH, r"triton(\..*)?", r"fastattn\.kernels\.common(\..*)?")),
    (
        r"kernels/(?P<op>\w+)/triton(_\w+)?\.py",
        (TORCH, r"triton(\..*)?", r"fastattn\.kernels\.(common|{op}\.triton_\w+)(\..*)?"),
    ),
    (
        r"kernels/(?P<op>\w+)/(api|cases|definition|packed)\.py",
        (TORCH, OWN_TABLE, r"fastattn\.kernels\.{op}(\.(reference|cases|definition|packed).*)?"),
    ),
    (  # functions that are made of an op
        r"kernels/(?P<op>\w+)/(columns|grouped|topk)\.py",
        (TORCH, OWN_TABLE, r"fastattn\.kernels\.{op}\.api\..*"),
    ),
    (r"kernels/__init__\.py", ()),
    (
        r"fastattn/__init__\.py",
        (r"fastattn(\.\w+)?", r"fastattn\.kernels\.\w+\.(api|columns|grouped|topk)\.\w+"),
    ),
    (
        r"fastattn/cli/.*",
        (
            TORCH,
            r"fastattn",
            r"fastattn\.(op|backends|testing|cli|bench)(\..*)?",
            r"matplotlib(\..*)?",
        ),
    ),
    (r"fastattn/__main__\.py", (r"fastattn\.cli",)),
    (r"fastattn/.*", (TORCH, OWN_TABLE)),
    (
        r"bench/.*",
        (
            TORCH,
            r"fastattn",
            OWN_TABLE,
            r"fastattn\.bench(\..*)?",
            r"(matplotlib|pytest|numpy)(\..*)?",
        ),
    ),
    (r"tests/.*", (r".*",)),
)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            inside = base in ("fastattn", "fastattn.kernels") or base.startswith(
                "fastattn.kernels."
            )
            yield from (
                (node.lineno, f"{base}.{alias.name}" if inside else base) for alias in node.names
            )


def test_imports():
    found = []
    for path in files(".py"):
        rule = next((r for r in MAY_IMPORT if re.fullmatch(r[0], name(path))), None)
        if rule is None:
            found.append(f"{name(path)}: no rule says what this file may import")
            continue
        own = re.fullmatch(rule[0], name(path)).groupdict()
        allowed = [STDLIB, *(pattern.replace("{op}", own.get("op", "")) for pattern in rule[1])]
        for number, module in imports(path):
            if not any(re.fullmatch(pattern, module) for pattern in allowed):
                found.append(f"{name(path)}:{number}: import {module}")
    report(found)


def test_user_input_is_never_asserted():
    """``python -O`` strips assertions."""
    report([
        f"{name(path)}:{node.lineno}: assert"
        for path in files(".py", under=("fastattn", "kernels"))
        if not name(path).startswith("fastattn/cli/")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ])  # fmt: skip


def test_environment_is_read_in_one_place():
    """FASTATTN_BACKEND and FASTATTN_LOG are all there is, and choice.py reads them; backends.py asks for the interpreter of Triton."""
    found, names = [], set()
    for path in files(".py", under=("fastattn", "kernels")):
        text = path.read_text()
        names |= set(re.findall(r'environ[^"]*"(FASTATTN_\w+)"', text))
        if "environ" in text and not re.fullmatch(
            r"fastattn/(backends|choice|cli/.*)\.py", name(path)
        ):
            found.append(f"{name(path)}: reads the environment")
    report(found)
    assert names <= {"FASTATTN_BACKEND", "FASTATTN_LOG"}


# ---- Files --------------------------------------------------------------------------------------------


def header(path: Path) -> str:
    """What a file says before its first statement."""
    lines = path.read_text().splitlines()
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse("\n".join(lines))) or ""
    return "\n".join(line for line in lines[:60] if line.startswith("//"))


def test_files_are_short():
    """Over 400 lines the header says why: a sentence with "One file because".  Over 700 there is no reason."""
    found = []
    for path in files(".py", *CPP):
        count = len(path.read_text().splitlines())
        if count > 700:
            found.append(f"{name(path)}: {count} lines; split it or cut it")
        elif count > 400 and "One file because" not in header(path):
            found.append(f'{name(path)}: {count} lines and no "One file because ..." in its header')
    report(found)


def test_files_say_what_they_are():
    report(
        [
            f"{name(path)}: no header"
            for path in files(".py", *CPP)
            if path.read_text().strip() and not header(path)
        ]
    )


def test_no_drawers():
    """No file or folder is named after nothing; ``common`` is the one exception, below kernels."""
    drawers = re.compile(r"(^|_)(utils?|helpers?|misc|common|stuff|tmp|new|old|v\d+)(_|$)")
    found = [
        name(p)
        for p in files(".py", *CPP)
        for part in Path(name(p)).with_suffix("").parts
        if drawers.search(part)
    ]
    report([f for f in found if not f.startswith("kernels/common/")])


def test_todos_name_their_event():
    found = []
    for path in files(".py", *CPP, under=("csrc", "kernels", "fastattn", "bench")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\b(FIXME|XXX|HACK)\b", line) or re.search(
                r"\bTODO\b(?!.*\b(when|once|after|until)\b)", line
            ):
                found.append(f"{name(path)}:{number}: {line.strip()}")
    report(found)


def test_kernel_folders_are_complete():
    """A folder of kernels/ is an op: README, api and reference first, then fast paths."""
    for folder in sorted({p.parent for p in files(".py", under=("kernels",))} - {ROOT / "kernels"}):
        if folder.name not in ("common", "__pycache__"):
            missing = {"README.md", "api.py", "reference.py"} - {p.name for p in folder.iterdir()}
            assert not missing, f"kernels/{folder.name} has no {', '.join(sorted(missing))}"


# ---- The package --------------------------------------------------------------------------------------


def python(program: str, tmp_path: Path, **env: str) -> str:
    """Output of a program in a fresh interpreter, elsewhere than in the repository."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | env, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_kernel(tmp_path):
    loaded = python("import sys, fastattn; print(*sys.modules)", tmp_path).split()
    assert "fastattn.op" in loaded
    for module in (
        "triton",
        "fastattn._cpu",
        "fastattn._cuda",
        "fastattn.cli",
        "fastattn.bench",
        "fastattn.testing",
    ):
        assert module not in loaded, f"import fastattn loads {module}"
    assert not [m for m in loaded if m.startswith("fastattn.kernels.") and m.endswith("triton")]


BLOCKED = """
import sys
for module in ("triton", "fastattn._cpu", "fastattn._cuda"):
    sys.modules[module] = None  # importing it raises ImportError
import torch, fastattn as fa
q = torch.randn(1, 2, 5, 8, requires_grad=True)
fa.attention(q, q, q, causal=True, backend="reference").sum().backward()
fa.add_norm(q, q, weight=torch.ones(8), backend="reference").sum().backward()
assert torch.isfinite(q.grad).all()
print(fa.explain(fa.attention, q, q, q))
"""


def test_reference_works_alone(tmp_path):
    *lines, _ = python(BLOCKED, tmp_path).splitlines()
    assert lines[-1].split() == ["reference", "ok"]
    for line in lines[1:-1]:
        assert "no:" in line, line


def test_public_names_are_sorted_documented_and_typed():
    assert fastattn.__all__ == sorted(fastattn.__all__)
    for public in fastattn.__all__:
        thing = getattr(fastattn, public)
        assert thing.__doc__, f"fastattn.{public} has no docstring"
        if callable(thing) and not isinstance(thing, type):
            parameters = thing.__code__.co_varnames[
                : thing.__code__.co_argcount + thing.__code__.co_kwonlyargcount
            ]
            untyped = {*parameters, "return"} - set(thing.__annotations__)
            assert not untyped or hasattr(thing, "__wrapped__"), (
                f"fastattn.{public}: {untyped} have no type"
            )


# ---- Prove the rules ----------------------------------------------------------------------------------

BROKEN = {
    "csrc/core/a.h": ("// a\n#include <torch/extension.h>\n", test_includes),
    "csrc/core/b.h": ('// b\n#include "csrc/cpu/simd.h"\n', test_includes),
    "csrc/cpu/c.h": ("// c\n#include <omp.h>\n", test_includes),
    "csrc/extra/d.h": ("// d\n", test_includes),
    "kernels/norm/cpu.cc": ('// e\n#include "kernels/attention/op.h"\n', test_includes),
    "kernels/pack/cpu.cc": ('// f\nint x = getenv("X") != nullptr;\n', test_forbidden_words),
    "kernels/routing/cpu.cc": ("// g\n#pragma omp parallel for\n", test_forbidden_words),
    "csrc/core/h.h": ("// h\n#define MAX(a, b) a\n", test_macros_are_few_and_named),
    "kernels/norm/reference.py": ('"""a"""\nimport fastattn\n', test_imports),
    "kernels/norm/triton.py": ('"""b"""\ndef f():\n    from fastattn.kernels.norm import api\n', test_imports),
    "kernels/norm/api.py": ('"""c"""\nimport triton\n', test_imports),
    "kernels/pack/api.py": ('"""d"""\nfrom fastattn.kernels.norm.api import add_norm\n', test_imports),
    "fastattn/masks.py": ('"""e"""\nimport numpy\n', test_imports),
    "fastattn/checks.py": ('"""f"""\nfrom fastattn.kernels.norm import api\n', test_imports),
    "fastattn/bias.py": ('"""g"""\ndef f(x):\n    assert x\n', test_user_input_is_never_asserted),
    "fastattn/rows.py": ('"""h"""\nimport os\nX = os.environ.get("FASTATTN_FAST")\n', test_environment_is_read_in_one_place),
    "bench/long.py": ('"""i"""\n' + "\n" * 500, test_files_are_short),
    "bench/longer.py": ('"""One file because."""\n' + "\n" * 800, test_files_are_short),
    "bench/bare.py": ("X = 1\n", test_files_say_what_they_are),
    "fastattn/utils.py": ('"""j"""\n', test_no_drawers),
    "bench/later.py": ('"""k"""\n# TODO make faster\n', test_todos_name_their_event),
}  # fmt: skip


@pytest.mark.parametrize("path", BROKEN)
def test_a_broken_rule_is_noticed(path, tmp_path, monkeypatch):
    text, rule = BROKEN[path]
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    with pytest.raises(AssertionError, match=re.escape(path)):
        rule()
