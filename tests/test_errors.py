"""The texts of refusals, and what no input may do: crash, allocate without end, or spill into other rows.

One file because refusals are read side by side, and every bad input is tried on every backend.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import fastattn as fa
from fastattn.backends import Backend, takes
from fastattn.masks import Band, Causal, Full, Mask, Window
from fastattn.op import OPS
from fastattn.testing import poisoned


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


Q = t(2, 8, 512, 128)
X = t(3, 16)

# ---- attention ----------------------------------------------------------------------------------------

ATTENTION = {
    "D": (
        (Q, t(2, 2, 512, 64), t(2, 2, 512, 64)),
        """attention: D is 128 in q but 64 in k
  q: B Hq Nq D   = [2, 8, 512, 128]
  k: B Hk Nk D   = [2, 2, 512, 64]
  v: B Hk Nk Dv  = [2, 2, 512, 64]""",
    ),
    "B": (
        (Q, t(1, 8, 9, 128), t(2, 8, 9, 128)),
        """attention: B is 2 in q but 1 in k
  q: B Hq Nq D   = [2, 8, 512, 128]
  k: B Hk Nk D   = [1, 8, 9, 128]
  v: B Hk Nk Dv  = [2, 8, 9, 128]""",
    ),
    "Nk": (
        (Q, t(2, 8, 9, 128), t(2, 8, 10, 128)),
        """attention: Nk is 9 in k but 10 in v
  q: B Hq Nq D   = [2, 8, 512, 128]
  k: B Hk Nk D   = [2, 8, 9, 128]
  v: B Hk Nk Dv  = [2, 8, 10, 128]""",
    ),
    "Hk": (
        (Q, t(2, 4, 9, 128), t(2, 8, 9, 128)),
        """attention: Hk is 4 in k but 8 in v
  q: B Hq Nq D   = [2, 8, 512, 128]
  k: B Hk Nk D   = [2, 4, 9, 128]
  v: B Hk Nk Dv  = [2, 8, 9, 128]""",
    ),
    "groups": ((Q, t(2, 3, 9, 128), t(2, 3, 9, 128)), "attention: Hq is 8 and Hk is 3; Hq must be a multiple of Hk"),
    "more key heads": (
        (t(1, 2, 3, 4), t(1, 4, 3, 4), t(1, 4, 3, 4)),
        "attention: Hq is 2 and Hk is 4; Hq must be a multiple of Hk",
    ),
    "no key heads": (
        (t(1, 2, 3, 4), t(1, 0, 3, 4), t(1, 0, 3, 4)),
        "attention: Hq is 2 and Hk is 0; Hq must be a multiple of Hk",
    ),
    "rank 3": (
        (t(8, 512, 128), Q, Q),
        "attention: q has 3 axes, [8, 512, 128]; it takes 4, [B, Hq, Nq, D]",
    ),
    "rank 5": ((Q, Q, t(1, 1, 1, 1, 1)), "attention: v has 5 axes, [1, 1, 1, 1, 1]; it takes 4, [B, Hk, Nk, Dv]"),
    "rank 0": ((Q, t(), Q), "attention: k has 0 axes, []; it takes 4, [B, Hk, Nk, D]"),
    "list": (([[1.0]], Q, Q), "attention: q is list; it takes a tensor [B, Hq, Nq, D]"),
    "None": ((Q, None, Q), "attention: k is NoneType; it takes a tensor [B, Hk, Nk, D]"),
    "numpy": ((np.zeros((1, 1, 1, 1)),) * 3, "attention: q is ndarray; it takes a tensor [B, Hq, Nq, D]"),
    "dtypes": (
        (Q, Q.half(), Q),
        "attention: q is float32 on cpu, k is float16 on cpu, v is float32 on cpu; "
        "they must share one dtype and one device",
    ),
    "devices": (
        (Q, Q, t(2, 8, 512, 128, device="meta")),
        "attention: q is float32 on cpu, k is float32 on cpu, v is float32 on meta; "
        "they must share one dtype and one device",
    ),
    "integers": (
        (t(1, 1, 2, 4, dtype=torch.int64),) * 3,
        "attention: q is int64 on cpu, k is int64 on cpu, v is int64 on cpu; "
        "they take float64, float32, bfloat16, float16",
    ),
    "complex": (
        (t(1, 1, 2, 4, dtype=torch.complex64),) * 3,
        "attention: q is complex64 on cpu, k is complex64 on cpu, v is complex64 on cpu; "
        "they take float64, float32, bfloat16, float16",
    ),
    "float8": (
        (t(1, 1, 2, 4).to(torch.float8_e4m3fn),) * 3,
        "attention: q is float8_e4m3fn on cpu, k is float8_e4m3fn on cpu, v is float8_e4m3fn on cpu; "
        "they take float64, float32, bfloat16, float16",
    ),
    "sparse": ((Q, t(1, 1, 2, 4).to_sparse(), Q), "attention: k is a sparse_coo tensor; it takes a dense one"),
    "too long": (
        (t(1, 1, 1, 4), *[t(1, 1, 1, 4).expand(1, 1, 1 << 40, 4)] * 2),
        "attention: Nq is 1 and Nk is 1099511627776; sequences have at most 1073741824 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ATTENTION)
@pytest.mark.parametrize("named", [None, "reference", "cpu"], ids=str)
def test_attention_refuses_tensors(what, named):
    args, text = ATTENTION[what]
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fa.attention(*args, backend=named)


OPTIONS = {
    "bool mask": ({"mask": torch.ones(4, 5, dtype=torch.bool)},
                  "attention: mask is [4, 5]; it must broadcast to [B, Hq, Nq, Nk] = [1, 1, 4, 4]"),
    "long mask": ({"mask": torch.ones(1, 1, 1, 4, 4, dtype=torch.bool)},
                  "attention: mask is [1, 1, 1, 4, 4]; it must broadcast to [B, Hq, Nq, Nk] = [1, 1, 4, 4]"),
    "float mask": ({"mask": torch.zeros(4, 4)},
                   "attention: mask is a tensor of float32; it takes a value of fastattn.masks, a bool tensor or None"
                   " (floats are biases: bias=)"),
    "bias name": ({"bias": "alibi"},
                  "attention: bias is str; it takes a float tensor, Toeplitz or Relative, ALiBi, KeyBias, or a list of them"),
    "bias of bools": ({"bias": torch.ones(4, 4, dtype=torch.bool)},
                      "attention: bias is bool [4, 4]; it takes a float tensor, Toeplitz or Relative, ALiBi, KeyBias,"
                      " or a list of them"),
    "bias shape": ({"bias": torch.ones(4, 3)},
                   "attention: bias is [1, 1, 4, 3]; each axis of [B, Hq, Nq, Nk] = [1, 1, 4, 4] may also be 1"),
    "slopes": ({"bias": fa.bias.ALiBi(torch.ones(3))},
               "attention: bias.slopes is [3]; each axis of [Hq] = [1] may also be 1"),
    "short table": ({"bias": fa.bias.Toeplitz(torch.ones(1, 5))},
                    "attention: bias.table has 5 columns, for lengths up to 3; Nq is 4 and Nk is 4"),
    "index shape": ({"bias": fa.bias.Relative(torch.ones(3, 1), torch.zeros(4, 3, dtype=torch.int32))},
                    "attention: bias.index is [4, 3]; it takes [Nq, Nk] = [4, 4]"),
    "index range": ({"bias": fa.bias.Relative(torch.ones(3, 1), torch.full((4, 4), 3))},
                    "attention: bias.index holds 3; it takes 0 to 2, rows of the table"),
    "weight": ({"weight": fa.bias.KeyBias(torch.ones(1, 1, 4))},
               "attention: weight is KeyBias; it takes a float tensor, Toeplitz or Relative"),
    "softcap": ({"softcap": 0}, "attention: softcap is 0.0; it takes a number > 0, or None"),
    "sinks": ({"sinks": torch.ones(2)}, "attention: sinks is float32[2] on cpu; it takes a float tensor [Hq] = [1]"),
    "clip": ({"clip": (0.1, 1)}, "attention: clip is (0.1, 1.0); it takes finite gamma <= 0 < zeta, or hidden pairs would weigh"),
    "clip pair": ({"clip": 0.1}, "attention: clip is 0.1; it takes (gamma, zeta)"),
    "head map": ({"head_map": torch.tensor([1])}, "attention: head_map holds 1; it takes 0 to 0, key heads"),
    "head map shape": ({"head_map": [0]}, "attention: head_map is list; it takes integers [Hq] = [1]"),
    "dropout": ({"dropout": 1.0}, "attention: dropout is 1.0; it takes 0 <= dropout < 1"),
    "seed": ({"dropout": 0.5, "seed": "x"}, "attention: seed is 'x'; it takes an integer of 64 bits, a tensor with one, or None"),
    "mask class": ({"mask": Causal}, "attention: mask is type; it takes a value of fastattn.masks, a bool tensor or None"),
    "mask name": ({"mask": "causal"}, "attention: mask is str; it takes a value of fastattn.masks, a bool tensor or None"),
    "mask of ints": ({"mask": Full().encode()}, "attention: mask is list; it takes a value of fastattn.masks, a bool tensor or None"),
    "scale": ({"scale": "small"}, "attention: scale is 'small'; it takes a number"),
    "scale tensor": ({"scale": torch.tensor(0.5, requires_grad=True)},
                     "attention: scale is Tensor; it takes a number"),
    "scale list": ({"scale": [1.0]}, "attention: scale is list; it takes a number"),
    "empty scale": ({"scale": {}}, "attention: scale is dict; it takes a number"),
    "scale tensor of two": ({"scale": t(2)}, "attention: scale is Tensor; it takes a number"),
    "complex scale": ({"scale": 1j}, "attention: scale is complex; it takes a number"),
}  # fmt: skip


@pytest.mark.parametrize("what", OPTIONS)
def test_attention_refuses_options(what):
    options, text = OPTIONS[what]
    q = t(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fa.attention(q, q, q, **options)


def test_unknown_keywords_and_missing_arguments_are_type_errors():
    with pytest.raises(TypeError, match="caussal"):
        fa.attention(Q, Q, Q, caussal=True)
    with pytest.raises(TypeError, match="'v'"):
        fa.attention(Q, Q)
    with pytest.raises(TypeError, match="positional"):
        fa.attention(Q, Q, Q, Causal())
    with pytest.raises(TypeError, match="positional"):
        fa.add_norm(X, X, X[0], X[0], X[0], 1e-5, "rms", True)


# ---- masks --------------------------------------------------------------------------------------------

MASKS = {
    "align": (
        lambda: Causal("left"),
        'Causal: align is \'left\'; it takes "bottom-right" or "top-left"',
    ),
    "negative": (lambda: Window(-1, 0), "Window: left is -1; it takes None or an integer >= 0"),
    "fraction": (lambda: Window(2, 1.5), "Window: right is 1.5; it takes None or an integer >= 0"),
    "word": (lambda: Window("3"), "Window: left is '3'; it takes None or an integer >= 0"),
}


@pytest.mark.parametrize("what", MASKS)
def test_masks_refuse(what):
    make, text = MASKS[what]
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make()


def test_a_mask_that_says_nothing():
    with pytest.raises(NotImplementedError, match="^Mask does not say which keys it allows$"):
        fa.attention(t(1, 1, 2, 4), t(1, 1, 2, 4), t(1, 1, 2, 4), mask=Mask(), backend="reference")
    with pytest.raises(TypeError, match="unsupported operand"):
        Causal() & 3


# ---- add_norm -----------------------------------------------------------------------------------------

NORM = {
    "x": (([1.0],), {}, "x is list; it takes a dense tensor [..., D] of float64, float32, bfloat16, float16"),
    "scalar": ((t(),), {}, "x is float32[] on cpu; it takes a dense tensor [..., D] of float64, float32, bfloat16, float16"),
    "integer": ((X.long(),), {},
                "x is int64[3, 16] on cpu; it takes a dense tensor [..., D] of float64, float32, bfloat16, float16"),
    "sparse": ((X.to_sparse(),), {},
               "x is sparse_coo float32[3, 16] on cpu; "
               "it takes a dense tensor [..., D] of float64, float32, bfloat16, float16"),
    "kind": ((X,), {"kind": "batch"}, "kind is 'batch'; it takes one of 'layer', 'rms', 'crms'"),
    "kind None": ((X,), {"kind": None}, "kind is None; it takes one of 'layer', 'rms', 'crms'"),
    "eps": ((X,), {"eps": -1e-5}, "eps is -1e-05; it takes a number >= 0"),
    "eps nan": ((X,), {"eps": float("nan")}, "eps is nan; it takes a number >= 0"),
    "eps word": ((X,), {"eps": "tiny"}, "eps is 'tiny'; it takes a number"),
    "eps tensor": ((X,), {"eps": torch.tensor(1e-5)}, "eps is Tensor; it takes a number"),
    "residual shape": ((X, X[:2]), {}, "residual is float32[2, 16] on cpu; it takes what x is, float32[3, 16] on cpu"),
    "residual row": ((X, X[0]), {}, "residual is float32[16] on cpu; it takes what x is, float32[3, 16] on cpu"),
    "residual dtype": ((X, X.double()), {}, "residual is float64[3, 16] on cpu; it takes what x is, float32[3, 16] on cpu"),
    "residual device": ((X, X.to("meta")), {},
                        "residual is float32[3, 16] on meta; it takes what x is, float32[3, 16] on cpu"),
    "residual number": ((X, 1.0), {}, "residual is float; it takes what x is, float32[3, 16] on cpu"),
    "bias": ((X, X, X), {}, "bias is float32[3, 16] on cpu; with x float32[3, 16] on cpu it takes [16] of float32"),
    "weight size": ((X,), {"weight": t(1)}, "weight is float32[1] on cpu; with x float32[3, 16] on cpu it takes [16] of float32"),
    "weight dtype": ((X,), {"weight": t(16, dtype=torch.float16)},
                     "weight is float16[16] on cpu; with x float32[3, 16] on cpu it takes [16] of float32"),
    "weight of half": ((X.half(),), {"weight": t(16, dtype=torch.bfloat16)},
                       "weight is bfloat16[16] on cpu; with x float16[3, 16] on cpu it takes [16] of float16 or float32"),
    "weight list": ((X,), {"weight": [1.0] * 16}, "weight is list; with x float32[3, 16] on cpu it takes [16] of float32"),
    "beta device": ((X,), {"beta": t(16, device="meta")},
                    "beta is float32[16] on meta; with x float32[3, 16] on cpu it takes [16] of float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", NORM)
@pytest.mark.parametrize("named", [None, "reference"], ids=str)
def test_add_norm_refuses(what, named):
    args, options, text = NORM[what]
    with pytest.raises(ValueError, match=f"^{re.escape('add_norm: ' + text)}$"):
        fa.add_norm(*args, **options, backend=named)


# ---- Backends: names, explain, Unsupported ------------------------------------------------------------


@pytest.fixture
def two_rows():
    """The attention op with two imaginary backends before the reference, so that texts do not vary by machine."""
    op = OPS["attention"]
    rows = (
        Backend("fast", (takes("dtype", torch.float32), takes("D", 16, 32)), "", ""),
        Backend(
            "wide-256",
            (takes("device", "cuda"), takes("dtype", torch.float32, torch.bfloat16)),
            "",
            "",
        ),
    )
    before = op.backends, op.by_name
    op.backends, op.by_name = rows, {b.name: b for b in rows}
    op._chosen.clear()
    yield op
    op.backends, op.by_name = before
    op._chosen.clear()


def test_unsupported_says_every_reason(two_rows):
    q, k = t(1, 4, 8, 48, dtype=torch.float16), t(1, 2, 8, 48, dtype=torch.float16)
    with pytest.raises(fa.Unsupported) as caught:
        fa.attention(q, k, k)
    assert str(caught.value) == (
        "attention: no backend accepts this call\n"
        "attention(q: float16[1, 4, 8, 48], k: float16[1, 2, 8, 48], v: float16[1, 2, 8, 48])\n"
        "  fast      no: dtype is float16 (takes float32); D is 48 (takes 16, 32)\n"
        "  wide-256  no: device is cpu (takes cuda); dtype is float16 (takes float32, bfloat16)"
    )
    assert isinstance(caught.value, NotImplementedError)


def test_a_named_backend_never_falls_back(two_rows):
    q = t(1, 1, 8, 16)
    with pytest.raises(fa.Unsupported) as caught:
        fa.attention(q, q, q, backend="wide")
    assert str(caught.value) == (
        "attention: no backend accepts this call with backend='wide'\n"
        "attention(q: float32[1, 1, 8, 16], k: float32[1, 1, 8, 16], v: float32[1, 1, 8, 16])\n"
        "  fast      ok\n"
        "  wide-256  no: device is cpu (takes cuda)"
    )


def test_explain_says_what_the_exception_says(two_rows):
    q = t(1, 1, 8, 48)
    assert fa.explain(fa.attention, q, q, q) == (
        "attention(q: float32[1, 1, 8, 48], k: float32[1, 1, 8, 48], v: float32[1, 1, 8, 48])\n"
        "  fast      no: D is 48 (takes 16, 32)\n"
        "  wide-256  no: device is cpu (takes cuda)\n"
        "derivatives: by the kernels; second ones through the formula"
    )


def test_explain_of_a_machine(monkeypatch, best_cpu):
    text = fa.explain(fa.attention, *[t(1, 1, 8, 300)] * 3)
    *lines, derivatives = text.splitlines()
    assert derivatives == "derivatives: by the kernels; second ones through the formula"
    assert (
        lines[0]
        == "attention(q: float32[1, 1, 8, 300], k: float32[1, 1, 8, 300], v: float32[1, 1, 8, 300])"
    )
    names = [line.split()[0] for line in lines[1:]]
    assert names == [b.name for b in OPS["attention"].backends]
    assert lines[-1].split() == ["reference", "ok"]
    for line in lines[1:-1]:
        assert "no: " in line
        assert "D is 300 (at most 256); Dv is 300 (at most 256)" in line
    ok = next(
        line.split()[0]
        for line in fa.explain(fa.attention, *[t(1, 1, 8, 64)] * 3).splitlines()[1:]
        if line.endswith(" ok")
    )
    assert ok == best_cpu


def test_explain_of_what_is_made_of_an_op(best_cpu):
    """Without computing anything: the inputs are not even finite."""
    q = torch.full((1, 1, 8, 16), torch.nan)
    calls = [
        (fa.attention_varlen, (q[0], q[0], q[0], torch.tensor([0, 1]))),
        (fa.grouped_attention, (q, q, q, fa.Groups(torch.tensor([[0, 1]])))),
        (fa.topk_attention, (q, q, q, 2)),
        (fa.attention_importance, (q, q)),
        (fa.column_attention, (q, q, q)),
    ]
    for function, args in calls:
        assert any(
            line.split() == [best_cpu, "ok"] for line in fa.explain(function, *args).splitlines()
        )
    assert "second ones are refused" in fa.explain(fa.add_norm, q)


def test_explain_refuses_what_is_no_op():
    known = ", ".join(f"fastattn.{name}" for name in sorted(OPS)) + " and what is made of them"
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'explain: fn is add; it takes one of {known}')}$"
    ):
        fa.explain(torch.add, X, X)
    with pytest.raises(ValueError, match="^attention: q has 2 axes"):
        fa.explain(fa.attention, X, X, X)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(
    "named", ["cuda9", "avx512", "", 5, 0, False, {}, ("cpu",), X.device], ids=str
)
def test_unknown_backends(named, grad):
    q = t(1, 1, 2, 4).requires_grad_(grad)
    names = ", ".join(b.name for b in OPS["attention"].backends)
    with pytest.raises(
        ValueError,
        match=f"^{re.escape(f'attention: backend is {named!r}; attention has {names}')}$",
    ):
        fa.attention(q, q, q, backend=named)


def test_a_backend_is_a_name():
    """Neither an object that is long to print nor one that has no truth value."""
    row = OPS["add_norm"].backends[0]
    with pytest.raises(
        ValueError, match=r"^add_norm: backend is Backend\(.{,40}\); add_norm has cpu-"
    ):
        fa.add_norm(X, backend=row)
    for many in (t(2), np.array(["cpu", "triton"])):
        with pytest.raises(ValueError, match=r"^add_norm: backend is \w+\(.*\); add_norm has cpu-"):
            fa.add_norm(X, backend=many)


@pytest.mark.parametrize("named", ["", None, {}, [], 0, ("cpu",), t(2)], ids=str)
def test_using_takes_names(named):
    shown = re.escape(repr(named))
    with (
        pytest.raises(ValueError, match=f"^using: backend is {shown}; known are cpu, cpu-avx2, "),
        fa.using(named),
    ):
        pass
    if named != "":  # every op
        with (
            pytest.raises(ValueError, match=f"^using: op is {shown}; known are add_norm, "),
            fa.using("cpu", op=named),
        ):
            pass


def test_using_refuses_unknown_names():
    with (
        pytest.raises(ValueError, match=r"^using: backend is 'gpu'; known are cpu, cpu-avx2, "),
        fa.using("gpu"),
    ):
        pass
    known = re.escape(", ".join(sorted(OPS)))
    with (
        pytest.raises(ValueError, match=f"^using: op is 'sdpa'; known are {known}$"),
        fa.using("cpu", op="sdpa"),
    ):
        pass


def test_using_is_undone_and_nests():
    q = t(1, 1, 2, 4)
    chosen = []
    op = OPS["attention"]
    choose = op.choose
    op.choose = lambda args, backend="": chosen.append(backend) or choose(args, backend)
    try:
        fa.attention(q, q, q, backend="reference")
        with fa.using("reference"):
            fa.attention(q, q, q)
            with fa.using("cpu", op="attention"):
                fa.attention(q, q, q)
                fa.attention(q, q, q, backend="reference")
                with fa.using("reference"), fa.using("cpu", op="add_norm"):
                    fa.attention(q, q, q)
            fa.attention(q, q, q)
            with pytest.raises(RuntimeError), fa.using("cpu"):
                raise RuntimeError
            fa.attention(q, q, q)
    finally:
        del op.choose
    assert chosen == ["reference", "reference", "cpu", *["reference"] * 4]


ENVIRONMENT = """
import torch, fastattn as fa
q = torch.zeros(1, 1, 2, 4)
try:
    fa.attention(q, q, q)
    print("runs")
