"""The commands: what they print, what they write, and how they end."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import testing
from fastattn.backends import Limit
from fastattn.bench import cases, figures, records, timing
from fastattn.cli import main, readme, support, terminal, verify
from fastattn.op import OPS

TINY = ("--op", "add_norm", "--dtype", "f32")


def run(*arguments: str) -> int:
    return main(arguments)


# ---- info -------------------------------------------------------------------------------------------


def test_info_names_every_op_and_backend(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("info", "--json", str(tmp_path / "info.json")) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "info.json").read_text())
    for op in OPS.values():
        assert op.name in shown
        assert set(found["support"][op.name].values()) <= {"yes", "-"}
        assert all(b.name in shown for b in op.backends)
    assert found["versions"]["torch"] in shown
    assert set(found["isas"]) == {"avx512bf16", "avx512", "avx2", "scalar"}


def test_one_openmp_pool_serves_torch_and_the_kernels() -> None:
    script = "import torch, fastattn.cli.machine as m; torch.ones(9, 9) @ torch.ones(9, 9); print(m.openmp())"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    if "cannot be read" in said:
        pytest.skip(said.strip())
    assert "(one pool)" in said


def test_support_reads_dtypes_and_bounds_from_the_limits() -> None:
    rows = {row[0]: dict(zip(support.matrix()[0], row, strict=True)) for row in support.matrix()}
    assert rows["attention"]["cpu"] == "f32 bf16 f16, D at most 256, Dv at most 256"
    assert rows["attention"]["reference"].startswith("f64")


# ---- verify -----------------------------------------------------------------------------------------


def test_verify_is_green_on_the_reference(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "proof.jsonl"
    assert run("verify", *TINY, "--backend", "reference", "--quick", "--json", str(file)) == 0
    assert "10 ok" in capsys.readouterr().out
    (record,) = map(json.loads, file.read_text().splitlines())
    assert (record["kind"], record["passed"], record["failed"]) == ("verify", 10, 0)
    assert record["machine"]["cores"] >= 1


def test_verify_counts_what_time_did_not_allow_and_ends_red(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("verify", *TINY, "--backend", "reference", "--quick", "--minutes", "0") == 1
    shown = capsys.readouterr().out
    assert "10 skipped: reference: time is up (--minutes 0)" in shown
    assert "FAILED not one case was executed" in shown


def said(state: str, **more: Any) -> dict[str, Any]:
    return {"op": "o", "backend": "b", "dtype": "float32", "case": "N1", "state": state, **more}


def test_findings_count_and_name_a_failure() -> None:
    findings = verify.Findings()
    findings.add(said("passed", worst=0.25))
    findings.add(said("failed", why="output 0: too far"))
    findings.add(said("skipped", why="D is 300 (at most 256)"))
    assert findings.failures == ["o b float32 N1: output 0: too far"]
    assert str(findings.tallies["o", "b", "float32"]) == "1 ok 1 FAILED 1 skipped 25%"
    assert findings.idle() == []


def test_a_backend_that_is_absent_is_not_idle_and_one_that_skipped_everything_is() -> None:
    findings = verify.Findings()
    findings.add(said("absent", why="no GPU is present"))
    assert findings.idle() == ["not one case was executed"]
    findings.add(said("passed", worst=0.5) | {"backend": "c"})
    assert findings.idle() == []
    findings.add(said("skipped", why="D is 300 (at most 256)") | {"backend": "d"})
    assert findings.idle() == ["o d: the backend is available and not one case was executed"]


def test_a_case_that_never_ends_is_stopped_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = """import json, time
print(json.dumps({"total": 1}))
print(json.dumps({"op": "o", "backend": "b", "dtype": "float32", "case": "N1", "state": "running"}), flush=True)
time.sleep(100)"""
    popen = subprocess.Popen
    monkeypatch.setattr(
        verify.subprocess, "Popen", lambda _, **more: popen([sys.executable, "-c", script], **more)
    )
    monkeypatch.setattr(verify, "GRACE", 0.0)
    assert run("verify", *TINY, "--backend", "reference", "--minutes", "0.02") == 1
    assert "o b float32 N1: the process ended with status -9" in capsys.readouterr().out


def test_a_worker_that_dies_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run("verify", *TINY, "--backend", "reference", "--quick") == 1
    assert "before any case: the process ended with status 1" in capsys.readouterr().out


def wrong(change: Callable[..., Any]) -> Any:
    """The op add_norm with another formula, not in the table of ops."""
    op = OPS["add_norm"]
    copy = object.__new__(type(op))
    copy.__dict__.update(op.__dict__)
    original = op.function

    def function(x: torch.Tensor, **call: Any) -> Any:
        return change(original, x, **call)

    copy.function = function
    return copy


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f, x, **call: f(x, **call) * 1.0001, "output 0 beside torch"),
        (lambda f, x, **call: f(x.detach(), **call) + 0 * x, "dx from output 0"),
        (lambda f, x, **call: f(x, **call) + 0.01 * (x - x.detach()), "dx from output 0"),
    ],
)
def test_the_reference_is_held_to_something_independent(
    change: Callable[..., Any], sentence: str
) -> None:
    case = next(
        c for c in OPS["add_norm"].cases if c.N == 3 and not c.return_sum and c.kind == "layer"
    )
    with pytest.raises(testing.Failure, match=sentence):
        testing.prove_reference(wrong(change), case)


# ---- bench ------------------------------------------------------------------------------------------


def test_disturbed_samples_do_not_count() -> None:
    t = timing.summary([(1.0, 0), (1.0, 0), (9.0, 3), (1.0, 0), (9.0, 1)])
    assert (t.median, t.kept, t.taken, t.clean) == (1.0, 3, 5, True)


def test_where_all_are_disturbed_the_least_disturbed_count_and_the_row_says_so() -> None:
    t = timing.summary([(1.0, 1), (1.0, 1), (9.0, 7), (1.0, 2), (9.0, 8), (9.0, 9)])
    assert (t.median, t.kept, t.clean) == (1.0, 0, False)


def test_contenders_take_turns_and_rotate_their_inputs() -> None:
    order: list[str] = []
    nap = torch.rand(1 << 18)

    def calls(name: str) -> list[timing.Call]:
        return [lambda i=i: (order.append(f"{name}{i}"), nap.sort()) for i in range(2)]  # type: ignore[misc]

    timing.interleave({"a": calls("a"), "b": calls("b")}, 0.05)
    assert order[-6:] == ["a0", "b0", "a1", "b1", "a0", "b0"]


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is Linux's")
def test_peak_memory_sees_what_a_call_allocates() -> None:
    size = 64 << 20
    found = timing.peak_memory(lambda: torch.ones(size, dtype=torch.uint8))
    if found is None:
        pytest.skip("this system does not reset its high-water mark")
    assert size * 0.9 < found < size * 1.3


def test_every_op_has_bench_cases_whose_cost_is_positive() -> None:
    for op in OPS.values():
        assert op.bench, op.name
        for case in op.bench:
            cost = dataclasses.astuple(
                op.cost(case, 4)
            )  # flops and bytes, forward and backward by turns
            assert min(cost if op.backward else cost[::2]) > 0, (op.name, case)


def test_labels_are_short_and_tell_the_cases_apart() -> None:
    for op in OPS.values():
        labels = [cases.label(case) for case in op.bench]
        assert len(set(labels)) == len(labels)
        for row in cases.rows(op, op.backends, op.dtypes, quick=False):
            assert len(str(row)) < 110, row
            assert all(isinstance(name, str) for name in cases.peers(row, every_peer=True))
    assert cases.label(OPS["attention"].bench[1]) == "B1 Hq8 N1024 D64 Causal"


def test_no_time_is_given_of_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> float:
        raise testing.Failure("dq: largest error is 1")

    monkeypatch.setattr(cases, "prove", fail)
    assert "largest error is 1" in cases.contract.__wrapped__(
        "attention", "reference", torch.float32
    )


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the results of a bench of one small case on the reference."""
    op = OPS["add_norm"]
    directory = tmp_path_factory.mktemp("results")
    before, op.bench = op.bench, [op.bench[0].but(N=8, D=16)]
    try:
        file = str(directory / "r.jsonl")
        assert run("bench", *TINY, "--backend", "reference", "--quick", "--json", file) == 0
    finally:
        op.bench = before
    return directory


