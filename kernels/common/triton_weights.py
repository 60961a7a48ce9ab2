"""What happens to a weight between the softmax and the sum over values, and its derivative.

    w = keep * weight * clip(p),   clip(p) = clamp((zeta - gamma) p + gamma, 0, 1)

and sinks, logits that take part in the denominator alone.  A kernel forms the softmax's p and asks

    factors(weigh, place, i, j)         keep * weight, for the two functions that follow
    apply(weigh, p, c)                  w; zero where p is zero
    grad(weigh, p, dw, c)               dp, what the gradient of w makes of that of p
    weight_grad(weigh, p, dw, place, i, j)   the gradient of weight
    start(weigh, h, BM, NARROW)         m and l of rows that have met nothing but the sink
    sink(weigh, h, shift, NARROW)       the share of the sink in a denominator
    weigh.PASSES                        2 where w is not linear in p, so that the softmax must be known
                                        before anything can be summed, else 1
    weigh.IS_PLAIN                      w is p

Any part may be absent, which costs nothing.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.common import triton_philox as philox
from fastattn.kernels.common import triton_softmax as softmax
from fastattn.kernels.common import triton_terms as terms


class Weigh(NamedTuple):
    p_sinks: Any
    low: Any  # of clip
    span: Any
    term: Any
    p_seed: Any  # of dropout
    threshold: Any
    raised: Any  # what a kept weight is multiplied by
    HAS_TERM: Any  # constexpr
    PASSES: Any
    IS_PLAIN: Any


def encode(sinks=None, low=0.0, high=1.0, term=None, seed=None, dropout=0.0):
    has_clip = (low, high) != (0.0, 1.0)
    # A word below the threshold is dropped: fastattn/dropout.py.
    dropped = (seed, min(round(dropout * (1 << 32)), (1 << 32) - 1), 1.0 / (1.0 - dropout))
    return Weigh(
        sinks, *((low, high - low) if has_clip else (None, None)), term,
        *(dropped if dropout else (None, None, None)),
        tl.constexpr(term is not None),
        tl.constexpr(2 if has_clip else 1),
        tl.constexpr(not has_clip and term is None and not dropout),
    )  # fmt: skip


@triton.jit
def start(weigh, h, BM: tl.constexpr, NARROW: tl.constexpr):
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    if weigh.p_sinks is not None:
        logit = tl.load(weigh.p_sinks + h).to(tl.float32) * softmax.unit(NARROW)
        m = tl.maximum(m, logit)
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    return m, l


@triton.jit
def sink(weigh, h, shift, NARROW: tl.constexpr):
    logit = tl.load(weigh.p_sinks + h).to(tl.float32)
    return softmax.weights(logit, softmax.unit(NARROW), shift, NARROW)


@triton.jit
def factors(weigh, place, i, j):
    c = 1.0
    if weigh.HAS_TERM:
        c = terms.value(weigh.term, place, i, j)
    if weigh.p_seed is not None:
        c = c * _keep(weigh, place, i, j)
    return c


@triton.jit
def _keep(weigh, place, i, j):
    kept = philox.keep(weigh.p_seed, weigh.threshold, place, i, j)
    return tl.where(kept, weigh.raised, 0.0)


@triton.jit
def apply(weigh, p, c):
    if not weigh.IS_PLAIN:
        p = _clip(weigh, p) * c
    return p


@triton.jit
def _clip(weigh, p):
    if weigh.low is not None:
        p = tl.minimum(tl.maximum(weigh.span * p + weigh.low, 0.0), 1.0)
    return p


@triton.jit
def grad(weigh, p, dw, c):
    if not weigh.IS_PLAIN:
        dw = dw * c
        if weigh.low is not None:
            x = weigh.span * p + weigh.low
            dw = tl.where((x >= 0.0) & (x <= 1.0), dw * weigh.span, 0.0)
    return dw


@triton.jit
def weight_grad(weigh, p, dw, place, i, j):
    dw = dw * _clip(weigh, p)
    if weigh.p_seed is not None:
        dw = dw * _keep(weigh, place, i, j)
    return dw
