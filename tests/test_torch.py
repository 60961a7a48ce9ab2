"""fastattn as a citizen of PyTorch: registration, compilation, autograd, autocast, transforms, threads.

One file because every test asks the same of the same small calls: what torch does to its own functions.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn as fa
from fastattn import choice, testing
from fastattn.masks import Causal, Window
from fastattn.op import OPS, _replaced


def example(op, dtype=torch.float32, device="cpu"):
    """A small call of the op in which every optional tensor of its cases is given."""
    points = [
        c
        for c in op.cases
        if all(n > 1 for n in vars(c).values() if type(n) is int) and not c.layout
    ]
    case = max(points, key=lambda c: (len(c.given or ""), c.mask is not None, -op.cost(c, 4).flops))
    return testing.make(op, case, dtype, device)


def leaves(call):
    return {n: t.requires_grad_() for n, t in call.items() if isinstance(t, torch.Tensor)}


def arguments(op, call):
    """The arguments of torch.ops.fastattn.<op>_fwd that the public function passes for ``call``."""
    seen = []

    def record(op, *args, backend=""):
        seen.append(args)
        return op.fake(*args)

    if "k_new" in call:  # appended by an operator of its own
        op.function(**call)
    with _replaced(record):
        op.function(**call)
    return seen[0]


@pytest.fixture
def name(best_cpu):
    """The backend of tests that concern the package and not a kernel."""
    return best_cpu


# ---- torch.library ------------------------------------------------------------------------------------


def test_opcheck(op, name):
    args = arguments(op, example(op))
    if op.backward:
        args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(op.op, args, {"backend": name})


@pytest.mark.gradients
def test_opcheck_backward(op, name):
    args = arguments(op, example(op))
    known = dict(zip(op.arguments, args)) | dict(zip(op.outputs, op.call(*args, backend=name)))
    known |= {f"d{n}": torch.randn_like(known[n]) for n in op.outputs}
    known = (
        op.save(known) | {n: v for n, v in known.items() if n.startswith("d")} if op.save else known
    )
    known["needs"] = [True] * len(op.gradients)
    given = [known[n] for n in op.backward_arguments]
    torch.library.opcheck(
        op.op_backward, given, {"backend": name}, test_utils=("test_schema", "test_faketensor")
    )


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(op, backend, dtype):
    if backend.device != "cpu":
        pytest.skip(f"{backend.name}: compared on the CPU")
    call = example(op, dtype)
    if why := testing.refusal(op, backend, call):
        pytest.skip(f"{backend.name}: {'; '.join(why)}")
    args = arguments(op, call)
    real = op.call(*args, backend=backend.name)
    with FakeTensorMode() as mode:
        fake = op.call(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    for r, f in zip(real, fake):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


def test_meta_tensors(op):
    call = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in example(op).items()}
    outs = op.function(**call)
    for o in outs if isinstance(outs, tuple) else (outs,):
        assert o.device.type == "meta"


# ---- torch.compile ------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def attention_of_lengths(Nq, Nk):
    return {n: torch.randn(2, h, m, 16) for n, h, m in (("q", 4, Nq), ("k", 2, Nk), ("v", 2, Nk))}


def norm_of_rows(N, _):
    return {
        "x": torch.randn(2, N, 24),
        "residual": torch.randn(2, N, 24),
        "weight": torch.randn(24),
    }


def compare_with_eager(function, compiled, call, **options):
    call = {n: t.requires_grad_() for n, t in call.items()}
    results = []
    for f in (function, compiled):
        outs = f(**call, **options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        loss = sum(torch.where(torch.isfinite(o), o, 0.0).square().sum() for o in outs)
        grads = torch.autograd.grad(loss, list(call.values()))
        results.append([*(o.detach() for o in outs), *grads])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("function", "make", "options"),
    [
        (fa.attention, attention_of_lengths, {"mask": Causal(), "return_lse": True}),
        (fa.attention, attention_of_lengths, {"mask": Window(3, 3) & Causal("top-left")}),
        (fa.add_norm, norm_of_rows, {"kind": "rms", "return_sum": True}),
        (fa.add_norm, norm_of_rows, {"kind": "layer"}),
    ],
    ids=["attention", "attention-window", "add_norm-rms", "add_norm-layer"],
)
def test_compiled_once_for_all_lengths(function, make, options, name, dynamo):
    """One graph, no break, forward and backward, and nothing compiled again for another length."""

    def step(**call):
        return function(**call, **options, backend=name)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for Nq, Nk in ((5, 9), (9, 5), (17, 40), (33, 33), (2, 64)):
        compare_with_eager(step, compiled, make(Nq, Nk))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="inductor wants a C++ compiler"
)
def test_inductor(name):
    torch._dynamo.reset()

    def step(q, k, v):
        o = fa.attention(q * 1.5, k, v, causal=True, backend=name)
        return fa.add_norm(o, q, kind="rms", backend=name) * 2

    call = attention_of_lengths(12, 12)
    call["v"] = torch.randn(2, 2, 12, 16)
    compare_with_eager(step, torch.compile(step, fullgraph=True), call)


def test_compiled_without_gradients(name, dynamo):
    compiled = torch.compile(
        lambda q, k, v: fa.attention(q, k, v, backend=name), fullgraph=True, backend="eager"
    )
    call = attention_of_lengths(8, 8)
    with torch.no_grad():
        assert torch.equal(compiled(**call), fa.attention(**call, backend=name))


def test_compiled_code_follows_using(name):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: fa.attention(q, q, q), fullgraph=True, backend="eager")
    q = torch.randn(1, 1, 5, 8)
    compiled(q)
    with fa.using("reference"):
        expected = fa.attention(q, q, q, backend="reference")
        assert torch.equal(compiled(q), expected)


def test_export(name):
    class Net(torch.nn.Module):
        def forward(self, q, k, v):
            return fa.attention(q, k, v, causal=True, backend=name)

    call = attention_of_lengths(8, 12)
    length = torch.export.Dim("Nq", min=2, max=64)
    shapes = {"q": {2: length}, "k": None, "v": None}
    program = torch.export.export(Net(), (), kwargs=call, dynamic_shapes=shapes)
    assert "fastattn.attention_fwd" in str(program.graph)
    longer = call | {"q": torch.randn(2, 4, 20, 16)}
    assert torch.equal(program.module()(**longer), Net()(**longer))


# ---- Autograd -----------------------------------------------------------------------------------------


@pytest.mark.gradients
def test_gradients_go_only_where_they_are_wanted(op, backend):
    """Each floating input alone: its gradient is bit for bit what it is beside the others'."""
    call = example(op, device=backend.device)
    wanted = leaves({n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in call.items()})
    everything = op.function(**(call | wanted), backend=backend.name)
    everything = everything if isinstance(everything, tuple) else (everything,)
    together = torch.autograd.grad([o.sum() for o in everything], list(wanted.values()))
    for (n, t), expected in zip(wanted.items(), together):
        alone = t.detach().clone().requires_grad_()
        outs = op.function(
            **{m: s for m, s in call.items() if m != n}, **{n: alone}, backend=backend.name
        )
        outs = outs if isinstance(outs, tuple) else (outs,)
        outs = [o for o in outs if o.requires_grad]
        (found,) = torch.autograd.grad([o.sum() for o in outs], [alone])
        assert torch.equal(found, expected), n


