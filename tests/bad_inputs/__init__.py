"""Bad input for every command line: a generator of broken files and folders, and the table of cases.

workplace.py   a folder with good input for every script, made once by the scripts themselves
makers.py      what spoils it: functions that break a file or a folder
running.py     runs a command line, and tells what it said and what it touched
cases.py       what a case is
flags.py, records.py, models.py, saved.py, outputs.py   the cases, by what is bad
"""
