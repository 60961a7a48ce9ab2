"""fastattn.add_norm: the public function and the descriptor of the fused residual sum and normalisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastattn.backends import cpu, reference, takes, triton
from fastattn.checks import DTYPES, described, number, shown, unit_stride
from fastattn.choice import PROCESS
from fastattn.kernels.norm import reference as formula
from fastattn.kernels.norm.reference import KINDS
from fastattn.op import CASTABLE, Case, Cost, Op, autocast, autocast_dtype

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ROWS_PER_BLOCK = (
    64  # rows whose parameter gradients are summed together, in order, before blocks are
)


def _wide(x):
    return F64 if x.dtype == F64 else F32


def _fake(x, residual, bias, weight, beta, eps, kind):
    rows, D = x.shape
    is_sum = residual is not None or bias is not None
    y, s = x.new_empty(rows, D), x.new_empty(rows, D) if is_sum else x.new_empty(0)
    if x.dtype is F32:
        return y, s, x.new_empty(rows), x.new_empty(rows)
    wide = _wide(x)
    return y, s, x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _fake_backward(dy, ds, s, bias, weight, beta, mean, rstd, eps, kind):
    def like(parameter):
        return mean.new_empty(0 if parameter is None else D)

    rows, D = s.shape
    return s.new_empty(rows, D), like(bias), like(weight), like(beta)


def _workspace(dy, ds, s, bias, weight, beta, mean, rstd, eps, kind):
    """Sums over each block of rows of dx, dy * xhat and dy, for dbias, dweight and dbeta."""
    blocks = -(-s.shape[0] // ROWS_PER_BLOCK)
    return [mean.new_empty(blocks, 3, s.shape[1])]


def _recall(known):
    """Forward arguments with the same gradients, from what backward holds: x = s, the rest zeros."""
    s, bias = known["s"], known["bias"]
    return known | {
        "x": s,
        "residual": None
        if known["ds"] is None
        else torch.zeros_like(s),  # or the sum would not be an output
        "bias": bias if bias is None else torch.zeros_like(bias),
    }


def _make(case: Case, randn: Any) -> dict[str, Any]:
    D, wide = case.D, case.wide
    call: dict[str, Any] = {"x": randn(case.N, D), "kind": case.kind}
    for name in (case.given or "").split():
        call[name] = randn(case.N, D) if name == "residual" else randn(D, wide=wide)
    call["return_sum"] = bool(case.return_sum)
    return call


def _cost(case: Case, size: int) -> Cost:
    """Every row in and out once; a handful of operations an element."""
    given = (case.given or "").split()
    n, summed = case.N * case.D, "residual" in given or "bias" in given
    moved = n * size * (2 + ("residual" in given) + summed)
    return Cost(8 * n, 16 * n, moved, n * size * (3 + bool(case.return_sum)))


def _peers(x, kind, residual=None, bias=None, weight=None, beta=None, return_sum=False):
    """PyTorch's own normalisation after its own additions."""

    def unfused(x, kind, residual=None, bias=None, weight=None, beta=None, return_sum=False):
        s = x
        if bias is not None:
            s = s + bias
        if residual is not None:
            s = s + residual
        shape = (x.shape[-1],)
        if kind == "layer":
            y = torch.nn.functional.layer_norm(s, shape, weight, beta, 1e-5)
        else:
            y = torch.nn.functional.rms_norm(s, shape, weight, 1e-5)
            y = y if beta is None else y + beta
        return (y, s) if return_sum else y

    return {} if kind == "crms" else {"torch": unfused}


_GIVEN = ("", "residual", "weight beta", "residual bias weight beta", "bias weight")

