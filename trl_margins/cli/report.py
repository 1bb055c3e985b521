"""`trl-margins report`: plots of training runs and an HTML page with them, from the run folders alone."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from ..checks import check_text
from ..disk import check_writable


def main(argv: Sequence[str]) -> int:
    """Reads the runs, writes the report, prints what they reached and where the page is."""
    parser = ArgumentParser(prog="trl-margins report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="Output folder of a training run; several are compared."
    )
    parser.add_argument("--out", help="Folder for the report. Default: RUN/report, ./report for several.")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="Format of the plots.")
    args = parser.parse_args(list(argv))
    try:
        check_text("runs", args.runs)
        check_text("out", args.out)
    except ValueError as error:
        parser.error(str(error))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("trl-margins report needs matplotlib: pip install 'trl-margins[report]'") from None
    from ..report import results
    from ..report.page import write_report
    from ..report.run_folder import read_runs

    runs = read_runs(args.runs)
    out = Path(args.out or (Path(args.runs[0], "report") if len(runs) == 1 else "report")).expanduser()
    check_writable(out)
    page, *pictures = write_report(runs, out, args.format)
    print(*results.lines(runs), sep="\n")
    print(f"\nReport: {page}")
    if pictures:
        print(f"{args.format.upper()} files of its pictures are beside it.")
    print("It says which pictures are left out, and why.")
    return 0
