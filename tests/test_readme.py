"""The tables in README.md are what the committed results and the descriptors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastattn.bench.records import RESULTS, load
from fastattn.cli import readme

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def text() -> str:
    if not README.is_file():
        pytest.skip("there is no README.md here (an installed package)")
    return README.read_text()


def test_tables_are_rendered_from_the_committed_results(text: str) -> None:
    records = load(RESULTS) if RESULTS.is_dir() else []
    assert readme.rendered(text, records) == text, (
        "README.md is out of date: fastattn report bench/results --out /dev/null --readme README.md"
    )


@pytest.mark.parametrize("block", ["speed", "support"])
def test_readme_has_each_block_once(text: str, block: str) -> None:
    assert text.count(f"<!-- {block}:begin -->") == text.count(f"<!-- {block}:end -->") == 1


def test_committed_results_name_their_machine_versions_and_revision() -> None:
    for record in load(RESULTS) if RESULTS.is_dir() else []:
        assert {"kind", "op", "machine", "versions", "commit", "date"} <= set(record)
