"""The contract: every op x backend x dtype x case agrees with the reference within its error budget.

Nothing here names a shape, a dtype or a tolerance: the descriptors do.  The second half proves the proof, with
backends that are wrong in one way each and must not pass.

One file because a proof and the proof that it can fail belong together.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fastattn.backends import Backend
from fastattn.kernels.decode import reference as decode_formula
from fastattn.masks import (
    KINDS,
    WIDTH,
    Band,
    Causal,
    Dilated,
    Full,
    Prefix,
    Window,
    materialize,
)
from fastattn.op import OPS, Case, Op
from fastattn.testing import Failure, prove, prove_reference, why_not


@pytest.mark.contract
def test_forward_and_gradients_match_reference(op, backend, dtype, case):
    if why := why_not(op, backend, dtype, case) or left_out(op, backend, dtype, case):
        pytest.skip(f"{backend.name}: {why}")
    prove(op, backend, dtype, case)


def left_out(op: Op, backend: Backend, dtype: torch.dtype, case: Case) -> str:
    """Triton's interpreter is slow: of cases that name the same things it runs four, each in one dtype, drawn by chance
    and the same each time."""
    interpreted = backend.family == "triton" and backend.device == "cpu"
    drawn = random.Random(f"{op.name} {case}").choice(op.dtypes)
    if not interpreted or (dtype == drawn and id(case) in sample(op.name)):
        return ""
    return "the interpreter runs four cases of a kind, each in one dtype (fastattn verify --all runs all in all)"


@functools.cache
def sample(name: str) -> set[int]:
    op, draw, kinds = OPS[name], random.Random(name), {}
    for case in op.cases:
        named = frozenset(n for n, value in vars(case).items() if value not in (None, False))
        kinds.setdefault(named, []).append(case)
    return {id(case) for alike in kinds.values() for case in draw.sample(alike, min(4, len(alike)))}


@pytest.mark.formula
def test_reference_matches_finite_differences_and_peers(op, backend, case):
    prove_reference(op, case)


# ---- Random points ------------------------------------------------------------------------------------


def random_attention(rng: random.Random) -> Case:
    """Not of rows that all see but a few keys: there the reference's float32 gradient is nearly exact."""

    def mask():
        widths = [None, 7, 8, rng.randrange(7, 80)]
        kinds = [
            Full(),
            Causal(),
            Causal("top-left"),
            Window(rng.choice(widths), rng.choice(widths)),
            Window(rng.choice(widths), rng.choice(widths)),
            Causal() | Prefix(rng.randrange(100)),
            Dilated(rng.randrange(20, 60), rng.randrange(1, 6)) | Full(),
        ]
        return rng.choice(kinds) & rng.choice(kinds) if rng.random() < 0.3 else rng.choice(kinds)

    def now_and_then(*values):
        return rng.choice(values) if rng.random() < 0.25 else None

    def length(least):
        return rng.choice(
            [rng.randrange(least, least + 12), rng.randrange(least, 180), 16 * rng.randrange(1, 9)]
        )

    Hk = rng.choice([1, 1, 2, 3])
    return Case(
        B=rng.choice([1, 2, 3]), Hq=Hk * rng.choice([1, 1, 2, 4]), Hk=Hk, Nq=length(8), Nk=length(8),
        D=rng.choice([rng.randrange(1, 40), 32, 64, 128, rng.randrange(40, 257)]),
        Dv=rng.choice([None, None, rng.randrange(1, 257)]), mask=mask(),
        scale=rng.choice([None, None, None, 0.1, -0.05]),
        layout=rng.choice([None, None, "transposed", "sliced", "broadcast", "last-axis"]),
        bias=now_and_then("BHNM", "1HNM", "B1NM", "toeplitz", "relative", "key", "1H1M"),
        weight=now_and_then("1HNM", "toeplitz"), softcap=now_and_then(2.0, 30.0), sinks=now_and_then(True),
        **now_and_then({"dropout": 0.2, "seed": rng.randrange(1 << 62)}) or {},
    )  # fmt: skip


