"""Which backend runs: asked (``explain``) and told (``using``, FASTATTN_BACKEND)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastattn.backends import show
from fastattn.checks import given
from fastattn.op import OPS, Op, _replaced


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which backend would run ``function(*args, **kwargs)``, and why the others would not.

    Nothing is computed.  The first row marked ``ok`` is the one that runs; the last line says what derivatives there are.

    >>> import torch, fastattn as fa
    >>> q = torch.zeros(1, 2, 8, 300)
    >>> print(fa.explain(fa.attention, q, q, q, backend="reference").splitlines()[0])
    attention(q: float32[1, 2, 8, 300], k: float32[1, 2, 8, 300], v: float32[1, 2, 8, 300])
    """
    op = getattr(function, "op", None)
    if not isinstance(op, Op):
        known = ", ".join(f"fastattn.{name}" for name in sorted(OPS)) + " and what is made of them"
        raise ValueError(f"explain: fn is {show(function)}; it takes one of {known}")
    seen: list[tuple[Op, Sequence[Any], str]] = []

    def record(op: Op, *call: Any, backend: str = "") -> Any:
        seen.append((op, call, backend))
        raise _Enough

    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        _replaced(record),
        contextlib.suppress(_Enough),
    ):
        function(*args, **kwargs)
    op, call, backend = seen[0]
    rows = op.render(call, only=[row.name for row in op.named(backend)] if backend else None)
    return f"{rows}\nderivatives: {getattr(function, 'derivatives', op.derivatives)}"


class _Enough(Exception):
    """What ``explain`` wanted to see was seen."""


class _Process:
    """Process-wide choice of backend: FASTATTN_BACKEND="name" or "op=name,...", and ``using``."""

    def __init__(self) -> None:
        # (op name, or "" for every op; backend): the last that speaks of an op counts
        self.choices: list[tuple[str, str]] = []
        for item in filter(None, os.environ.get("FASTATTN_BACKEND", "").split(",")):
            op, _, name = item.rpartition("=")
            self.choices.append((op.strip(), name.strip()))
        self.choices.sort(key=lambda choice: choice[0] != "")

    def backend(self, op: str, asked: Any) -> str:
        """The name that a call passes, or what the process says, or "": the first that accepts."""
        if asked is not None:
            if asked.__class__ is not str or not asked:
                OPS[op].named(asked)
            return asked  # type: ignore[no-any-return]
        for about, name in reversed(self.choices):
            if about in ("", op):
                return name
        return ""

    def check(self) -> None:
        """Refuses what the environment asks of ops that do not exist: called when all are known."""
        for op, _ in self.choices:
            if op and op not in OPS:
                raise ValueError(f"FASTATTN_BACKEND: op is {op!r}; known are {', '.join(OPS)}")


PROCESS = _Process()


@contextlib.contextmanager
def using(backend: str, op: str = "") -> Iterator[None]:
    """Run every call (or every call of ``op``) on ``backend`` inside the block; an error if it cannot.

    The innermost block that speaks of an op decides.

    >>> import torch, fastattn as fa
    >>> q = torch.ones(1, 1, 2, 4)
    >>> with fa.using("reference"):
    ...     fa.attention(q, q, q).shape
    torch.Size([1, 1, 2, 4])
    """
    known = {name for o in OPS.values() for b in o.backends for name in (b.name, b.family)}
    if not isinstance(backend, str) or backend not in known:
        raise ValueError(
            f"using: backend is {given(backend)}; known are {', '.join(sorted(known))}"
        )
    if not isinstance(op, str) or op not in ("", *OPS):
        raise ValueError(f"using: op is {given(op)}; known are {', '.join(sorted(OPS))}")
    choice = (op, backend)
    PROCESS.choices.append(choice)
    try:
        yield
    finally:  # its own choice alone: blocks of several threads may overlap
        del PROCESS.choices[len(PROCESS.choices) - 1 - PROCESS.choices[::-1].index(choice)]