@pytest.mark.gradients
def test_outputs_one_at_a_time(op, backend):
    """Gradients of a sum of outputs are the sums of theirs, whichever output is not used."""
    call = example(op, device=backend.device)
    options = inspect.signature(op.function).parameters
    call |= {n: True for n in ("return_lse", "return_sum") if n in options}
    wanted = leaves(call)
    outs = op.function(**call, backend=backend.name)
    outs = outs if isinstance(outs, tuple) else (outs,)
    finite = [torch.where(torch.isfinite(o), o, 0.0) for o in outs]
    alone = [
        torch.autograd.grad(o.sum(), list(wanted.values()), retain_graph=True, allow_unused=True)
        for o in finite
    ]
    both = torch.autograd.grad(sum(o.sum() for o in finite), list(wanted.values()))
    for (n, t), *parts, whole in zip(wanted.items(), *alone, both):
        total = sum(torch.zeros_like(t) if p is None else p for p in parts)
        assert torch.allclose(total, whole, rtol=1e-4, atol=1e-4), n


@pytest.mark.gradients
def test_a_graph_can_be_used_twice(op, name):
    call = example(op)
    wanted = list(leaves(call).values())
    outs = op.function(**call, backend=name)
    loss = sum(o.square().sum() for o in (outs if isinstance(outs, tuple) else (outs,)))
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.gradients
def test_batches_of_gradients(op, backend):
    """``is_grads_batched``: each sample has the bits that it has alone, however the batch lies in memory."""
    call = example(op, device=backend.device)
    options = inspect.signature(op.function).parameters
    call |= {n: True for n in ("return_lse", "return_sum") if n in options}
    wanted = list(leaves(call).values())
    outs = op.function(**call, backend=backend.name)
    batches = [torch.randn(*o.shape, 3, device=backend.device).movedim(-1, 0) for o in outs]
    together = torch.autograd.grad(outs, wanted, batches, retain_graph=True, is_grads_batched=True)
    for n in range(3):
        sample = [batch[n] for batch in batches]
        alone = torch.autograd.grad(outs, wanted, sample, retain_graph=True)
        assert all(torch.equal(g[n], expected) for g, expected in zip(together, alone))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.gradients
