"""`unlatch check`: what a kernel does that it should not, found before anybody calls it.

command.py   options, the order of things, the exit code
cases.py     inputs as a kernel's signature allows them
worker.py    one real worker process, and what came of a run in it
rules.py     what is asked of a kernel, and the findings
growth.py    time and memory, size by size
probes.py    kernels of our own that look at a worker from inside
report.py    findings for people and for programs
"""
