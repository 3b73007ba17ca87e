"""A bare worker process: a kernel's function in a loop, and nothing else. Controlled by JSON lines."""

import json
import sys
import time

import numpy as np

from bench.subjects.pool_work import KERNELS

WARM_CALLS = 5


def main() -> None:
    for line in sys.stdin:
        question = json.loads(line)
        function, array = KERNELS[question["kernel"]], np.array(question["input"])
        for _ in range(WARM_CALLS):
            output = function(array)
        calls, cpu, begun = 0, time.process_time(), time.perf_counter()
        while (wall := time.perf_counter() - begun) < question["seconds"]:
            output = function(array)
            calls += 1
        answer = {"calls": calls, "wall_seconds": wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps({**answer, "output": output.tolist()}), flush=True)


if __name__ == "__main__":
    main()
