"""`unlatch check`: find faults of a kernel before it is served.

command.py   options, the order of steps, the exit code
cases.py     inputs that a kernel's signature allows
worker.py    one real worker process, and the outcomes of runs in it
rules.py     the rules that a kernel must follow, and the findings
growth.py    time and memory, size by size
probes.py    kernels of our own that inspect a worker from inside
report.py    findings for people and for programs
"""
