"""The command ``fastattn``: what is here, whether it is right, how fast it is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

DESCRIPTION = (
    "Attention kernels: what is built (info), whether it is right (verify), how fast it is (bench)."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastattn", description=DESCRIPTION)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="info|verify|bench|report"
    )

    info = commands.add_parser(
        "info", help="what is built, what is not and why, what the machine offers"
    )
    info.add_argument("--json", metavar="F", help="write the same as JSON")

    verify = commands.add_parser(
        "verify", help="every op x backend x dtype x case against the reference"
    )
    verify.add_argument(
        "--all", action="store_true", help="every case in Triton's interpreter too, which is slow"
    )
    verify.add_argument(
        "--minutes", type=float, default=4.5, help="stop, and say so, after this time (4.5)"
    )
    verify.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)

    bench = commands.add_parser(
        "bench", help="speed, ratio to peers, share of the machine's limits"
    )
    bench.add_argument(
        "--peers", action="store_true", help="time every peer installed, not only PyTorch"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="threads of the processor to use")
    bench.add_argument(
        "--base", metavar="REF", help="also build this git revision and print the ratio to it"
    )
    bench.add_argument("--plot", metavar="DIR", help="write figures there (needs matplotlib)")

    for command in (verify, bench):
        command.add_argument("--op", help="this op only; several separated by commas")
        command.add_argument(
            "--backend", help="this backend (cpu-avx2) or family of backends (cpu) only"
        )
        command.add_argument(
            "--device", choices=("cpu", "cuda"), help="backends of this device only"
        )
        command.add_argument(
            "--dtype", help="float32, bfloat16, float16; several separated by commas"
        )
        command.add_argument("--quick", action="store_true", help="fewer cases and shorter runs")
        command.add_argument("--json", metavar="F", help="append one JSON line per row")

    report = commands.add_parser(
        "report", help="one HTML page from the JSON results in a directory"
    )
    report.add_argument("dir", metavar="DIR", help="where the .jsonl files are")
    report.add_argument("--out", metavar="F", help="the page (DIR/report.html)")
    report.add_argument(
        "--readme", metavar="F", help="also rewrite the generated tables of this file"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (ValueError, OSError) as error:  # a refusal is a sentence, not a traceback
        print(f"fastattn {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "info":
        from fastattn.cli import info

        return info.main(arguments)
    if arguments.command == "verify":
        from fastattn.cli import verify

        return verify.main(arguments)
    if arguments.command == "bench":
        from fastattn.cli import bench

        return bench.main(arguments)
    from fastattn.cli import report

    return report.main(arguments)
