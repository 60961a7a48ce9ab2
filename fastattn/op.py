"""One descriptor per op: everything else reads it.

An ``Op`` states an operator once: its schema, the shapes it returns, the backends that compute it with
their limits, the cases that prove it and the cost that bounds it.  From that statement come the
``torch.library`` registration, autograd, dispatch, ``explain``, the contract tests, ``fastattn verify``,
``fastattn bench`` and the support table.  Nothing here knows a kernel; backends are named as strings and
imported when first chosen.

    user -> kernels/<op>/api.py -> Op -> torch.ops.fastattn.<op>_fwd -> choose() -> Backend -> kernel

Schemas carry the meaning by their names.  An argument of the backward schema named like an argument or
an output of the forward is saved for it; ``d<output>`` is the gradient of that output, and a result named
``d<input>`` is the gradient of that input.  An op without a backward schema is for inference alone.

One file because a descriptor and all that is read from it change together: limits, rows, registration, choice.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from fastattn.backends import Backend, load, show
from fastattn.checks import given, unit_stride
from fastattn.transforms import (
    EAGER,
    PLAIN,
    TRANSFORMED,
    Once,
    has_tangent,
    is_batched,
    is_differentiating,
    is_plain,
    is_simple,
    keep_all,
    register_vmap,
)

__all__ = ["OPS", "Case", "Cost", "Op", "Unsupported"]

OPS: dict[str, Op] = {}  # every op, by name: the table that tests, bench and docs walk
_LIB: Any = torch.library.Library("fastattn", "DEF")  # type: ignore[no-untyped-call]


class Unsupported(NotImplementedError):
    """No backend accepts the call; the message holds every reason."""


# ---------------------------------------------------------------------------------------------------
# What is measured and proved


class Case:
    """A point of an op's parameter space: named values, printed as a test id."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __repr__(self) -> str:
        return "-".join(f"{k}{show(v)}" for k, v in self.__dict__.items() if v not in (None, False))

    def __getattr__(
        self, name: str
    ) -> Any:  # an absent value is None: a case names only what it varies
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def but(self, **values: Any) -> Case:
        return Case(**{**self.__dict__, **values})


@dataclass(frozen=True)
class Cost:
    """The floor: operations (forward; backward is ``backward_flops``) and bytes that must move."""

    flops: float
    backward_flops: float
    bytes: float
    backward_bytes: float


# ---------------------------------------------------------------------------------------------------
# The op


