"""What torch does around an op: plain eager calls, batches (vmap), gradients of functions (torch.func.grad).

An op goes through ``torch.ops`` wherever something watches or rewrites torch calls.  Two things torch does not do
by itself: ``torch.func.grad`` does not know the gradients of library ops, and ``torch.func.vmap`` calls them once an item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

# ---- Where a call goes

PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_simple(t: torch.Tensor | None) -> bool:
    """What kernels read as it lies; torch.ops resolves lazy negation."""
    return t is None or (type(t) in PLAIN and not t.is_neg())


def is_plain() -> bool:
    """Nothing watches or rewrites torch calls here: no mode, no functorch transform, no tracing."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


# The vmap of torch.func is a transform, which is_plain sees; that of torch.autograd (is_grads_batched,
# jacobian(vectorize=True)) shows in the tensors alone.
is_batched: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def is_differentiating() -> bool:
    """Inside torch.func.grad or what is made of it, and not inside a vmap inside that."""
    if torch.compiler.is_compiling():
        return False
    top = torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() == torch._C._functorch.TransformType.Grad


def has_tangent(t: torch.Tensor | None) -> bool:
    unpack: Any = forward_ad.unpack_dual
    return t is not None and unpack(t).tangent is not None


# ---- Gradients


class Eager(torch.autograd.Function):
    """The op and its gradient without the dispatcher: Op.call uses it where nothing could tell the difference."""

    @staticmethod
    def forward(ctx: Any, op: Any, backend: str, *args: Any) -> Any:
        outs = op._forward(*args, backend=backend)
        op._save(ctx, args, {"backend": backend}, outs)
        ctx.op = op
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *ctx.op._autograd(ctx, *grads)


EAGER: Any = Eager.apply


class Transformed(torch.autograd.Function):
    """An op inside torch.func.grad, which torch.library's autograd does not know: one level of it is taken off, and
    ``call`` called again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Any, save: Any, back: Any, backend: str, *args: Any) -> Any:
        return call(*args, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, save, ctx.back, backend, *args = inputs
        save(ctx, args, {"backend": backend}, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, None, None, *ctx.back(ctx, *grads)


TRANSFORMED: Any = Transformed.apply


class Once(torch.autograd.Function):
    """Gradients that depend on what they were computed from, and refuse to say how."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        name: str, count: int, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return tuple(t if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name}: second derivatives are not implemented; its backward pass is a kernel"
        )


def keep_all(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
    ctx.save_for_backward(*[inputs[i] for i in ctx.tensors])
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]


# ---- Batches


def register_vmap(op: Any, name: str, call: Any, arguments: list[str], library: Any) -> None:
    """torch.func.vmap: one call with the new axis folded into the batch where that means the same, else a loop."""

    def fold(t: Any, dim: Any, n: int) -> Any:
        t = t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1)

    def rule(info: Any, in_dims: Any, *args: Any, backend: str = "") -> Any:
        n, dims = info.batch_size, [d if isinstance(d, int) else None for d in in_dims]
        moved = {a for a, d in zip(arguments, dims) if d is not None}
        if op and op.folds and moved <= {*op.batched} and op.folds(dict(zip(arguments, args))):
            args = tuple(
                fold(t, d, n) if a in op.batched and t is not None else t
                for a, t, d in zip(arguments, args, dims)
            )
            found = [
                t.view(n, -1, *t.shape[1:]) if t.dim() > 1 else t.expand(n, *t.shape)
                for t in call(*args, backend=backend)
            ]
        else:
            each = [
                call(
                    *(t if d is None else t.select(d, i) for t, d in zip(args, dims)),
                    backend=backend,
                )
                for i in range(n)
            ]
            found = [torch.stack(parts) for parts in zip(*each)]
        return (found[0], 0) if len(found) == 1 else (tuple(found), (0,) * len(found))

    if hasattr(torch.library, "register_vmap"):  # before torch 2.5 it loops, and warns
        torch.library.register_vmap(f"fastattn::{name}", rule, lib=library)