def test_vectorized_jacobian(op, name):
    call = example(op)
    first = next(iter(leaves(call)))

    def function(t):
        outs = op.function(**(call | {first: t}), backend=name)
        return (outs[0] if isinstance(outs, tuple) else outs).flatten()[:40]

    jacobian = torch.autograd.functional.jacobian
    found = jacobian(function, call[first], vectorize=True)
    assert torch.equal(found, jacobian(function, call[first]))
    with pytest.raises(RuntimeError, match=f"{op.name}: batched gradients .* take create"):
        jacobian(function, call[first], vectorize=True, create_graph=True)


def test_one_tensor_as_all_inputs(name):
    x = torch.randn(1, 2, 7, 8, dtype=torch.float64).float().requires_grad_()
    fa.attention(x, x, x, causal=True, backend=name).square().sum().backward()
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    fa.attention(*parts, causal=True, backend=name).square().sum().backward()
    assert torch.equal(x.grad, parts[0].grad + parts[1].grad + parts[2].grad) or torch.allclose(
        x.grad, sum(p.grad for p in parts)
    )


def test_an_output_changed_in_place_is_noticed(name):
    q = torch.randn(1, 2, 7, 8, requires_grad=True)
    o = fa.attention(q, q, q, backend=name)
    o.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.op("add_norm")
def test_second_derivatives_are_refused(op, name):
    call = example(op)
    wanted = list(leaves(call).values())
    outs = op.function(**call, backend=name)
    out = outs[0] if isinstance(outs, tuple) else outs
    grads = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.name}: second derivatives are not implemented"):
        torch.autograd.grad(sum(g.sum() for g in grads), wanted)


def test_second_derivatives_of_attention(name):
    """Through the formula: what autograd makes of the reference, and finite differences."""
    make = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True)
    q, k, v = make(1, 2, 3, 4), make(1, 1, 5, 4), make(1, 1, 5, 2)
    bias, slopes = make(1, 1, 3, 5), make(2)

    def function(backend, q, k, v, bias, slopes):
        given = {"bias": [bias, fa.bias.ALiBi(slopes)], "softcap": 3.0, "dropout": 0.2, "seed": 3}
        return fa.attention(q, k, v, causal=True, backend=backend, **given)

    inputs = (q, k, v, bias, slopes)
    torch.autograd.gradgradcheck(functools.partial(function, "reference"), inputs)

    def penalty(backend):
        parts = [t.detach().float().requires_grad_() for t in inputs]
        first = torch.autograd.grad(
            function(backend, *parts).square().sum(), parts, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), parts)

    for ours, formula in zip(penalty(name), penalty("reference")):
        torch.testing.assert_close(ours, formula, rtol=1e-4, atol=1e-4)


@pytest.mark.gradients
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_forward_mode_is_refused(op, name):
    """torch itself would drop the tangents of a custom operator and return zeros."""
    call = example(op)
    first = next(n for n, t in call.items() if isinstance(t, torch.Tensor))
    with pytest.raises(RuntimeError, match=f"{op.name}: forward-mode derivatives"):
        torch.func.jvp(
            lambda t: op.function(**(call | {first: t}), backend=name),
            (call[first],),
            (torch.ones_like(call[first]),),
        )


def test_checkpoint(name):
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    plain = fa.attention(q, q, q, causal=True, backend=name).square().sum()
    again = torch.utils.checkpoint.checkpoint(
        lambda q: fa.attention(q, q, q, causal=True, backend=name).square().sum(),
        q,
        use_reentrant=False,
    )
    assert torch.equal(torch.autograd.grad(plain, q)[0], torch.autograd.grad(again, q)[0])


@pytest.mark.gradients
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
def test_modes_without_gradients(op, mode, name):
    call = example(op)
    leaves(call)
    expected = op.function(**call, backend=name)
    with mode():
        found = op.function(**call, backend=name)
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, found)))
    for a, b in pairs:
        assert a.requires_grad
        assert not b.requires_grad
        assert torch.equal(a, b)


