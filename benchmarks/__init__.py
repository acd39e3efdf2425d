"""Benchmark suites, runner and report, installed as ``efficient_attn.benchmarks``.

suites/    one suite a file: its grid, its measurement, its table and charts; the registry
peers/     one implementation by others a file, with the check that it computes what ours does
cases.py   methods and sizes of the suites, and the CPU targets, as tables of data
approximation.py                                     error against rank
commands.py                                          bench and report on the command line
view.py, report.py, plot.py, figures.py, html_report.py, page/    what is made of the rows
compare.py                                           two runs, cell by cell
gpu.py, gpu_check.py, triton_table.py                on a machine with a GPU, without the command line
"""
