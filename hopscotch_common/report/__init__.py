"""Reports: what records a run, and the tables, pictures and page that are made from it.

runs       a run's arguments and versions; the JSON report
reading    reports read back, checked
bend       where the curve of loss over skipped blocks bends
tables     figures as tables, for the terminal and the page
plots      pictures, drawn from the reports alone
page       all of it on one self-contained HTML page

python -m hopscotch_common.report RUN…    tables on stdout, and report.html
"""
