"""Backends: the ways to compute an op, with the limits of each and the sentence for when one fails.

A row names its functions as strings, which are imported when it is first chosen.  Limits look at the facts that the
op states of a call, and at the machine.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Limit:
    """A condition on a call's facts, and the sentence for when it fails."""

    holds: Callable[[dict[str, Any]], bool]
    why: Callable[[dict[str, Any]], str]


def takes(fact: str, *allowed: Any) -> Limit:
    names = ", ".join(show(a) for a in allowed)
    return Limit(
        lambda facts: facts[fact] in allowed,
        lambda facts: f"{fact} is {show(facts[fact])} (takes {names})",
    )


def at_most(fact: str, limit: int) -> Limit:
    return Limit(
        lambda facts: facts[fact] <= limit,
        lambda facts: f"{fact} is {facts[fact]} (at most {limit})",
    )


def available(probe: Callable[[], str]) -> Limit:
    """``probe`` returns why the backend cannot run on this machine, or "" when it can."""
    return Limit(lambda _: not probe(), lambda _: probe())


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.  ``forward`` and ``backward`` are "module:attribute", imported on first use.

    The functions take the outputs first, then the op's arguments.  ``workspace`` names further tensors
    (after the outputs) that the backward wants allocated; it gets the backward's arguments.
    """

    name: str
    limits: tuple[Limit, ...]
    forward: str
    backward: str
    device: str = "cpu"  # where the contract tests run it
    deterministic: bool = True
    workspace: Callable[..., list[torch.Tensor]] | None = None

    def beside(self, name: str) -> Callable[..., Any]:
        """The function ``name`` that stands where ``forward`` stands."""
        return load(re.sub(r"[a-z]+$", name, self.forward))

    def why_not(self, facts: dict[str, Any]) -> list[str]:
        # Availability comes last in each row, so that the sentence about the call is read first.
        return [limit.why(facts) for limit in self.limits if not limit.holds(facts)]

    @property
    def family(self) -> str:
        return self.name.split("-")[0]


def reference() -> Backend:
    """The op's own formula; the only row without limits, and the only one without kernels."""
    return Backend("reference", (), "", "")


@functools.cache
def compiled_library() -> Any:
    try:
        return importlib.import_module("fastattn._cpu")
    except ImportError:
        return None


CPU_ISAS = ("avx512bf16", "avx512", "avx2", "scalar")


def why_no_isa(isa: str) -> str:
    native = compiled_library()
    if native is None:
        return "the compiled CPU library is missing (reinstall with a C++20 compiler)"
    if isa not in native.compiled:
        return f"not compiled for {isa}"
    return "" if isa in native.isas else f"this processor has no {isa}"


def cpu(op: str, *limits: Limit, workspace: Any = None) -> tuple[Backend, ...]:
    """One row per instruction set, widest first; all from the same sources, kernels/<op>/cpu*.cc."""
    return tuple(
        Backend(
            f"cpu-{isa}",
            (
                takes("device", "cpu"),
                *limits,
                available(functools.partial(why_no_isa, isa)),
            ),
            f"fastattn._cpu:{isa}.{op}_fwd",
            f"fastattn._cpu:{isa}.{op}_bwd",
            workspace=workspace,
        )
        for isa in CPU_ISAS
    )


@functools.cache
def triton_device() -> str:
    """Triton kernels run on the GPU, or on the CPU through the interpreter (TRITON_INTERPRET=1)."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@functools.cache
def why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if triton_device() == "cuda" and not torch.cuda.is_available():
        return "no GPU is present (TRITON_INTERPRET=1 runs the kernel on the CPU, slowly)"
    return ""


def triton(op: str, *limits: Limit) -> Backend:
    return Backend(
        "triton",
        (takes("device", triton_device()), *limits, available(why_no_triton)),
        f"fastattn.kernels.{op}.triton:forward",
        f"fastattn.kernels.{op}.triton:backward",
        device=triton_device(),
    )


@functools.cache
def load(where: str) -> Callable[..., Any]:
    module, _, path = where.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))  # type: ignore[return-value]


def show(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", None) or str(value)