except (fa.Unsupported, ValueError) as error:
    print(str(error).splitlines()[0])
fa.add_norm(q)
"""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("reference", "runs"),
        ("attention=reference", "runs"),
        ("attention=nothing,reference", "attention: backend is 'nothing'; attention has cpu-"),
        ("attention = nothing", "attention: backend is 'nothing'; attention has cpu-"),
        ("add_norm=reference,attention=cuda9", "attention: backend is 'cuda9'; attention has cpu-"),
    ],
)
def test_environment_names_a_backend(value, text, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"FASTATTN_BACKEND": value}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(text)


def test_the_reference_warns_once_when_nobody_asked_for_it():
    op = OPS["attention"]
    q = t(1, 1, 2, 300)
    op._warned = False
    with pytest.warns(
        UserWarning, match="attention runs on the reference implementation, which is slow"
    ) as caught:
        fa.attention(q, q, q)
    assert "D is 300 (at most 256)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.attention(q, q, q)
        fa.attention(q, q, q, backend="reference")


# ---- What no input may do -----------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), float("-inf"), 3e38]
of_attention, of_norm = pytest.mark.op("attention"), pytest.mark.op("add_norm")


@of_attention
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_bad_numbers_stay_in_their_rows(backend, where, bad):
    """A NaN or infinity shows in the rows that read it, and never in another batch element or head.

    (A hidden value counts 0 times, and 0 times NaN is NaN: docs/masks.md.)
    """
    call = {
        n: torch.randn(2, h, m, 24).to(backend.device)
        for n, h, m in (("q", 2, 40), ("k", 1, 45), ("v", 1, 45))
    }
    clean = {n: x.clone().requires_grad_() for n, x in call.items()}
    call[where][1, 0, 20, 3] = bad
    dirty = {n: x.requires_grad_() for n, x in call.items()}
    results = []
    for tensors in (clean, dirty):
        with poisoned():
            o, lse = fa.attention(**tensors, causal=True, return_lse=True, backend=backend.name)
            results.append(
                [o.detach(), *torch.autograd.grad(o, list(tensors.values()), torch.ones_like(o))]
            )
    (o, *grads), (o2, *grads2) = results
    assert all(torch.equal(a[0], b[0]) for a, b in zip([o, *grads], [o2, *grads2])), (
        "it reached another batch element"
    )
    if where == "q":
        rest = [i for i in range(40) if i != 20]
        assert torch.equal(o[1, 0, rest], o2[1, 0, rest])
        assert torch.equal(o[1, 1], o2[1, 1]), "it reached another head"
        assert torch.equal(grads[0][1, 0, rest], grads2[0][1, 0, rest])
    if where == "k":
        before = [i for i in range(40) if i + 5 < 20]  # the rows that do not see key 20
        assert torch.equal(o[1, :, before], o2[1, :, before])
    if bad != bad:
        assert o2[1].isnan().any(), "a NaN in a visible place was swallowed"


@of_norm
@pytest.mark.parametrize("kind", ["layer", "rms", "crms"])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_numbers_stay_in_their_rows_of_norms(backend, kind, bad):
    x = torch.randn(70, 33).to(backend.device)
    rest = [i for i in range(70) if i != 20]
    results = []
    for value in (float(x[20, 3]), bad):
        x[20, 3] = value
        a, w = x.clone().requires_grad_(), torch.ones(33, device=x.device, requires_grad=True)
        with poisoned():
            y = fa.add_norm(a, a.detach(), weight=w, kind=kind, backend=backend.name)
            results.append([y.detach(), *torch.autograd.grad(y, a, torch.ones_like(y))])
    (y, dx), (y2, dx2) = results
    assert torch.equal(y[rest], y2[rest])
    assert torch.equal(dx[rest], dx2[rest])
    if bad != bad:
        assert y2[20].isnan().all()


@of_attention
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 2, 3, 3, 4, 4), (1, 0, 0, 3, 3, 4, 4), (1, 2, 2, 0, 3, 4, 4), (1, 2, 2, 3, 0, 4, 4),
     (1, 2, 2, 0, 0, 4, 4), (1, 2, 1, 3, 3, 0, 4), (1, 2, 1, 3, 3, 4, 0), (1, 0, 1, 3, 3, 4, 4), (1, 1, 1, 1, 1, 1, 1)],
    ids=lambda s: "B{} Hq{} Hk{} Nq{} Nk{} D{} Dv{}".format(*s),
)  # fmt: skip
@pytest.mark.parametrize("mask", [None, Causal(), Window(1, 0)], ids=str)
def test_nothing_is_a_size(backend, shape, mask):
    B, Hq, Hk, Nq, Nk, D, Dv = shape
    call = [
        torch.randn(s).to(backend.device).requires_grad_()
        for s in ((B, Hq, Nq, D), (B, Hk, Nk, D), (B, Hk, Nk, Dv))
    ]
    with poisoned():
        o, lse = fa.attention(*call, mask=mask, return_lse=True, backend=backend.name)
        grads = torch.autograd.grad(o, call, torch.ones_like(o))
    assert o.shape == (B, Hq, Nq, Dv)
    assert lse.shape == (B, Hq, Nq)
    assert torch.isfinite(o).all()
    assert all(g.shape == x.shape and torch.isfinite(g).all() for g, x in zip(grads, call))
    if Nk == 0:
        assert not o.any()
        assert (lse == float("-inf")).all()


@of_norm
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 4), (0,), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms", "crms"])
def test_nothing_is_a_size_of_norms(backend, shape, kind):
    x = torch.randn(shape).to(backend.device).requires_grad_()
    w = torch.ones(shape[-1], device=backend.device, requires_grad=True)
    with poisoned():
        y, s = fa.add_norm(
            x, x.detach(), weight=w, kind=kind, return_sum=True, backend=backend.name
        )
        dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert y.shape == s.shape == dx.shape == x.shape
    assert dw.shape == w.shape
    assert all(torch.isfinite(found).all() for found in (y, dx, dw))


def test_sizes_past_two_to_the_31_elements(best_cpu):
    """More elements of keys than 32 bits count, in 256 bytes of memory."""
    if best_cpu == "reference":
        pytest.skip("the reference would make a copy")
    count = (1 << 25) + 3
    q, k = torch.ones(1, 1, 1, 64), torch.full((1, 1, 1, 64), 0.5).expand(1, 1, count, 64)
    o, lse = fa.attention(q, k, k, return_lse=True, backend=best_cpu)
    assert torch.allclose(o, torch.full_like(o, 0.5), rtol=1e-3)
    assert abs(float(lse) - (4 + math.log(count))) < 1e-2


def test_strides_past_two_to_the_31_elements(best_cpu):
    """Rows so far apart that their distance needs 64 bits; only the pages they lie on are ever touched."""
    try:
        far = torch.empty((1 << 31) + (1 << 16), dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be had")
    step = (1 << 31) // 39
    q, k, v = (torch.randn(1, 1, 40, 64).bfloat16() for _ in range(3))
    spread = [far.as_strided((1, 1, 40, 64), (0, 0, step, 1), at) for at in (0, 64, 128)]
    for place, t in zip(spread, (q, k, v)):
        place.copy_(t)
    results = []
    for call in ((q, k, v), spread):
        call = [t.detach().requires_grad_() for t in call]
        o = fa.attention(*call, causal=True, backend=best_cpu)
        results.append([o.detach(), *torch.autograd.grad(o.float().sum(), call)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    y = fa.add_norm(spread[0][0, 0], spread[1][0, 0], backend=best_cpu)
    assert torch.equal(y, fa.add_norm(q[0, 0], k[0, 0], backend=best_cpu))


def test_memory_that_cannot_be_had_is_an_error(best_cpu):
    q = torch.ones(1, 1, 1, 1).expand(1 << 20, 1 << 20, 1, 64)
    with pytest.raises(RuntimeError, match="alloc"):
        fa.attention(q, q, q, backend=best_cpu)


def test_masks_of_any_number(best_cpu):
    """Bounds far outside 32 and 64 bits' comfort change nothing."""
    q = torch.randn(1, 1, 9, 8)
    full = fa.attention(q, q, q, backend=best_cpu)
    huge = (1 << 62) - 1
    for mask in (Window(huge, huge), Band(huge, huge, huge, huge)):
        assert torch.equal(fa.attention(q, q, q, mask=mask, backend=best_cpu), full)
    for mask in (Band(left=-huge), Band(right=-huge), Band(left=-huge, right_top=-huge)):
        assert not fa.attention(q, q, q, mask=mask, backend=best_cpu).any()


