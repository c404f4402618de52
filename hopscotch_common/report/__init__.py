"""Reports: what records a run, and the tables, pictures and page that are made from it.

runs             a run's arguments and versions; the JSON report
reading, fields  reports read back, checked
records          what they tell, in plain types
bend             where the curve of loss over skipped blocks bends
tables           figures as tables, for the terminal and the page
drawing, search_plots, scaling_plots    pictures, drawn from the reports alone
page             all of it on one self-contained HTML page

python -m hopscotch_common.report RUN…    tables on stdout, and report.html
"""
