"""Every example runs: docstrings, README.md, CONTRIBUTING.md, docs/.  Links lead somewhere; names exist."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import re
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.op import OPS

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    "fastattn.op",
    "fastattn.masks",
    "fastattn.checks",
    "fastattn.testing",
    *sorted({inspect.getmodule(op.function).__name__ for op in OPS.values()}),
]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def pages() -> list[str]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "kernels").glob("**/*.md")]
    found = found if (ROOT / "docs").is_dir() else []
    return sorted(p.relative_to(ROOT).as_posix() for p in found)


HERE = pytest.mark.skipif(not pages(), reason="the documentation is not beside the tests")
EVERY_PAGE = pytest.mark.parametrize("page", pages())


def run(test: doctest.DocTest) -> None:
    said = io.StringIO()
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.write)
    assert not result.failed, said.getvalue()


# ---- Examples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    for test in doctest.DocTestFinder().find(importlib.import_module(module)):
        if test.examples:
            run(test)


@pytest.mark.parametrize("public", fastattn.__all__)
def test_public_functions_have_an_example(public):
    thing = getattr(fastattn, public)
    if callable(thing) and not isinstance(thing, type):
        assert ">>>" in thing.__doc__, f"fastattn.{public} shows no example"


def blocks(page: str) -> list[tuple[int, str]]:
    """(line, text) of every fenced Python block."""
    text = (ROOT / page).read_text()
    return [
        (text[: m.start(1)].count("\n"), m[1])
        for m in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)])
def test_examples_of_a_page(page):
    """The blocks of a page share their names, from top to bottom."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for line, text in blocks(page):
        if ">>>" in text:
            test = doctest.DocTestParser().get_doctest(text, names, page, page, line)
            test.globs = names
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            said = io.StringIO()
            assert not runner.run(test, out=said.write, clear_globs=False).failed, said.getvalue()
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * line + text, page, "exec"), names)


# ---- Links and names ----------------------------------------------------------------------------------


def anchor(title: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@EVERY_PAGE
def test_links(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, place = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} points to {target}"
        if place:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert place in map(anchor, titles), f"{page} points to {target}"


@EVERY_PAGE
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    words = re.findall(r"`((?:csrc|kernels|fastattn|bench|tests|docs)/[\w./]+)`", text)
    missing = [word for word in words if not (ROOT / word).exists()]
    assert not missing, f"{page} names {', '.join(missing)}"


@EVERY_PAGE
def test_names_of_the_package_exist(page):
    for name in re.findall(r"`fa\.([\w.]+)", (ROOT / page).read_text()):
        thing = fastattn
        for part in name.split("."):
            assert hasattr(thing, part), f"{page} names fa.{name}"
            thing = getattr(thing, part)


def test_dir_shows_the_names_that_users_use():
    importlib.import_module("fastattn.testing")
    assert dir(fastattn) == sorted([*fastattn.__all__, "__version__", "testing"])


@EVERY_PAGE
def test_commands_exist(page):
    """``fastattn x`` and ``make x`` in a text are commands of the package and of the Makefile."""
    text = (ROOT / page).read_text()
    known = {"info", "verify", "bench", "report"}
    spoken = set(re.findall(r"(?:`|^    )fastattn ([a-z]\w*)", text, re.MULTILINE))
    assert spoken <= known, f"{page}: {spoken - known}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    spoken = set(re.findall(r"(?:`|^    )make ([a-z][\w-]*)", text, re.MULTILINE))
    assert spoken <= targets, f"{page}: {spoken - targets}"


@HERE
def test_every_op_has_a_page_and_every_option_is_on_it():
    for op in OPS.values():
        found = [
            text
            for p in sorted((ROOT / "docs").glob("*.md"))
            if f"`fa.{op.name}(" in (text := p.read_text())
        ]
        assert len(found) == 1, f"{len(found)} pages of docs/ have a signature of fa.{op.name}"
        for option in inspect.signature(op.function).parameters:
            assert re.search(rf"\b{option}\b", found[0]), (
                f"the page of {op.name} does not say what {option} is"
            )
        assert "## Limits" in found[0]


@HERE
def test_every_public_name_is_in_the_readme_or_the_docs():
    text = "".join((ROOT / page).read_text() for page in pages())
    missing = [name for name in fastattn.__all__ if f"fa.{name}" not in text]
    assert not missing


@HERE
def test_the_readme_has_its_tables():
    text = (ROOT / "README.md").read_text()
    for table in ("support", "speed"):
        assert len(re.findall(rf"^<!-- {table}:(?:begin|end) -->$", text, re.MULTILINE)) == 2


def test_prove_the_examples():
    """An example that is wrong fails."""
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    with pytest.raises(AssertionError, match="Expected"):
        run(wrong)
