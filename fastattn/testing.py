"""What proves a kernel: generated cases, poisoned memory, and an error budget that nobody types in.

Public, so that code built on fastattn can prove its own kernels the same way.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.backends import Backend, compiled_library
from fastattn.bias import Bias
from fastattn.op import OPS, Case, Op, _replaced

__all__ = ["Failure", "check", "every", "poisoned", "prove", "prove_reference"]


class Failure(AssertionError):
    """A kernel's result is outside its budget."""


def every(
    ops: Callable[[Op], bool] = lambda op: True,
    backends: Callable[[Backend], bool] = lambda b: True,
) -> Iterator[tuple[Op, Backend, torch.dtype, Case]]:
    """Every op x backend x dtype x case that the descriptors name."""
    for op in filter(ops, OPS.values()):
        yield from itertools.product((op,), filter(backends, op.backends), op.dtypes, op.cases)


# ---------------------------------------------------------------------------------------------------
# Inputs


def maker(
    dtype: torch.dtype, device: str, layout: str | None, seed: int = 0
) -> Callable[..., torch.Tensor]:
    """``randn(*shape)`` in the given dtype; ``wide=True`` gives float32.  Values are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, wide: bool | None = False) -> torch.Tensor:
        x = torch.randn(shape, generator=generator).to(
            torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        )
        return _laid_out(x.to(torch.float32 if wide else dtype).to(device), layout)

    return randn


def _laid_out(x: torch.Tensor, layout: str | None) -> torch.Tensor:
    """The same values in memory of another shape."""
    if layout is None or x.dim() < 2:
        return x
    if layout == "transposed":  # the axes before the last are stored in reverse order
        order = [*reversed(range(x.dim() - 1)), x.dim() - 1]
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":  # a part of a larger tensor, at an odd offset, between NaNs
        wide = x.new_full([n + 3 for n in x.shape], float("nan"))
        inner = wide[tuple(slice(1, n + 1) for n in x.shape)]
        return inner.copy_(x)
    if layout == "broadcast":  # one value for a whole axis, stride 0
        return x[:1].expand_as(x)
    if layout == "last-axis":  # the last axis is not contiguous
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(f"layout is {layout!r}")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every ``torch.empty`` is full of NaN inside the block, and so is the kernels' scratch memory."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            t = make(*args, **kwargs)
            if t.is_floating_point():
                return t.fill_(float("nan"))
            return t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)

        return made

    owners = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]
    before = [getattr(owner, name) for owner, name in owners]
    native = compiled_library()
    try:
        for (owner, name), make in zip(owners, before):
            setattr(owner, name, poison(make))
        if native:
            native.set_poison(True)
        yield
    finally:
        for (owner, name), make in zip(owners, before):
            setattr(owner, name, make)
        if native:
            native.set_poison(False)


# ---------------------------------------------------------------------------------------------------
# Running and comparing


@dataclass
class Result:
    """Outputs and gradients of one call, by name."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def floats(call: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The float tensors of a call by name; those inside biases and lists as ``bias.table``, ``bias.0``."""
    if isinstance(call, torch.Tensor):
        return {prefix: call} if call.is_floating_point() else {}
    parts = (
        vars(call)
        if isinstance(call, Bias)
        else call
        if isinstance(call, dict)
        else dict(enumerate(call))
        if isinstance(call, list)
        else {}
    )
    found: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        found |= floats(part, f"{prefix}.{name}" if prefix else str(name))
    return found


