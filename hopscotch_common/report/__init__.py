"""Reports: what records a run, and the tables, pictures and page that are made from it.

runs       a run's arguments and versions; the JSON report
reading    reports read back, checked
bend       where the curve of loss over skipped blocks bends
tables     figures as tables, for the terminal and the page
plots      pictures, drawn from the reports alone
page       all of it on one self-contained HTML page

python -m hopscotch_common.report RUN…    tables on stdout, and report.html
"""

# Only until these flags have moved to cli.py and export/.
from hopscotch_common.report.flags_to_move import (  # noqa: F401
    add_blocks_argument,
    add_export_argument,
    blocks_from,
    check_exports,
    run_exports,
)
from hopscotch_common.report.runs import describe_run, package_versions, write_report  # noqa: F401
