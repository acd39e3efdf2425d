"""What profiling, training and benchmarks share; nothing here knows a suite.

clock.py       interleaved times, peak memory, the ceilings of the machine
records.py     the append-only result file, and what a record says of the machine
runner.py      a cell in a worker process with limits
ranks.py       processes of torch.distributed that stay and do what they are told
run_folder.py  the folder of a run
options.py     shapes, lengths and specs that a user gives, checked
calls.py       methods as calls of no arguments, with their plan and error
inputs.py      query, key and value from photographs
fit.py         power laws, predictions, crossings
terminal.py    console, tables, progress, errors by name
"""
