"""Normalisation of a sum, as the formula is written.  This page defines the op; kernels must agree with it."""

import torch

KINDS = ("layer", "rms", "crms")


def forward(x, residual, bias, weight, beta, eps, kind):
    """s = x + bias + residual;  y = (s - mean) * rstd * weight + beta, over the last axis.

    x, residual [rows, D]; bias, weight, beta [D] or None -> y, s [rows, D], mean, rstd [rows].

    layer  mean = average of s,  rstd = 1 / sqrt(average of (s - mean)^2 + eps)
    rms    mean = 0,             rstd = 1 / sqrt(average of s^2 + eps)
    crms   mean = 0,             rstd = 1 / sqrt((sum of s^2 + (sum of s)^2) / (D + 1) + eps):
           rms of a zero-mean vector of D + 1 channels whose last is not stored, being minus the others' sum

    s is rounded to x's dtype and y is the normalisation of s as rounded; statistics are at least float32.
    Where neither residual nor bias is given s is x itself, and an empty tensor is returned for it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x
    if bias is not None or residual is not None:
        terms = [t.to(wide) for t in (x, bias, residual) if t is not None]
        s = sum(terms).to(x.dtype)  # [rows, D]
    h = s.to(wide)
    D = x.shape[1]
    if KINDS[kind] == "layer":
        mean = h.mean(1)
        rstd = ((h - mean[:, None]).square().mean(1) + eps).rsqrt()
    else:
        mean = h.new_zeros(x.shape[0])
        if KINDS[kind] == "rms":
            rstd = (h.square().mean(1) + eps).rsqrt()
        else:
            rstd = ((h.square().sum(1) + h.sum(1).square()) / (D + 1) + eps).rsqrt()
    y = (h - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y = y * weight
    if beta is not None:
        y = y + beta
    return y.to(x.dtype), s if s is not x else x.new_empty(0), mean, rstd