def random_norm(rng: random.Random) -> Case:
    given = [name for name in ("residual", "bias", "weight", "beta") if rng.random() < 0.5]
    return Case(
        N=rng.choice([1, 2, rng.randrange(1, 300)]), D=rng.choice([3, rng.randrange(3, 70), rng.randrange(3, 2000)]),
        kind=rng.choice(["layer", "rms", "crms"]), given=" ".join(given), return_sum=rng.random() < 0.5,
        wide=rng.random() < 0.5, layout=rng.choice([None, None, "sliced", "broadcast", "last-axis"]),
    )  # fmt: skip


def random_decode(rng: random.Random) -> Case:
    Hk, Nq, B = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3, 5]), rng.choice([1, 2, 3])
    Nmax = rng.choice([rng.randrange(20, 60), rng.randrange(60, 200), rng.randrange(200, 1500)])
    given = " ".join(name for name in ("new", "sinks", "bias") if rng.random() < 0.4)
    page = rng.choice([None, None, 1, 16, rng.randrange(2, 40)])
    return Case(
        B=B, Hq=Hk * rng.choice([1, 2, 3, 4, 8]), Hk=Hk, Nq=Nq, Nmax=Nmax, page=page,
        lengths=tuple(rng.randrange(8, Nmax - Nq + 1) for _ in range(B)),
        D=rng.choice([rng.randrange(4, 40), 64, 128, rng.randrange(40, 257)]),
        Dv=rng.choice([None, None, rng.randrange(1, 257)]), given=given,
        mask=rng.choice([None, None, Causal(), Window(rng.randrange(4, 90), rng.choice([None, 0, 3]))]),
        softcap=rng.choice([None, None, 3.0]), scale=rng.choice([None, None, -0.05]),
        num_splits=rng.choice([None, None, 2, 7]), layout=rng.choice([None, None, "transposed", "sliced"]),
    )  # fmt: skip


RANDOM = {"attention": random_attention, "add_norm": random_norm, "attention_decode": random_decode}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", RANDOM)
def test_random_points(name, seed, best_cpu, monkeypatch):
    """A hundred points nobody chose.

    Within twice the budget: of so many small tensors, a few have a reference that is exact by luck.  What is
    wrong is wrong by far more.
    """
    rng = random.Random(f"{name} {seed}")
    op = OPS[name]
    monkeypatch.setattr(op, "budget", 2 * op.budget)
    for dtype in rng.sample(op.dtypes * 2, 5):
        case = RANDOM[name](rng)
        try:
            prove(op, op.by_name[best_cpu], dtype, case)
        except Exception as error:
            raise AssertionError(f"{name} on {best_cpu}, {dtype}, {case}: {error}") from error


# ---- Prove the proof ----------------------------------------------------------------------------------


class Wrong:
    """The reference as a backend of its own, changed in one place.

    ``inputs(known)`` changes what the formula is given, ``outputs(known, found)`` and ``gradients(known, found)``
    what it gave; all are dictionaries by argument name.  A tensor left out of ``found`` is never written.
    """

    append = staticmethod(
        decode_formula.append
    )  # what attention_decode asks of a row beside forward

    def __init__(self, op: str, *, inputs=None, outputs=None, gradients=None) -> None:
        self.op = OPS[op]
        self.inputs = inputs or (lambda known: {})
        self.outputs = outputs or (lambda known, found: {})
        self.gradients = gradients or (lambda known, found: {})

    def forward(self, *args) -> None:
        known = dict(zip(self.op.arguments, args[len(self.op.outputs) :]))
        found = self.op.reference(*(known | self.inputs(known)).values())
        self._write(args, dict(zip(self.op.outputs, found)), self.outputs, known)

    def backward(self, *args) -> None:
        known = dict(zip(self.op.backward_arguments, args[len(self.op.gradients) :]))
        known = self.op.recall(known) if self.op.recall else known
        given = {name: known.get(name) for name in self.op.arguments}
        found = differentiate(self.op, known | self.inputs(given))
        self._write(args, found, self.gradients, known)

    @staticmethod
    def _write(tensors, found, change, known) -> None:
        found |= change(known, found)
        for tensor, value in zip(tensors, found.values()):
            if value is not UNWRITTEN and value.shape == tensor.shape:  # what was left out has none
                tensor.copy_(value)