def test_bench_writes_rows_with_all_that_a_number_needs(timed: Path) -> None:
    rows = records.load(timed)
    assert {(r["kind"], r["direction"]) for r in rows} >= {
        ("speed", "forward"),
        ("speed", "backward"),
        ("call", "forward"),
    }
    for row in rows:
        assert row["low"] <= row["seconds"] <= row["high"]
        assert {"machine", "versions", "commit", "date", "bound", "rate", "share", "peers"} <= set(
            row
        )
    assert all(r["peers"]["torch"]["ratio"] > 0 for r in rows if r["kind"] == "speed")


def test_report_is_one_page_that_loads_nothing(timed: Path) -> None:
    assert run("report", str(timed)) == 0
    page = (timed / "report.html").read_text()
    assert "N8 D16 layer" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "src=" not in page.replace('src="data:', "")


def test_figures_are_written_where_matplotlib_is(timed: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert [path.name for path in figures.save(records.load(timed), "here", tmp_path)] == [
        "add_norm-ratio.png"
    ]


def test_readme_blocks_are_rewritten_and_the_rest_is_left_alone(
    timed: Path, tmp_path: Path
) -> None:
    file = tmp_path / "README.md"
    file.write_text(
        "a\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nb\n<!-- support:begin --><!-- support:end -->\nc\n"
    )
    assert run("report", str(timed), "--readme", str(file)) == 0
    text = file.read_text()
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("\nc\n")
    assert "| add_norm | N8 D16 layer" in text
    assert readme.rendered(text, records.load(timed)) == text


# ---- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("verify", "--op", "atention"), "--op is 'atention'; it takes "),
        (("verify", "--backend", "avx9"), "--backend is 'avx9'; it takes "),
        (("bench", "--dtype", "int8"), "--dtype is 'int8'; it takes float64, f64"),
        (("bench", "--base", "no-such-revision"), "--base"),
        (("bench", "--threads", "0"), "--threads is 0; it takes an integer >= 1"),
        (("report", "/nonexistent"), "DIR is /nonexistent; it takes a directory with .jsonl files"),
    ],
)
def test_refusals_are_sentences(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_block_that_is_not_closed_is_refused() -> None:
    with pytest.raises(
        ValueError, match="README has 1 <!-- speed:begin --> and 0 <!-- speed:end -->"
    ):
        readme.rendered("<!-- speed:begin -->", [])


def test_a_limit_that_reads_no_fact_is_about_the_machine() -> None:
    assert not support.of_call(Limit(lambda _: True, lambda _: ""))
    assert support.of_call(Limit(lambda facts: facts["D"] > 0, lambda _: ""))


def test_durations_and_tables() -> None:
    assert [terminal.duration(s) for s in (2.5, 0.0123, 4.56e-6, 7e-9)] == [
        "2.5 s",
        "12.3 ms",
        "4.56 us",
        "7 ns",
    ]
    assert terminal.table([["a", "n"], ["long", "1"]], "n") == ["a     n", "────  ─", "long  1"]
