"""Benchmark suites, runner and report, installed as ``efficient_attn.benchmarks``.

cases.py    what is measured, as tables of data
ops.py, vit.py, memory.py, targets.py, gpu.py   one suite each: ``run_cell(config) -> metrics``, run in a worker process
inputs.py, peers.py, measure.py         real inputs, the implementations compared with, clocks and memory counters
runner.py, records.py, report.py        workers with limits, the append-only JSONL, tables and plots
"""
