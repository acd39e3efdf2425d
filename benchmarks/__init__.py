"""Benchmark suites and reports, installed as `efficient_attn.benchmarks`: on top of everything, imported by nothing.

suites/                one suite a file: its grid, its measurement, its columns, charts and claims; the registry
peers/                 one implementation by others a file, with the check that it computes what ours does
cases.py               methods and sizes of the suites, and the CPU targets, as tables of data
approximation.py, learning.py, cache.py    what several suites measure by
commands.py, compare.py                    `efficient-attn bench`, `report` and `compare`
planning.py, summary.py                    the overview: what is measured within its time, its table and its sentences
__main__.py            one suite without the command line's packages
view.py                records as rows, and how a figure is written
report.py, figures.py, html_report.py, page/    the rows as tables, pictures and one page
tools/                 scripts for a machine with a GPU, and the tables of compiled kernels
"""
