"""What profiling, training and benchmarks share; nothing here knows a suite.

clock.py       interleaved times, peak memory, the ceilings of the machine
records.py     the append-only result file, and what a record says of the machine
runner.py      a cell in a worker process with limits
run_folder.py  the folder of a run
calls.py       methods as calls of no arguments, and their error
inputs.py      query, key and value from photographs
"""