def test_inference_tensors_as_inputs(name):
    with torch.inference_mode():
        q = torch.randn(1, 2, 5, 8)
    assert fa.attention(q, q, q, backend=name).shape == q.shape


# ---- Autocast, default dtype --------------------------------------------------------------------------


@pytest.mark.gradients
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(op, low, name):
    """The call runs in autocast's dtype and the gradients come back in the leaves'."""
    call = example(op)
    wanted = leaves(call)
    with torch.autocast("cpu", dtype=low):
        outs = op.function(**call, backend=name)
    out = outs[0] if isinstance(outs, tuple) else outs
    assert out.dtype == low
    for t, g in zip(wanted.values(), torch.autograd.grad(out.float().sum(), list(wanted.values()))):
        assert g.dtype == t.dtype == torch.float32
        assert torch.isfinite(g).all()


def test_autocast_leaves_float64_alone():
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fa.attention(q, q, q, backend="reference").dtype == torch.float64


def test_autocast_joins_dtypes(name):
    """Where autocast is on, inputs of several dtypes meet in its own, as with torch's attention."""
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fa.attention(q, k, k, backend=name).dtype == torch.bfloat16


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_parameters_of_its_dtypes_unrounded(low, given, name):
    x, parameters = torch.randn(3, 8), torch.randn(3, 8).to(given).requires_grad_()
    with torch.autocast("cpu", dtype=low):
        found = fa.add_norm(x, None, *parameters, backend=name)
    expected = fa.add_norm(x.to(low), None, *parameters.float(), backend=name)
    assert torch.equal(found, expected)
    (g,) = torch.autograd.grad(found.float().sum(), parameters)
    assert g.dtype == given
    with (
        torch.autocast("cpu", dtype=low),
        pytest.raises(
            ValueError, match=r"weight is float64\[8\] .* it takes \[8\] of .* or float32 or"
        ),
    ):
        fa.add_norm(x, weight=torch.ones(8).double(), backend=name)


def test_default_dtype_does_not_matter(name):
    q = torch.randn(1, 2, 5, 8)
    expected = fa.attention(q, q, q, return_lse=True, backend=name)
    torch.set_default_dtype(torch.float64)
    try:
        found = fa.attention(q, q, q, return_lse=True, backend=name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, found))


# ---- torch.func ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0), (0, None, None), (1, 0, None), (None, 2, 2)], ids=str
)
def test_vmap_of_attention(in_dims, name):
    shape = (2, 2, 5, 8)
    call = []
    for dim in in_dims:
        batched = torch.randn(*shape) if dim is None else torch.randn(3, *shape).movedim(0, dim)
        call.append(batched)
    function = lambda q, k, v: fa.attention(q, k, v, causal=True, backend=name)  # noqa: E731
    found = torch.func.vmap(function, in_dims=in_dims)(*call)
    for n in range(3):
        one = [t if dim is None else t.select(dim, n) for t, dim in zip(call, in_dims)]
        assert torch.equal(found[n], function(*one))


def test_vmap_of_add_norm(name):
    x, w = torch.randn(3, 4, 8), torch.randn(3, 8)
    found = torch.func.vmap(lambda x, w: fa.add_norm(x, weight=w, kind="rms", backend=name))(x, w)
    for n in range(3):
        assert torch.equal(found[n], fa.add_norm(x[n], weight=w[n], kind="rms", backend=name))


@pytest.mark.skipif(
    not hasattr(torch.library, "register_vmap"), reason="torch 2.4 has no rules for batches of ops"
)
def test_vmap_folds_into_the_batch(name, monkeypatch):
    """One kernel call, forward and backward, where nothing counts batches; a loop where something does."""
    calls, op = [], OPS["attention"]
    choose = op.choose
    monkeypatch.setattr(op, "choose", lambda *args: calls.append(args) or choose(*args))
    q = torch.randn(3, 1, 2, 5, 8)

    def loss(q, **options):
        return fa.attention(q, q, q, backend=name, **options).square().sum()

    def count(function):
        calls.clear()
        torch.func.vmap(function)(q)
        return len(calls)

    bias = torch.randn(1, 1, 5, 5)
    assert count(lambda q: fa.attention(q, q, q, bias=bias, backend=name)) == 1
    assert count(torch.func.grad(loss)) == 2
    assert count(lambda q: loss(q, dropout=0.5, seed=1)) == 3


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch 2.4's own
def test_gradients_of_gradients(name):
    """torch.func.grad twice, and as autograd does it."""
    q = torch.randn(1, 2, 5, 8)

    def loss(q):
        return fa.attention(q, q, 2 * q, causal=True, backend=name).sin().sum()

    def penalty(q):
        return torch.func.grad(loss)(q).square().sum()

    x = q.clone().requires_grad_()
    first = torch.autograd.grad(loss(x), x, create_graph=True)[0]
    torch.testing.assert_close(first, torch.func.grad(loss)(q))
    second = torch.autograd.grad(first.square().sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(penalty)(q), second)
    batch = torch.stack([q, q + 1])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(penalty))(batch)[0], second)