def with_floats(call: Any, new: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """The call with other tensors in the places that ``floats`` names."""
    if isinstance(call, torch.Tensor):
        return new.get(prefix, call)

    def inside(name: Any, part: Any) -> Any:
        return with_floats(part, new, f"{prefix}.{name}" if prefix else str(name))

    if isinstance(call, dict):
        return {name: inside(name, part) for name, part in call.items()}
    if isinstance(call, list):
        return [inside(i, part) for i, part in enumerate(call)]
    if isinstance(call, Bias):
        other = copy.copy(call)
        vars(other).update({name: inside(name, part) for name, part in vars(call).items()})
        return other
    return call


def invoke(op: Op, call: dict[str, Any], **more: Any) -> Any:
    """The op's public function on ``call``, or the one of fastattn that ``call["function"]`` names."""
    call = {**more, **call}  # what the call says itself counts
    name = call.pop("function", None)
    return (getattr(sys.modules["fastattn"], name) if name else op.function)(**call)


def run(op: Op, call: dict[str, Any], backend: str, seed: int = 1) -> Result:
    """Forward and, where the op has one, backward with upstream gradients drawn from ``seed``, for every backend."""
    extra = {"return_lse": True} if "return_lse" in op.function.__code__.co_varnames else {}
    if not op.backward:
        found = invoke(op, call, **extra, backend=backend)
        outs = found if isinstance(found, tuple) else (found,)
        return Result({f"output {i}": o for i, o in enumerate(outs)}, {})
    leaves = {n: t.detach().requires_grad_() for n, t in floats(call).items()}
    inputs = with_floats(call, leaves)
    found = invoke(op, inputs, **extra, backend=backend)
    outs = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [
        torch.randn(o.shape, generator=generator).half().to(o.dtype).to(o.device) for o in outs
    ]
    # A row without a visible key has lse = -inf, a constant.
    upstream = [g.masked_fill(torch.isinf(o), 0.0) for o, g in zip(outs, upstream)]
    grads = torch.autograd.grad(outs, list(leaves.values()), upstream, allow_unused=True)
    return Result(
        {f"output {i}": o.detach() for i, o in enumerate(outs)},
        {
            f"d{n}": torch.zeros_like(t) if g is None else g
            for (n, t), g in zip(leaves.items(), grads)
        },
    )


def check(got: Result, oracle: Result, plain: Result, factor: float = 2.0) -> float:
    """Raise ``Failure`` where ``got`` errs more than the plain reference in the same dtype may.

    The budget of each tensor is ``factor`` times (the error of ``plain`` + one unit in the last place of
    the largest value among the outputs, or among the gradients), for the largest error and again for the norm.
    Returns the largest share of a budget that was used.
    """
    used = 0.0
    for kind in ("outputs", "gradients"):
        group = getattr(oracle, kind)
        finite = [t[torch.isfinite(t)].abs() for t in group.values()]
        largest = max((float(t.max()) for t in finite if t.numel()), default=0.0)
        for name, exact in group.items():
            g, p = getattr(got, kind)[name].double().cpu(), getattr(plain, kind)[name]
            band = torch.finfo(p.dtype).eps * largest
            p, exact = p.double().cpu(), exact.cpu()
            if g.shape != exact.shape:
                raise Failure(f"{name} is {list(g.shape)}; the reference gives {list(exact.shape)}")
            special = ~torch.isfinite(exact)
            if not torch.equal(g[special], exact[special]) or not torch.isfinite(g[~special]).all():
                raise Failure(
                    f"{name} is not finite where the reference is, or the other way round"
                )
            error, allowed = (g - exact)[~special], (p - exact)[~special]
            if not error.numel():
                continue
            for measure, value, limit in (
                ("largest error", error.abs().max(), allowed.abs().max() + band),
                ("norm of the error", error.norm(), allowed.norm() + band * error.numel() ** 0.5),
            ):
                if float(value) > factor * float(limit):
                    raise Failure(
                        f"{name}: {measure} is {float(value):.3g}; "
                        f"allowed is {factor} x {float(limit):.3g}, what the reference errs in this dtype"
                    )
                if float(limit):
                    used = max(used, float(value) / (factor * float(limit)))
    return used


def make(op: Op, case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    return op.make(case, maker(dtype, device, case.layout))


def why_not(op: Op, backend: Backend, dtype: torch.dtype, case: Case) -> str:
    """The reasons for which ``backend`` would refuse this case, or ""."""
    return refusal(op, backend, make(op, case, dtype, "cpu"))


def refusal(op: Op, backend: Backend, call: dict[str, Any]) -> str:
    """The reasons for which ``backend`` would refuse this call, made on its device, or ""; nothing is computed."""
    called, facts = asked(op, call)
    row = backend if called is op else called.by_name.get(backend.name)
    if row is None:
        return f"{called.name} has no {backend.name}"
    return "; ".join(row.why_not(facts | {"device": backend.device}))


def asked(op: Op, call: dict[str, Any]) -> tuple[Op, dict[str, Any]]:
    """The op that a call ends in, which may be another that it is made of, and what limits read of the call."""
    calls: list[tuple[Op, Any]] = []

    def record(op: Op, *args: Any, backend: str = "") -> Any:
        calls.append((op, args))
        return op.fake(*args)

    with torch.no_grad(), _replaced(record):
        invoke(op, call)
    called, args = calls[0]
    return called, dict(zip(called.facts, called._facts(*args)))


def prove(op: Op, backend: Backend, dtype: torch.dtype, case: Case) -> float:
    """The contract: forward and gradients within budget, from poisoned memory, the same twice (but in an interpreter).

    Returns the largest share of the error budget that was used; raises ``Failure``.
    """
    call = make(op, case, dtype, backend.device)
    double = with_floats(call, {n: t.double() for n, t in floats(call).items()})
    with poisoned():
        got = run(op, call, backend.name)
        interpreted = backend.family == "triton" and backend.device == "cpu"  # one by one, in order
        again = got if interpreted else run(op, call, backend.name)
    if backend.deterministic:
        for kind in ("outputs", "gradients"):
            for name, t in getattr(got, kind).items():
                if not torch.equal(t, getattr(again, kind)[name]) and not torch.isnan(t).any():
                    raise Failure(f"{name} differs between two runs on the same input")
    return check(got, run(op, double, "reference"), run(op, call, "reference"), op.budget)


def prove_reference(op: Op, case: Case) -> float:
    """The reference itself, in float64: against finite differences and against the op's peers elsewhere.

    Returns the largest share of the allowed difference that was used; raises ``Failure``.
    """
    call = make(op, case, torch.float64, "cpu")
    leaves = {
        n: t.detach().double().contiguous().requires_grad_(bool(op.backward))
        for n, t in floats(call).items()
    }
    inputs = list(leaves.values())

    def outputs(*values: torch.Tensor) -> list[torch.Tensor]:
        found = invoke(op, with_floats(call, dict(zip(leaves, values))), backend="reference")
        found = found if isinstance(found, tuple) else (found,)
        return [
            torch.where(torch.isinf(o), 0.0, o) for o in found
        ]  # lse of a row that sees nothing: a constant

    def gradients(outs: list[torch.Tensor]) -> list[torch.Tensor]:
        if not op.backward:
            return []
        upstream = [_waves(o) for o in outs]
        return list(
            torch.autograd.grad(
                outs, inputs, upstream, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    ours, used, step = outputs(*inputs), 0.0, 1e-6
    if op.backward and all(t.numel() for t in inputs):
        by_output = [gradients([o]) for o in ours]
        for i, (name, x) in enumerate(leaves.items()):
            along = _waves(x) * step
            ahead, behind = (
                outputs(*inputs[:i], x.detach() + way * along, *inputs[i + 1 :]) for way in (1, -1)
            )
            for k, grads in enumerate(by_output):
                slope = ((ahead[k] - behind[k]) * _waves(ours[k])).sum() / (2 * step)
                used = max(
                    used,
                    _agree(
                        f"d{name} from output {k}", (grads[i] * along).sum() / step, slope, 1e-6
                    ),
                )
    for peer, function in (op.peers(**call | leaves) if op.peers else {}).items():
        names = inspect.signature(function).parameters
        theirs = function(**{n: value for n, value in (call | leaves).items() if n in names})
        theirs = list(theirs) if isinstance(theirs, tuple) else [theirs]
        if any(t.isnan().any() for t in theirs):
            continue  # the peer gives no number for a row that sees nothing
        tags = [f"output {k}" for k in range(len(ours))] + [f"d{n}" for n in leaves]
        for tag, a, b in zip(tags, ours + gradients(ours), theirs + gradients(theirs)):
            used = max(used, _agree(f"{tag} beside {peer}", a, b, 1e-10))
    return used


def _waves(t: torch.Tensor) -> torch.Tensor:
    """Numbers in [-1, 1] that repeat nowhere, in the shape of ``t``."""
    return torch.arange(1, t.numel() + 1).sin().view(t.shape).to(t)


def _agree(what: str, ours: torch.Tensor, other: torch.Tensor, relative: float) -> float:
    if not ours.numel():
        return 0.0
    error, allowed = (
        float((ours - other).detach().abs().max()),
        relative * (1.0 + float(other.detach().abs().max())),
    )
    if not error <= allowed:
        raise Failure(f"{what} differs by {error:.3g} in float64; allowed is {allowed:.3g}")
    return error / allowed