UNWRITTEN = object()


def differentiate(op: Op, known):
    return dict(zip(op.gradients, op._reference_backward(known)))


def of_inputs(change):
    """The outputs of attention for other inputs, of other shapes perhaps."""
    return outputs_of("attention", change)


def outputs_of(name, change):
    op = OPS[name]
    return lambda known, found: dict(
        zip(op.outputs, op.reference(*(known | change(known)).values()))
    )


def nodes(code):
    """The formula of a mask, node by node."""
    return [tuple(code[at : at + WIDTH]) for at in range(0, len(code), WIDTH)]


def band(change):
    """Other bands; ``change`` maps (left, right, left_top, right_top)."""

    def bands(known):
        code = []
        for kind, *p in nodes(known["mask"]):
            code += Band(*change(*p[:4])).encode() if KINDS[kind] == "band" else (kind, *p)
        return {"mask": code}

    return bands


def number(name, change):
    at = ("scale", "softcap", "low", "high", "dropout", "by_slot", "topk").index(name)
    return lambda known: {
        "numbers": tuple(change(x) if i == at else x for i, x in enumerate(known["numbers"]))
    }


def slots(change):
    return lambda known: {
        name: None if known[name] is None else change(known[name])
        for name in ("slots_q", "slots_k")
    }


def without(*names):
    return lambda known: dict.fromkeys(names)


def or_for_and(known):
    code = []
    for kind, *p in nodes(known["mask"]):
        code += (KINDS.index("or") if KINDS[kind] == "and" else kind, *p)
    return {"mask": code}


def without_last_tile(known):
    """The keys past the last whole tile of 32, of a call that says nothing about single keys."""
    Nk = known["k"].shape[2]
    kept = Nk // 32 * 32 or Nk
    if len(known["mask"]) > WIDTH or known["mask"][0] or known["bias"] is not None:
        return {}
    if known["slots_q"] is not None:
        return {}
    left, right, left_top, right_top = known["mask"][1:5]  # still counted from the end of all keys
    code = Band(left - (Nk - kept), right + (Nk - kept), left_top, right_top).encode()
    return {
        "k": known["k"][:, :, :kept],
        "v": known["v"][:, :, :kept],
        "mask": code,
        "weight": None,
        "visible": None,
    }


def heads_by_remainder(known):
    """Query head h reads key head h % Hk."""
    order = [h % known["k"].shape[1] for h in range(known["q"].shape[1])]
    return {name: known[name][:, order] for name in "kv"} | {"heads": None}


def cached_heads_by_remainder(known):
    axis = 1 if known["block_table"] is None else 2
    caches = {name: known[name] for name in ("k_cache", "v_cache")}
    order = [h % known["k_cache"].shape[axis] for h in range(known["q"].shape[1])]
    return {
        name: cache.index_select(axis, torch.tensor(order, dtype=torch.long))
        for name, cache in caches.items()
    }


def room(known):
    """The most tokens that a cache holds before new ones."""
    k, table = known["k_cache"], known["block_table"]
    return (k.shape[2] if table is None else table.shape[1] * k.shape[1]) - known["num_new"]


def dense(known):
    """Every tensor read as if its rows lay one after another."""

    def read(t):
        if not isinstance(t, torch.Tensor) or 0 in t.stride():
            return t
        return torch.as_strided(t, (t.numel(),), (1,)).nan_to_num().view(t.shape)

    return {name: read(t) for name, t in known.items()}


def logits(known):
    """Masked logits in float32, and the values that go with them, of a call that is plain."""
    q, k, v = (known[name].float() for name in "qkv")
    k, v = (t.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1) for t in (k, v))
    visible = materialize(
        known["mask"], q.shape[2], k.shape[2], None, known["blocks"], known["visible"]
    )
    return (known["numbers"][0] * (q @ k.mT)).masked_fill(~visible, float("-inf")), v


def is_plain(known):
    return (
        all(known[name] is None for name in ("bias", "weight", "sinks", "heads", "slots_q"))
        and tuple(known["numbers"][1:]) == PLAIN
    )