OP = Op(
    "add_norm",
    forward="(Tensor x, Tensor? residual, Tensor? bias, Tensor? weight, Tensor? beta, float eps, int kind)"
    " -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    backward="(Tensor dy, Tensor? ds, Tensor s, Tensor? bias, Tensor? weight, Tensor? beta, Tensor mean,"
    " Tensor rstd, float eps, int kind) -> (Tensor dx, Tensor dbias, Tensor dweight, Tensor dbeta)",
    fake=_fake,
    fake_backward=_fake_backward,
    save=lambda known: known if known["s"].numel() else known | {"s": known["x"]},
    recall=_recall,
    same_gradient={"residual": "x"},
    facts={"device": "x.device.type", "dtype": "x.dtype"},
    reference=formula.forward,
    backends=(
        *cpu("add_norm", takes("dtype", F32, BF16, F16), workspace=_workspace),
        triton("norm", takes("dtype", F32, BF16, F16)),
        reference(),
    ),
    cases=[
        *(Case(N=n, D=d, kind=kind, given=given, return_sum=return_sum)
          for kind in KINDS for n, d in ((1, 1 if kind == "layer" else 2), (3, 7), (67, 130))
          for given in _GIVEN for return_sum in (False, True)),
        *(Case(N=5, D=768, kind=kind, given="residual weight beta", layout=how)
          for kind in KINDS for how in ("sliced", "broadcast", "last-axis")),
        Case(N=200, D=1000, kind="layer", given="residual bias weight beta", return_sum=True, wide=True),
        Case(N=0, D=5, kind="layer", given="residual weight"),
        Case(N=2, D=5000, kind="rms", given="weight"),
    ],
    make=_make,
    cost=_cost,
    bench=[
        Case(N=n, D=d, kind=kind, given="residual weight beta" if kind == "layer" else "residual weight",
             return_sum=True)
        for n, d in ((512, 768), (4096, 1024)) for kind in ("layer", "rms")
    ],
    peers=_peers,
)  # fmt: skip


@OP
def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "layer",
    *,
    return_sum: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``y = norm(x + bias + residual) * weight + beta`` over the last axis, in one pass over memory.

    x, residual [..., D]; bias, weight, beta [D] of x's dtype or float32 -> y [..., D].

    kind        "layer": subtract the mean, divide by the standard deviation.  "rms": divide by the root mean
                square.  "crms": rms of a zero-mean vector of D + 1 channels whose last is not stored
    return_sum  also give the sum x + bias + residual, as pre-norm networks pass it on
    backend     None: the first that accepts; a name: that one, or an error that says why not

    Statistics are float32 whatever x is.  The sum is rounded to x's dtype, and y is the norm of it as rounded.

    >>> import torch, fastattn as fa
    >>> x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    >>> y, s = fa.add_norm(x, residual, weight=torch.ones(8), kind="rms", return_sum=True)
    >>> torch.equal(s, x + residual)
    True
    """
    x, residual = autocast(x, residual)
    _check(x, residual, {"bias": bias, "weight": weight, "beta": beta}, kind, eps)
    y, s, _, _ = OP.call(
        _rows(x),
        None if residual is None else _rows(residual),
        None if bias is None else _vector(bias, x),
        None if weight is None else _vector(weight, x),
        None if beta is None else _vector(beta, x),
        float(eps),
        KINDS.index(kind),
        backend=PROCESS.backend("add_norm", backend),
    )
    if residual is None and bias is None:
        s = x
    if x.dim() != 2:
        y, s = y.view(x.shape), s.view(x.shape) if s is not x else x
    return (y, s) if return_sum else y


def _rows(t: torch.Tensor) -> torch.Tensor:
    if t.dim() != 2:
        t = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return unit_stride(t)


def _vector(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    wide = _wide(x)
    return unit_stride(t if t.dtype is wide else t.to(wide))


def _check(x: Any, residual: Any, parameters: dict[str, Any], kind: Any, eps: Any) -> None:
    if not _is_dense(x) or x.dim() == 0 or x.dtype not in DTYPES:
        raise ValueError(
            f"add_norm: x is {described(x)}; it takes a dense tensor [..., D] of {shown(*DTYPES)}"
        )
    if kind not in KINDS:
        raise ValueError(
            f"add_norm: kind is {kind!r}; it takes one of {', '.join(map(repr, KINDS))}"
        )
    if not number("add_norm", "eps", eps) >= 0:
        raise ValueError(f"add_norm: eps is {eps}; it takes a number >= 0")
    if residual is not None and not (
        _is_dense(residual)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    ):
        raise ValueError(
            f"add_norm: residual is {described(residual)}; it takes what x is, {described(x)}"
        )
    for name, t in parameters.items():
        if t is not None and not (
            _is_dense(t)
            and t.shape == x.shape[-1:]
            and (t.dtype in (x.dtype, F32) or t.dtype in _parameter_dtypes(x))
            and t.device == x.device
        ):
            raise ValueError(
                f"add_norm: {name} is {described(t)}; with x {described(x)} it takes [{x.shape[-1]}] of "
                + " or ".join(map(shown, _parameter_dtypes(x)))
            )


def _parameter_dtypes(x: torch.Tensor) -> Iterable[torch.dtype]:
    """Parameters become float32 without rounding: where autocast is on, any dtype that it joins will do."""
    return dict.fromkeys((x.dtype, F32, *(CASTABLE if autocast_dtype(x) else ())))


def _is_dense(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.layout is torch.strided