def test_scales_of_any_number(backend_names):
    q = torch.randn(1, 1, 9, 8)
    for name in backend_names:
        assert torch.isfinite(fa.attention(q, q, q, scale=0.0, backend=name)).all()
        assert torch.isfinite(fa.attention(q, q, q, scale=-1e30, backend=name)).all()
        for scale in (float("nan"), float("inf")):
            fa.attention(q, q, q, scale=scale, backend=name)


@pytest.fixture
def backend_names(best_cpu):
    return dict.fromkeys((best_cpu, "reference"))


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "says"),
    [
        (t(4000, 2, 4, 32), t(1, 2, 4, 32), t(1, 2, 4, 32), Full().encode(), "k is .*; axis 0 must be 4000"),
        (t(1, 2, 4, 32), t(1, 2, 4, 8), t(1, 2, 4, 32), Full().encode(), "k is .*; axis 3 must be 32"),
        (t(1, 2, 4, 32), t(1, 2, 9, 32), t(1, 2, 4, 32), Full().encode(), "v is .*; axis 2 must be 9"),
        (t(1, 3, 4, 32), t(1, 2, 4, 32), t(1, 2, 4, 32), Full().encode(), "Hq is 3 and Hk is 2"),
        (t(1, 2, 4, 32), t(1, 2, 4, 32), t(1, 2, 32, 4).mT, Full().encode(), "v has stride 4 on its last axis"),
        (t(1, 2, 4, 32), t(1, 2, 4, 32), t(1, 2, 4, 32), [1], "mask has 1 numbers"),
    ],
)  # fmt: skip
def test_kernels_check_shapes_because_torch_ops_does_not(best_cpu, q, k, v, mask, says):
    with pytest.raises(ValueError, match=says):
        torch.ops.fastattn.attention_fwd(
            q, k, v, *[None] * 15, mask, [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], backend=best_cpu
        )