PLAIN = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)


def rescale_forgotten(known, found):
    """Two tiles of keys; the second is added to the first without exp(m_old - m_new)."""
    if known["k"].shape[2] < 2 or not is_plain(known):
        return {}
    s, v = logits(known)
    first, second = s.tensor_split(2, -1)
    m = first.amax(-1, keepdim=True).clamp(min=-1e30)
    p = torch.cat(
        [(first - m).exp(), (second - torch.maximum(m, second.amax(-1, keepdim=True))).exp()], -1
    )
    return {"o": ((p @ v) / p.sum(-1, keepdim=True)).nan_to_num()}


def coarse_weights(known, found):
    """Softmax weights rounded to bfloat16 whatever the dtype."""
    if not is_plain(known):
        return {}
    s, v = logits(known)
    return {"o": (s - found["lse"][..., None]).exp().nan_to_num().bfloat16().float() @ v}


def times(name, factor):
    return lambda known, found: {name: found[name] * factor}


def leak(name):
    """A little of each row is found in the next."""
    return lambda known, found: {
        name: found[name] + 0.01 * found[name].roll(1, 0 if found[name].dim() < 3 else 2)
    }


def first(name, count):
    """Rows past ``count`` keep what was in memory."""

    def change(known, found):
        rows = torch.arange(found[name].shape[-2 if found[name].dim() > 1 else -1])
        rows = rows[:, None] if found[name].dim() > 1 else rows
        return {name: torch.where(rows < count, found[name], torch.nan)}

    return change


def zeros(known, found):
    return {name: torch.zeros_like(t) for name, t in found.items()}


def unwritten(known, found):
    return dict.fromkeys(found, UNWRITTEN)


def noise(known, found):
    """One unit in the last place at another element each time: within every budget, and not the same."""
    name, t = next((name, t.clone()) for name, t in found.items() if t.dim() > 1)
    if t.numel():
        noise.calls += 1
        at = t.view(-1)[noise.calls % t.numel()]
        at.copy_(at * (1 + torch.finfo(t.dtype).eps))
    return {name: t}


noise.calls = 0


def statistics(change):
    """Other statistics; ``change(h, mean, rstd, known)`` gives mean and rstd."""

    def outputs(known, found):
        h = (found["s"] if found["s"].numel() else known["x"]).float()
        mean, rstd = change(h, found["mean"].float(), found["rstd"].float(), known)
        y = (h - mean[:, None]) * rstd[:, None]
        y = y if known["weight"] is None else y * known["weight"]
        return {"y": y if known["beta"] is None else y + known["beta"], "mean": mean, "rstd": rstd}

    return outputs


def unbiased(h, mean, rstd, known):
    """Sums over D channels divided by D - 1."""
    D = h.shape[1]
    return mean, rstd * (max(D - 1, 1) / max(D, 1)) ** 0.5


def eps_outside(h, mean, rstd, known):
    return mean, 1 / ((1 / rstd.square() - known["eps"]).clamp(min=0).sqrt() + known["eps"])