@dataclass
class Op:
    name: str
    forward: str  # schema, e.g. "(Tensor q, ...) -> (Tensor o, Tensor lse)"
    backward: str  # schema, or "" where there is no gradient
    fake: Callable[..., Sequence[torch.Tensor]]  # the outputs, allocated but not computed
    fake_backward: Callable[..., Sequence[torch.Tensor]] | None
    facts: dict[
        str, str
    ]  # what limits may depend on: name -> expression of the forward's arguments
    reference: Callable[
        ..., Sequence[torch.Tensor]
    ]  # the formula on the same arguments, differentiable
    backends: tuple[Backend, ...]  # in order of preference
    cases: Sequence[Case]
    make: Callable[..., dict[str, Any]]  # (case, randn) -> keyword arguments of ``function``
    cost: Callable[[Case, int], Cost]  # (case, bytes per element)
    bench: Sequence[Case] = ()
    peers: Callable[..., dict[str, Callable[..., Any]]] | None = (
        None  # {"torch sdpa": same call elsewhere}
    )
    save: Callable[[dict[str, Any]], dict[str, Any]] | None = (
        None  # last word on what backward receives
    )
    recall: Callable[[dict[str, Any]], dict[str, Any]] | None = (
        None  # the forward's arguments from those
    )
    same_gradient: dict[str, str] = field(
        default_factory=dict
    )  # {"residual": "x"}: d residual is dx
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    folds: Callable[[dict[str, Any]], bool] | None = (
        None  # whether vmap's axis may join the first axis of ``batched``, of either schema's arguments
    )
    batched: tuple[str, ...] = ()
    budget: float = 2.0  # times the error of the same-dtype reference
    function: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.arguments = _names(self.forward.split("->")[0])
        self.outputs = _names(self.forward.split("->")[1])
        self.backward_arguments = _names(self.backward.partition("->")[0])
        self.gradients = _names(self.backward.partition("->")[2])
        self._values = self.arguments + self.outputs
        kinds = dict(
            zip(self._values, _kinds(self.forward.split("->")[0]) + ["Tensor"] * len(self.outputs))
        )
        # What backward keeps of the forward's values, and where each of its arguments then comes from.
        kept = [n for n in self.backward_arguments if n in kinds]
        tensors = [n for n in kept if "Tensor" in kinds[n]]
        others = [n for n in kept if n not in tensors]
        self._saved, self._others = (
            [self._values.index(n) for n in ns] for ns in (tensors, others)
        )
        self._plan = [
            (0, tensors.index(n)) if n in tensors
            else (1, others.index(n)) if n in others
            else (4, 0) if n == "needs"
            else (2 if f"Tensor? {n}" in self.backward else 3, self.outputs.index(n[1:]))
            for n in self.backward_arguments
        ]  # fmt: skip
        self._returned = [
            self.gradients.index(d) if d in self.gradients else None
            for d in ("d" + self.same_gradient.get(n, n) for n in self.arguments)
        ]
        sources = [  # the arguments whose gradients the results are, for ``needs``
            [i for i, r in enumerate(self._returned) if r == at]
            for at in range(len(self.gradients))
        ]
        self._wanted = [[*found] for found in sources]
        self._again = [
            self.backward_arguments.index(n) if n in self.backward_arguments else None
            for n in self.arguments
        ]
        self._tensors = [
            i for i, kind in enumerate(_kinds(self.forward.split("->")[0])) if "Tensor" in kind
        ]
        self._chosen: dict[tuple[Any, ...], Backend] = {}
        self._warned = False
        self._facts = _compile_facts(self.arguments, self.facts)
        self.by_name = {b.name: b for b in self.backends}
        OPS[self.name] = self
        self._register()

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.backward else ("forward",)

    @property
    def derivatives(self) -> str:
        if not self.backward:
            return "none, it is for inference"
        return "by the kernels; second ones " + (
            "are refused" if self.recall else "through the formula"
        )

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: ``function`` is the op's public face."""
        self.function = function
        function.op = self  # type: ignore[attr-defined]
        return function

    def also(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: another function that is made of the op."""
        function.op = self  # type: ignore[attr-defined]
        return function

    # -- torch.library ------------------------------------------------------------------------------

    def _register(self) -> None:
        self.op = _define(f"{self.name}_fwd", self.forward, self._forward, self.fake)
        register_vmap(self, f"{self.name}_fwd", self.call, self.arguments, _LIB)
        if self.fake_backward:
            name = f"{self.name}_bwd"
            self.op_backward = _define(name, self.backward, self._backward, self.fake_backward)
            register_vmap(self, name, self.call_backward, self.backward_arguments, _LIB)
        torch.library.register_autograd(
            f"fastattn::{self.name}_fwd", self._autograd, setup_context=self._save, lib=_LIB
        )

    def _save(self, ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        outputs = _tuple(output)
        values: Sequence[Any] = (*inputs, *outputs)
        if self.save:
            known = self.save(dict(zip(self._values, values)))
            values = [known[n] for n in self._values]
        ctx.save_for_backward(*[values[i] for i in self._saved])
        ctx.others = [values[i] for i in self._others]
        ctx.like = [(o.shape, o.dtype, o.device) for o in outputs]
        ctx.backend = keyword_only_inputs["backend"]

    def _autograd(self, ctx: Any, *grads: Any) -> Any:
        if not self.backward:
            raise RuntimeError(f"{self.name}: it is for inference and has no backward pass")
        saved, args = ctx.saved_tensors, []
        needed = ctx.needs_input_grad[-len(self.arguments) :]
        for source, i in self._plan:
            if source < 2:
                args.append(ctx.others[i] if source else saved[i])
            elif source == 4:
                args.append([any(needed[at] for at in found) for found in self._wanted])
            elif grads[i] is not None:
                args.append(unit_stride(grads[i]))
            else:
                shape, dtype, device = ctx.like[i]
                args.append(None if source == 2 else torch.zeros(shape, dtype=dtype, device=device))
        batched = any(g is not None and is_batched(g) for g in grads)
        if batched and torch.is_grad_enabled():  # torch would lose what Once attaches
            raise RuntimeError(
                f"{self.name}: batched gradients (is_grads_batched) take create_graph=False"
            )
        # torch.ops resolves lazy negation and takes batches apart; kernels see neither.
        eager = (
            not torch.compiler.is_compiling()
            and is_plain()
            and not any(isinstance(a, torch.Tensor) and a.is_neg() for a in args)
            and not batched
        )
        again = torch.is_grad_enabled()  # create_graph=True
        if eager and (self.recall or not again):
            found = self._backward(*args, backend=ctx.backend)
        else:
            found = self.call_backward(*args, backend=ctx.backend)
        if again and self.recall:
            once: Any = Once.apply
            found = once(self.name, len(found), *found, *saved, *grads)
        return tuple(
            found[i] if want and i is not None else None for i, want in zip(self._returned, needed)
        )

    def _second(self, ctx: Any, *grads: Any) -> Any:
        """The gradient of the backward op, through the formula."""
        args, again = list(ctx.others), torch.is_grad_enabled()
        for i, t in zip(ctx.tensors, ctx.saved_tensors):
            args[i] = t
        needed = [i for i in ctx.tensors if ctx.needs_input_grad[-len(args) :][i]]
        with torch.enable_grad():
            for i in needed:  # apart from one another: v may have been made of q
                args[i] = args[i].view_as(args[i]) if again else args[i].detach().requires_grad_()
            found = self._reference_backward(dict(zip(self.backward_arguments, args)), again=True)
            pairs = [
                (f, g)
                for f, g in zip(found, grads)
                if g is not None and g.numel() and f.requires_grad
            ]
            result = dict.fromkeys(range(len(args)))
            if pairs and needed:
                seconds = torch.autograd.grad(
                    [f for f, _ in pairs],
                    [args[i] for i in needed],
                    [g for _, g in pairs],
                    allow_unused=True,
                    create_graph=again,
                )
                result |= dict(zip(needed, seconds))
        return tuple(result.values())

    def call(self, *args: Any, backend: str = "") -> Any:
        """The op on ``args``: what public functions call.

        Plain eager calls go straight to the kernel, or to one autograd.Function; the dispatcher would only add
        its overhead.  Everything else (compilation, tracing, modes, transforms, tensor subclasses) goes
        through ``torch.ops``.
        """
        if not torch.compiler.is_compiling() and is_plain() and not args[self._tensors[0]].is_meta:
            needs_grad, watched = torch.is_grad_enabled(), False
            for i in self._tensors:
                t = args[i]
                if t is not None:
                    if type(t) not in PLAIN or t.is_neg():  # torch.ops resolves lazy negation
                        break
                    watched = watched or (needs_grad and t.requires_grad)
            else:
                if not watched:
                    return self._forward(*args, backend=backend)
                if forward_ad._current_level < 0:
                    return EAGER(self, backend, *args)
        if is_differentiating():
            return TRANSFORMED(self.call, self._save, self._autograd, backend, *args)
        if forward_ad._current_level >= 0 and any(has_tangent(args[i]) for i in self._tensors):
            # torch would drop the tangents and say nothing
            raise RuntimeError(
                f"{self.name}: forward-mode derivatives (jvp) are not implemented; use backward"
            )
        return _tuple(self.op(*args, backend=backend))

    def call_backward(self, *args: Any, backend: str = "") -> Any:
        """The backward op on ``args``, its schema's: for functions that are made of it."""
        eager = not torch.compiler.is_compiling() and is_plain()
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        again = eager and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if (again or is_differentiating()) and not self.recall:
            return TRANSFORMED(self.call_backward, keep_all, self._second, backend, *args)
        plain = eager and all(is_simple(t) and not (t.is_meta or is_batched(t)) for t in tensors)
        run = self._backward if plain else self.op_backward
        return _tuple(run(*args, backend=backend))

    # -- running ------------------------------------------------------------------------------------

    def _forward(self, *args: Any, backend: str = "") -> Any:
        chosen = self.choose(args, backend)
        if not chosen.forward:
            return tuple(t.clone() if _shares(t, args) else t for t in self.reference(*args))
        outs = self.fake(*args)
        load(chosen.forward)(*outs, *args)
        return tuple(outs)

    def _backward(self, *args: Any, backend: str = "") -> Any:
        known = self.recall(dict(zip(self.backward_arguments, args))) if self.recall else None
        call = (
            [known.get(n) for n in self.arguments]
            if known
            else [None if i is None else args[i] for i in self._again]
        )
        chosen = self.choose(call, backend)
        if not chosen.forward:
            return self._reference_backward(known or dict(zip(self.backward_arguments, args)))
        outs = self.fake_backward(*args)  # type: ignore[misc]
        scratch = chosen.workspace(*args) if chosen.workspace else ()
        load(chosen.backward)(*outs, *scratch, *args)
        return tuple(outs)

    def _reference_backward(
        self, known: dict[str, Any], again: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Autograd through the formula; the fast backward passes are measured against this.

        ``again``: the gradients are to be differentiated in their turn, so the formula starts from the very inputs.
        """
        needs = known.get("needs") or [True] * len(self.gradients)
        needed = {d[1:] for d, need in zip(self.gradients, needs) if need}
        with torch.enable_grad():
            inputs = [
                (v if again else v.detach().requires_grad_(n in needed and v.is_floating_point()))
                if isinstance(v, torch.Tensor)
                else v
                for n, v in ((n, known.get(n)) for n in self.arguments)
            ]
            wanted = [
                v
                for n, v in zip(self.arguments, inputs)
                if n in needed and isinstance(v, torch.Tensor) and v.requires_grad
            ]
            outs = dict(zip(self.outputs, self.reference(*inputs)))
            pairs = [
                (outs[n], known["d" + n]) for n in self.outputs if known.get("d" + n) is not None
            ]
            pairs = [(o, g) for o, g in pairs if o.requires_grad]
            found = (
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    allow_unused=True,
                    create_graph=again,
                )
                if pairs
                else [None] * len(wanted)
            )
        grads = dict(
            zip((n for n, v in zip(self.arguments, inputs) if any(v is w for w in wanted)), found)
        )
        by_name = dict(zip(self.arguments, inputs))
        result = []
        first = next(t for t in inputs if isinstance(t, torch.Tensor))
        for name, need in zip(self.gradients, needs):
            given, grad = by_name[name[1:]], grads.get(name[1:])
            if given is None or not need:  # not passed, or not asked for: nothing to return
                result.append(first.new_empty(0))
            elif grad is None:
                result.append(torch.zeros_like(given))
            else:
                result.append(grad if again else grad.clone())
        return tuple(result)

    # -- choosing and explaining --------------------------------------------------------------------

    def choose(self, args: Sequence[Any], backend: str = "") -> Backend:
        """The first backend whose limits all hold; a named one, or an error that says why not."""
        key = (backend, self._facts(*args))
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._choose(args, dict(zip(self.facts, key[1])), backend)
        if not chosen.forward and not backend and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name} runs on the reference implementation, which is slow; "
                f'pass backend="reference" if this is meant\n{self.render(args, 0)}',
                stacklevel=2,
            )
        return chosen

    def _choose(self, args: Sequence[Any], facts: dict[str, Any], backend: str) -> Backend:
        rows = self.named(backend) if backend else self.backends
        for row in rows:
            if not row.why_not(facts):
                return row
        asked = f" with backend={backend!r}" if backend else ""
        raise Unsupported(f"{self.name}: no backend accepts this call{asked}\n{self.render(args)}")

    def named(self, backend: Any) -> list[Backend]:
        """Rows called ``backend``, or of that family ("cpu" is every instruction set)."""
        rows = [
            b for b in self.backends if isinstance(backend, str) and backend in (b.name, b.family)
        ]
        if not rows:
            raise ValueError(
                f"{self.name}: backend is {given(backend)}; {self.name} has "
                + ", ".join(b.name for b in self.backends)
            )
        return rows

    def render(
        self, args: Sequence[Any], indent: int = 2, only: Sequence[str] | None = None
    ) -> str:
        facts = dict(zip(self.facts, self._facts(*args)))
        shown = ", ".join(
            f"{n}: {show(a.dtype)}{list(a.shape)}"
            for n, a in zip(self.arguments, args)
            if isinstance(a, torch.Tensor)
        )
        width = max(len(b.name) for b in self.backends) + 2
        lines = [f"{self.name}({shown})"]
        for row in self.backends:
            why = row.why_not(facts)
            if only is not None and row.name not in only:
                why = ["another backend was asked for", *why]
            lines.append(
                f"{' ' * indent}{row.name:<{width}}{'no: ' + '; '.join(why) if why else 'ok'}"
            )
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# Operators that change their arguments


def in_place(name: str, schema: str, run: Callable[..., None]) -> Callable[..., None]:
    """Registers ``run``, which writes into the arguments that ``schema`` marks and returns nothing.

    Gives the function to call, which goes straight to ``run`` where ``Op.call`` would.
    """
    kinds = _kinds(schema.split("->")[0])
    changed = [i for i, kind in enumerate(kinds) if "!" in kind]
    tensors = [i for i, kind in enumerate(kinds) if "Tensor" in kind]

    def change(*args: Any, backend: str = "") -> None:
        run(*args, backend=backend)
        for i in changed:  # for graphs that saved them
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])

    op = _define(name, schema, change, lambda *args: None)

    def call(*args: Any, backend: str = "") -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() in _RECORDING:
            return  # nothing is computed, and nothing written
        if _goes_straight([args[i] for i in tensors]):
            change(*args, backend=backend)
        else:
            op(*args, backend=backend)

    return call


def _goes_straight(tensors: Sequence[Any]) -> bool:
    """Whether the dispatcher would only add its overhead to a call on these."""
    plain = not torch.compiler.is_compiling() and is_plain() and not tensors[0].is_meta
    return plain and all(is_simple(t) for t in tensors)


def opaque(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers ``run``, of several results without gradients, as an operator that compilers do not look into.

    Gives the function to call, which goes straight to ``run`` where ``Op.call`` would.
    """
    op = _define(name, schema, _ignoring_backend(run), fake)

    def call(*args: Any, backend: str = "") -> Any:
        straight = _goes_straight([t for t in args if isinstance(t, torch.Tensor)])
        return (run if straight else op)(*args)

    register_vmap(None, name, call, _names(schema.split("->")[0]), _LIB)
    return call


# ---------------------------------------------------------------------------------------------------
# Small parts


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator torch.ops.fastattn.<name>; beside the schema's arguments it takes a backend."""
    run, fake = (_as_declared(schema, f) for f in (run, fake))
    declared = schema.replace(") ->", ', *, str backend="") ->', 1)
    _LIB.define(name + declared, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", _ignoring_backend(fake), lib=_LIB)
    return getattr(torch.ops.fastattn, name).default


CASTABLE = (torch.float32, torch.bfloat16, torch.float16)  # what autocast joins


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device; else as they are."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in CASTABLE else t for t in tensors
    )


def autocast_dtype(t: Any) -> torch.dtype | None:
    """Autocast's dtype where it is on for the device of ``t``."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(t, torch.Tensor):
        return None
    kind = t.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _kinds(side: str) -> list[str]:
    """The types of a schema's arguments, in order."""
    return [part.strip(" (").split(" ")[0] for part in side.split(",")]


def _names(side: str) -> list[str]:
    return re.findall(r"(\w+)(?:\s*=\s*[^,)]+)?\s*[,)]", side)


def _compile_facts(arguments: list[str], facts: dict[str, str]) -> Callable[..., tuple[Any, ...]]:
    """One function of all arguments that evaluates every fact: it runs at each call, so it is one expression."""
    source = f"lambda {', '.join(arguments)}: ({', '.join(facts.values())},)"
    return eval(source)  # type: ignore[no-any-return]


def _ignoring_backend(fake: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, backend="": fake(*args)


def _as_declared(schema: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` gives a sequence of results; a schema with a single one wants that alone, and one with none nothing."""
    count = len(_names(schema.split("->")[1]))
    if not count:
        return run
    if count == 1:
        return lambda *args, **kwargs: run(*args, **kwargs)[0]
    return lambda *args, **kwargs: tuple(run(*args, **kwargs))


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _shares(t: torch.Tensor, args: Sequence[Any]) -> bool:
    return any(t is a for a in args)


_REPLACING = threading.RLock()
_RECORDING: set[int] = set()  # threads whose calls are answered by another function


@contextlib.contextmanager
def _replaced(call: Callable[..., Any]) -> Iterator[None]:
    """Inside the block this thread runs ``call(op, *args, backend=)`` for ``op.call(*args, backend=)`` of every op."""
    thread = threading.get_ident()

    def instead(op: Op, before: Callable[..., Any]) -> Callable[..., Any]:
        def here(*args: Any, backend: str = "") -> Any:
            if threading.get_ident() == thread:
                return call(op, *args, backend=backend)
            return before(*args, backend=backend)  # other threads go on computing

        return here

    with _REPLACING:
        before, outermost = {name: op.call for name, op in OPS.items()}, thread not in _RECORDING
        for name, run in before.items():
            OPS[name].call = instead(OPS[name], run)  # type: ignore[method-assign]
        _RECORDING.add(thread)
        try:
            yield
        finally:
            if outermost:
                _RECORDING.discard(thread)
            for name, run in before.items():
                OPS[name].call = run  # type: ignore[method-assign]
