"""What every test shares: points of the op table, seeds, poisoned memory, and a summary of skips by reason.

A test that asks for ``op``, ``backend``, ``dtype`` or ``case`` is run for every one that the descriptors
name; ``@pytest.mark.op("attention")`` restricts it to some ops, and ``--op`` and ``--backend`` the whole run.
A backend that cannot run on this machine skips with its own sentence.  One that can, and of whose contract
nothing was executed, fails the run.
"""

from __future__ import annotations

import collections
import itertools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported

import fastattn  # noqa: F401  fills the op table
from fastattn import testing
from fastattn.backends import Backend
from fastattn.cli.support import unavailable
from fastattn.op import OPS, Op

AXES = ("op", "backend", "dtype", "case")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastattn")
    group.addoption("--op", help="only tests of this op; several separated by commas")
    group.addoption(
        "--backend", help="only tests of this backend (cpu-avx2) or family of backends (cpu)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "op(*names): restricts a test over the op table to these ops"
    )
    config.addinivalue_line(
        "markers", "contract: for backends with kernels; each must have executed some here"
    )
    config.addinivalue_line("markers", "formula: for the reference alone")
    config.addinivalue_line("markers", "gradients: for ops that have a backward pass")
    # Infinities are legal input; numpy, on which the interpreter runs kernels, remarks on them, and on Triton 3.6.
    for kind in ("RuntimeWarning", "DeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}:triton.runtime.interpreter")
    config.stash[TALLY] = Tally()
    for option, known in (
        ("--op", set(OPS)),
        (
            "--backend",
            {name for op in OPS.values() for b in op.backends for name in (b.name, b.family)},
        ),
    ):
        if unknown := set(_asked(config, option)) - known:
            raise pytest.UsageError(
                f"{option} is {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )


# ---- Points of the op table -------------------------------------------------------------------------


def _asked(config: pytest.Config, option: str) -> list[str]:
    return [name for name in (config.getoption(option) or "").split(",") if name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    axes = [axis for axis in AXES if axis in metafunc.fixturenames]
    if not axes:
        return
    marks = {mark.name: mark for mark in metafunc.definition.iter_markers()}
    points: dict[str, tuple[object, ...]] = {}
    for op in OPS.values():
        if "op" in marks and op.name not in marks["op"].args:
            continue
        if "gradients" in marks and not op.backward:
            continue
        backends = op.backends
        if "contract" in marks or "formula" in marks:
            backends = tuple(b for b in backends if bool(b.forward) == ("contract" in marks))
        every = {"op": (op,), "backend": backends, "dtype": op.dtypes, "case": op.cases}
        for values in itertools.product(*(every[axis] for axis in axes)):
            points["-".join(_name(value) for value in values)] = values
    metafunc.parametrize(axes, points.values(), ids=points.keys())


def _name(value: object) -> str:
    return value.name if isinstance(value, (Op, Backend)) else str(value).removeprefix("torch.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ops, backends = _asked(config, "--op"), _asked(config, "--backend")
    config.stash[TALLY].generated.update(
        _row(item) for item in items if item.get_closest_marker("contract")
    )
    items.sort(key=lambda item: hasattr(item.module, "begin"))
    if not ops and not backends:
        return
    chosen, left_out = [], []
    for item in items:
        op, backend = _point(item, "op"), _point(item, "backend")
        fits = (not ops or (op and op.name in ops)) and (
            not backends or (backend and {backend.name, backend.family} & set(backends))
        )
        (chosen if fits else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def pytest_collection_finish(session: pytest.Session) -> None:
    """What runs beside other tests begins before them."""
    begins = {item.module.begin for item in session.items if hasattr(item.module, "begin")}
    for begin in () if session.config.option.collectonly else begins:
        begin()


def _point(item: pytest.Item, axis: str):
    return item.callspec.params.get(axis) if hasattr(item, "callspec") else None


def _row(item: pytest.Item) -> tuple[str, str]:
    return _point(item, "op").name, _point(item, "backend").name


@pytest.fixture(autouse=True)
def _available(request: pytest.FixtureRequest) -> None:
    backend, dtype = _point(request.node, "backend"), _point(request.node, "dtype")
    if backend is None:
        return
    if why := unavailable(backend):
        pytest.skip(f"{backend.name}: {why}")
    interpreted = backend.family == "triton" and backend.device == "cpu"
    if (
        interpreted
        and dtype not in (None, torch.float32)
        and not request.node.get_closest_marker("contract")
    ):
        pytest.skip(
            "triton: in the interpreter, which is slow, properties are asked of float32 alone"
        )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Every ``torch.empty`` is full of NaN during the test."""
    with testing.poisoned():
        yield


@pytest.fixture
def best_cpu() -> str:
    """The CPU backend that this machine prefers, or "reference" where nothing is compiled."""
    return next(
        b.name
        for b in OPS["attention"].backends
        if b.family in ("cpu", "reference") and not unavailable(b)
    )


# ---- Skips by reason, and backends of which nothing ran ---------------------------------------------


class Tally:
    """What was executed and skipped of the tests over the op table."""

    def __init__(self) -> None:
        self.generated: collections.Counter[tuple[str, str]] = collections.Counter()
        self.done: collections.Counter[tuple[str, str]] = collections.Counter()
        self.executed: collections.Counter[tuple[str, str]] = collections.Counter()
        self.skipped: collections.Counter[str] = collections.Counter()

    def idle(self) -> list[str]:
        """A sentence for each backend that is able to run here and executed none of its contract."""
        return [
            f"{op}: {backend} can run on this machine, but of its {self.generated[op, backend]} contract cases "
            "none was executed"
            for op, backend in self.generated
            if self.done[op, backend] == self.generated[op, backend]  # all of them were looked at
            and not self.executed[op, backend]
            and not unavailable(OPS[op].by_name[backend])
        ]


TALLY = pytest.StashKey[Tally]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    tally = item.config.stash[TALLY]
    if report.skipped and isinstance(report.longrepr, tuple):
        tally.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
    if item.get_closest_marker("contract") and (report.when == "call" or report.skipped):
        tally.done[_row(item)] += 1
        tally.executed[_row(item)] += not report.skipped
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash[TALLY].idle() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    tally = config.stash[TALLY]
    if tally.skipped:
        terminalreporter.section("skipped, by reason")
        for reason, count in tally.skipped.most_common():
            terminalreporter.line(f"{count:6}  {reason}")
    if tally.executed:
        terminalreporter.section("contract cases executed")
        for (op, backend), count in tally.executed.items():
            terminalreporter.line(f"{count:6}  {op} {backend}")
    for sentence in tally.idle():
        terminalreporter.line(sentence, red=True)