def no_tail(h, mean, rstd, known):
    """Channels that fill no vector of eight are left out of the mean."""
    return mean if known["kind"] else h[:, : h.shape[1] // 8 * 8 or None].mean(1), rstd


NONE = Band().left
WRONG = {  # one line, one way to be wrong
    "attention": SimpleNamespace(
        off_by_one=Wrong("attention", inputs=band(lambda a, b, c, d: (a, b + 1, c, d + 1))),
        window_too_short=Wrong("attention", inputs=band(lambda a, b, c, d: (a - 1, b, c, d))),
        other_alignment=Wrong("attention", inputs=band(lambda a, b, c, d: (c, d, a, b))),
        mask_forgotten=Wrong("attention", inputs=band(lambda a, b, c, d: (NONE, NONE, NONE, NONE))),
        last_tile_dropped=Wrong("attention", outputs=of_inputs(without_last_tile)),
        heads_by_remainder=Wrong("attention", outputs=of_inputs(heads_by_remainder)),
        strides_ignored=Wrong("attention", inputs=dense),
        scale_off_by_a_thousandth=Wrong("attention", inputs=number("scale", lambda x: x * 1.001)),
        rescale_forgotten=Wrong("attention", outputs=rescale_forgotten),
        weights_in_bfloat16=Wrong("attention", outputs=coarse_weights),
        empty_rows_are_nan=Wrong("attention", outputs=lambda known, found: {
            "o": torch.where(torch.isinf(found["lse"])[..., None], torch.nan, found["o"])}),
        empty_rows_have_lse=Wrong("attention", outputs=lambda known, found: {"lse": found["lse"].clamp(min=-1e30)}),
        lse_in_base_2=Wrong("attention", outputs=times("lse", 1.4427)),
        o_leaks=Wrong("attention", outputs=leak("o")),
        o_of_first_tile=Wrong("attention", outputs=first("o", 32)),
        o_is_zero=Wrong("attention", outputs=zeros),
        o_is_stale=Wrong("attention", outputs=unwritten),
        o_differs_from_run_to_run=Wrong("attention", outputs=noise),
        dlse_ignored=Wrong("attention", gradients=lambda known, found: differentiate(
            OPS["attention"], known | {"dlse": None})),
        dk_without_scale=Wrong("attention", gradients=lambda known, found: {"dk": found["dk"] / known["numbers"][0]}),
        dq_leaks=Wrong("attention", gradients=leak("dq")),
        dv_of_first_tile=Wrong("attention", gradients=first("dv", 32)),
        gradients_are_zero=Wrong("attention", gradients=zeros),
        gradients_are_stale=Wrong("attention", gradients=unwritten),
        gradients_differ_from_run_to_run=Wrong("attention", gradients=noise),
        or_for_and=Wrong("attention", inputs=or_for_and),
        bool_mask_forgotten=Wrong("attention", inputs=lambda known: {
            "visible": None if known["visible"] is None else torch.ones_like(known["visible"])}),
        blocks_of_first_head=Wrong("attention", inputs=lambda known: {
            "blocks": None if known["blocks"] is None else known["blocks"].roll(1)}),
        bias_forgotten=Wrong("attention", inputs=without("bias", "bias_index")),
        second_bias_forgotten=Wrong("attention", inputs=without("bias2", "bias2_index")),
        bias_of_first_head=Wrong("attention", inputs=lambda known: {
            "bias": None if known["bias"] is None else known["bias"][:, :1] if known["bias"].dim() == 4 else known["bias"][:1]}),
        softcap_forgotten=Wrong("attention", inputs=number("softcap", lambda x: 0.0)),
        sinks_forgotten=Wrong("attention", inputs=without("sinks")),
        clip_forgotten=Wrong("attention", inputs=number("low", lambda x: 0.0)),
        weight_forgotten=Wrong("attention", inputs=without("weight", "weight_index")),
        head_map_forgotten=Wrong("attention", inputs=lambda known: {
            "heads": None if known["heads"] is None else torch.zeros_like(known["heads"])}),
        dropout_of_another_seed=Wrong("attention", inputs=lambda known: {
            "seed": None if known["seed"] is None else known["seed"] + 1}),
        topk_of_one_more=Wrong("attention", inputs=number("topk", lambda x: x and x + 1)),
        topk_forgotten=Wrong("attention", inputs=number("topk", lambda x: 0.0)),
        labels_forgotten=Wrong("attention", inputs=slots(lambda t: t[:, :, :1])),
        empty_slots_hold_the_first_token=Wrong("attention", inputs=slots(lambda t: t.clamp(min=0))),
        groups_of_another_head=Wrong("attention", inputs=slots(lambda t: t.roll(1, 1))),
        groups_of_another_batch=Wrong("attention", inputs=slots(lambda t: t.roll(1, 0))),
        last_slot_dropped=Wrong("attention", inputs=slots(lambda t: torch.cat([t[..., :-1], -torch.ones_like(t[..., :1])], -1))),
        dropout_of_less=Wrong("attention", inputs=number("dropout", lambda x: x * 0.9)),
        dbias_halved=Wrong("attention", gradients=times("dbias", 0.5)),
        dbias_leaks=Wrong("attention", gradients=leak("dbias")),
        dweight_halved=Wrong("attention", gradients=times("dweight", 0.5)),
        dsinks_without_lse=Wrong("attention", gradients=lambda known, found: {"dsinks": differentiate(
            OPS["attention"], known | {"dlse": None})["dsinks"]}),
    ),
    "add_norm": SimpleNamespace(
        off_by_one=Wrong("add_norm", outputs=statistics(unbiased)),
        eps_outside_the_root=Wrong("add_norm", outputs=statistics(eps_outside)),
        mean_without_tail=Wrong("add_norm", outputs=statistics(no_tail)),
        crms_is_rms=Wrong("add_norm", inputs=lambda known: {"kind": min(known["kind"], 1)}),
        bias_forgotten=Wrong("add_norm", inputs=lambda known: {
            "bias": None if known["bias"] is None else torch.zeros_like(known["bias"])}),
        strides_ignored=Wrong("add_norm", inputs=dense),
        y_leaks=Wrong("add_norm", outputs=leak("y")),
        y_of_first_rows=Wrong("add_norm", outputs=first("y", 64)),
        y_is_zero=Wrong("add_norm", outputs=zeros),
        y_is_stale=Wrong("add_norm", outputs=unwritten),
        y_differs_from_run_to_run=Wrong("add_norm", outputs=noise),
        ds_ignored=Wrong("add_norm", gradients=lambda known, found: differentiate(
            OPS["add_norm"], known | {"ds": None})),
        dweight_of_first_channels=Wrong("add_norm", gradients=first("dweight", 64)),
        dbeta_halved=Wrong("add_norm", gradients=times("dbeta", 0.5)),
        gradients_are_zero=Wrong("add_norm", gradients=zeros),
        gradients_are_stale=Wrong("add_norm", gradients=unwritten),
        gradients_differ_from_run_to_run=Wrong("add_norm", gradients=noise),
    ),
    "attention_decode": SimpleNamespace(
        off_by_one=Wrong("attention_decode", inputs=band(lambda a, b, c, d: (a, b - 1, c, d))),
        mask_forgotten=Wrong("attention_decode", inputs=band(lambda a, b, c, d: (NONE, NONE, NONE, NONE))),
        new_tokens_not_causal=Wrong("attention_decode", inputs=lambda known: {
            "mask": Band(known["mask"][1], NONE, *known["mask"][3:]).encode() if known["num_new"] else known["mask"]}),
        last_token_dropped=Wrong("attention_decode", inputs=lambda known: {
            "lengths": (known["lengths"] - 1).clamp(min=0)}),
        one_token_too_many=Wrong("attention_decode", inputs=lambda known: {
            "lengths": torch.minimum(known["lengths"] + 1, torch.tensor(room(known)))}),
        first_sequence_for_all=Wrong("attention_decode", inputs=lambda known: {
            "lengths": known["lengths"][:1].expand_as(known["lengths"])}),
        pages_in_order=Wrong("attention_decode", inputs=lambda known: {
            "block_table": None if known["block_table"] is None else known["block_table"].clamp(min=0).sort().values}),
        heads_by_remainder=Wrong("attention_decode", outputs=outputs_of("attention_decode", cached_heads_by_remainder)),
        strides_ignored=Wrong("attention_decode", inputs=dense),
        scale_off_by_a_thousandth=Wrong("attention_decode", inputs=lambda known: {"scale": known["scale"] * 1.001}),
        softcap_forgotten=Wrong("attention_decode", inputs=lambda known: {"softcap": 0.0}),
        sinks_forgotten=Wrong("attention_decode", inputs=lambda known: {"sinks": None}),
        bias_forgotten=Wrong("attention_decode", inputs=lambda known: {"alibi_slopes": None}),
        bias_of_the_other_sign=Wrong("attention_decode", inputs=lambda known: {
            "alibi_slopes": None if known["alibi_slopes"] is None else -known["alibi_slopes"]}),
        terms_forgotten=Wrong("attention_decode", inputs=without("bias", "bias_index")),
        second_bias_forgotten=Wrong("attention_decode", inputs=without("bias2", "bias2_index")),
        weight_forgotten=Wrong("attention_decode", inputs=without("weight", "weight_index")),
        or_for_and=Wrong("attention_decode", inputs=or_for_and),
        bool_mask_forgotten=Wrong("attention_decode", inputs=lambda known: {
            "visible": None if known["visible"] is None else torch.ones_like(known["visible"])}),
        blocks_of_another_head=Wrong("attention_decode", inputs=lambda known: {
            "blocks": None if known["blocks"] is None else known["blocks"].roll(9)}),
        empty_rows_are_nan=Wrong("attention_decode", outputs=lambda known, found: {
            "o": torch.where(torch.isinf(found["lse"])[..., None], torch.nan, found["o"])}),
        lse_without_sink=Wrong("attention_decode", outputs=outputs_of("attention_decode", lambda known: {"sinks": None})),
        lse_in_base_2=Wrong("attention_decode", outputs=times("lse", 1.4427)),
        o_leaks=Wrong("attention_decode", outputs=leak("o")),
        o_of_first_rows=Wrong("attention_decode", outputs=first("o", 2)),
        o_is_zero=Wrong("attention_decode", outputs=zeros),
        o_is_stale=Wrong("attention_decode", outputs=unwritten),
        o_differs_from_run_to_run=Wrong("attention_decode", outputs=noise),
    ),
}  # fmt: skip
WRONG["attention"].not_wrong = Wrong("attention")
WRONG["add_norm"].not_wrong = Wrong("add_norm")
WRONG["attention_decode"].not_wrong = Wrong("attention_decode")


@contextlib.contextmanager
def row(op: Op, name: str) -> Iterator[Backend]:
    """A row of the table that runs ``WRONG[op].name``, for as long as the block lasts."""
    where = f"{__name__}:WRONG_{op.name.upper()}.{name}"
    backend = Backend(name, (), f"{where}.forward", f"{where}.backward")
    op.backends, op.by_name[name] = (*op.backends, backend), backend
    try:
        yield backend
    finally:
        op.backends = op.backends[:-1]
        del op.by_name[name]
        op._chosen.clear()


WRONG_ATTENTION, WRONG_ADD_NORM = WRONG["attention"], WRONG["add_norm"]
WRONG_ATTENTION_DECODE = WRONG["attention_decode"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(op, name) for op in WRONG for name in vars(WRONG[op]) if "not_" not in name],
)
def test_the_contract_refuses_what_is_wrong(name, wrong):
    op = OPS[name]
    points = [
        (dtype, case)
        for dtype in op.dtypes
        for case in random.Random(0).sample(op.cases, len(op.cases))
    ]
    with row(op, wrong) as backend:
        for dtype, case in points:
            if why_not(op, backend, dtype, case):
                continue
            try:
                prove(op, backend, dtype, case)
            except Failure:
                return
    pytest.fail(f"{name} as {wrong} passes all of {len(points)} cases")


@pytest.mark.parametrize("name", WRONG)
def test_the_contract_accepts_what_is_right(name):
    op = OPS[name]
    with row(op, "not_wrong") as backend:
        for case in op.cases:
            if not why_not(op, backend, torch.float32, case):
                prove(op, backend, torch.float32, case)


IDLE = """
from fastattn.backends import Backend, takes
from fastattn.op import OPS

op = OPS["add_norm"]
op.backends += (Backend("idle", (takes("dtype", "none"),), "nowhere:forward", "nowhere:backward"),)
op.by_name["idle"] = op.backends[-1]
"""


def test_a_backend_that_executes_nothing_fails_the_run(tmp_path):
    """Skips are green, and a row that skips everything would be for ever."""
    (tmp_path / "idle.py").write_text("import fastattn\n" + IDLE)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "idle", __file__, "--backend", "idle", "-q"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    cases = 3 * len(OPS["add_norm"].cases)
    assert f"{cases} skipped" in done.stdout
    assert (
        f"add_norm: idle can run on this machine, but of its {cases} contract cases none"
        in done.stdout
    )
