"""Benchmark suites, runner and report, installed as ``efficient_attn.benchmarks``."""
