"""The options --op, --backend, --device and --dtype as values, or a sentence that lists what there is."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

from fastattn.backends import Backend
from fastattn.cli.support import SHORT
from fastattn.op import OPS, Op


def ops(arguments: argparse.Namespace) -> list[Op]:
    names = _listed(arguments.op)
    _known("--op", names, OPS)
    return [op for name, op in sorted(OPS.items()) if not names or name in names]


def dtypes(arguments: argparse.Namespace) -> list[torch.dtype]:
    names = _listed(arguments.dtype)
    spelled = {s: d for d, short in SHORT.items() for s in (str(d).removeprefix("torch."), short)}
    _known("--dtype", names, spelled)
    return [spelled[name] for name in names] or list(SHORT)


def backends(arguments: argparse.Namespace) -> list[Backend]:
    """The rows of every selected op that the options name."""
    names = _listed(arguments.backend)
    every = [b for op in ops(arguments) for b in op.backends]
    _known("--backend", names, dict.fromkeys(n for b in every for n in (b.family, b.name)))
    return [
        b
        for b in every
        if (not names or b.name in names or b.family in names)
        and (not arguments.device or b.device == arguments.device)
    ]


def _listed(option: str | None) -> list[str]:
    return [word.strip() for word in option.split(",") if word.strip()] if option else []


def _known(option: str, names: list[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option} is {name!r}; it takes {', '.join(known)}")
