"""Show the results of runs: short tables on stdout, and everything on one HTML page.

    python -m hopscotch_common.report scaled_smollm_ckpts
    python -m hopscotch_common.report smollm_math_final_report.json \\
        data/smollm-processed-data/data_report.json smollm_block_selection.json scaled_smollm_ckpts \\
        --html smollm.html
    python -m hopscotch_common.report smollm_block_selection.json --pictures pictures --format pdf

The page needs neither this project nor a network. Its path is the last line on stdout.
"""

import sys
from pathlib import Path

from hopscotch_common.cli import ArgumentParser, command, path, result
from hopscotch_common.errors import InputError
from hopscotch_common.files import check_output, check_writable, write_atomic


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=path,
        metavar="RUN",
        help="a JSON report of one of the scripts, or the output folder of step 2 or 4a",
    )
    parser.add_argument(
        "--html",
        type=path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page; replaces an existing one",
    )
    parser.add_argument(
        "--pictures",
        type=path,
        metavar="FOLDER",
        help="also write each plot to a file of its own in this folder",
    )
    parser.add_argument("--format", choices=["png", "pdf", "svg"], default="png", help="of those files")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_output(arguments.html, "--html")
    if arguments.html.suffix.lower() not in (".html", ".htm"):  # so that no report is overwritten
        raise InputError(f"--html {arguments.html}: give a file name that ends in .html")
    if arguments.pictures:
        check_writable(arguments.pictures)

    # Not at the top: importing matplotlib takes a second, and --help should not.
    from hopscotch_common.report import page, plots, reading, tables

    runs = reading.join_searches([reading.read_report(path) for path in arguments.runs])
    for run in runs:
        table = tables.summary(run)
        lines = table.text()
        for line in lines if len(runs) == 1 else [f"{run.model}: {table.title}", *lines, ""]:
            result(line)
    if arguments.pictures:
        for number, run in enumerate(runs, 1):
            for name, figure in plots.pictures(run).items():
                path = arguments.pictures / f"{number}_{name}.{arguments.format}"
                write_atomic(path, plots.render(figure, path.suffix))
                result(str(path))
    write_atomic(arguments.html, page.build_page(runs))
    result(str(arguments.html))
    return 0


if __name__ == "__main__":
    sys.exit(main())