# ---- Objects, threads ---------------------------------------------------------------------------------


def test_masks_travel():
    mask = Causal("top-left") & Window(3, None)
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert copy.deepcopy(mask) == mask


def test_parameters_and_subclasses(name):
    class Tagged(torch.Tensor):
        pass

    q = torch.randn(1, 2, 5, 8)
    expected = fa.attention(q, q, q, backend=name)
    parameter = torch.nn.Parameter(q)
    assert torch.equal(fa.attention(parameter, parameter, parameter, backend=name), expected)
    tagged = q.as_subclass(Tagged)
    assert torch.equal(
        fa.attention(tagged, tagged, tagged, backend=name).as_subclass(torch.Tensor), expected
    )


def test_many_python_threads_at_once(name):
    """The GIL is released while kernels run; calls side by side do not disturb one another."""
    calls = [attention_of_lengths(30 + n, 50) for n in range(4)]

    def run(call):
        call = {n: t.detach().requires_grad_() for n, t in call.items()}
        o = fa.attention(**call, causal=True, backend=name)
        return [o.detach(), *torch.autograd.grad(o.square().sum(), list(call.values()))]

    expected = [run(call) for call in calls]
    wrong = []

    def work(n):
        for _ in range(10):
            if not all(torch.equal(a, b) for a, b in zip(run(calls[n]), expected[n])):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_lazy_negation_is_seen():
    """The imaginary part of a conjugate is a view that means its negative: kernels read memory, so it must be resolved."""
    q, k = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 9, 8)
    negated = torch._neg_view(q)
    assert negated.is_neg()
    assert torch.equal(fa.attention(negated, k, k), fa.attention(-q, k, k))
    x, y = torch.randn(3, 8), torch._neg_view(torch.randn(3, 8))
    assert torch.equal(fa.add_norm(x, y), fa.add_norm(x, y.resolve_neg()))


def test_lazy_negation_is_seen_by_gradients():
    q, k, g = (torch.randn(1, 1, 3, 8) for _ in range(3))

    def gradient(q, g):
        return torch.autograd.grad(fa.attention(q.requires_grad_(), k, k), q, g)[0]

    expected = gradient(-q, -g)
    assert torch.equal(gradient(torch._neg_view(q), -g), expected)
    assert torch.equal(gradient(-q, torch._neg_view(g)), expected)


def test_explain_leaves_other_threads_alone():
    q = torch.randn(1, 2, 40, 32)
    expected, stop = fa.attention(q, q, q), threading.Event()

    def explain():
        while not stop.is_set():
            fa.explain(fa.attention, q, q, q)

    other = threading.Thread(target=explain)
    other.start()
    try:
        assert all(torch.equal(fa.attention(q, q, q), expected) for _ in range(300))
    finally:
        stop.set()
        other.join()


def test_overlapping_blocks_of_using_end_as_they_began():
    first, second = fa.using("reference"), fa.using("cpu")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert not choice.PROCESS.choices


DDP = """
import os, sys
import torch, torch.distributed as dist
import fastattn as fa

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.sinks = (torch.nn.Parameter(torch.randn(s)) for s in ((4, 21), (4,)))
        self.proj = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.proj(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return fa.attention(q, k, v, bias=fa.bias.Toeplitz(self.table), sinks=self.sinks, causal=True)

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
x = torch.randn(4, 11, 32, generator=torch.Generator().manual_seed(1))
net = Net()
ours = torch.nn.parallel.DistributedDataParallel(net)
ours(x[2 * rank : 2 * rank + 2]).square().mean().backward()
alone = Net()
alone(x).square().mean().backward()
for a, b in zip(net.parameters(), alone.parameters()):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed part")
def test_distributed_data_parallel(tmp_path):
    """Two processes with half the batch each have the gradients of one with all of it."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
        assert text.splitlines()[-1] == "equal"
