"""`trl-margins report`: pictures of training runs and a page that holds them, from the run folders alone."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from .setup import check_writable, log_to_console


def main(argv: Sequence[str]) -> int:
    """Reads the runs, draws, writes, prints the files."""
    log_to_console()
    parser = ArgumentParser(prog="trl-margins report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Output folder of a training; several are compared.")
    parser.add_argument("--out", type=Path, help="Folder for the report; RUN/report for one run, else ./report.")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="Of the pictures.")
    args = parser.parse_args(list(argv))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("trl-margins report draws with matplotlib: pip install 'trl-margins[report]'") from None
    from ..report.page import write_report
    from ..report.run_folder import read_runs

    runs = read_runs(args.runs)
    out = args.out or (Path(args.runs[0], "report") if len(runs) == 1 else Path("report"))
    check_writable(out)
    for file in write_report(runs, out, args.format):
        print(file)
    return 0
