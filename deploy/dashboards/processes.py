"""The board of processes: how each one uses its time and memory, and which one causes trouble."""

from deploy.dashboards import colours
from deploy.dashboards.board import Board, Variable
from deploy.dashboards.panels import HALF, WHOLE, Link, Query, figure, heat, lines, states
from deploy.dashboards.queries import ANY_POD, born_or_grown, owned, quantile, rate

NAME = "{{owner}} {{process}}"
WORKER = "{{owner}} worker-{{worker}}"
LOOPS = f'{ANY_POD}, process=~"gateway|dispatcher|unit"'
OF_WORKERS = f'{ANY_POD}, process=~"worker-.*"'
ONE = "namespace, pod, unit, process"
ONE_WORKER = "namespace, pod, unit, worker"
POD = Link(title="This pod alone", url="/d/unlatch-processes?var-pod=${__field.labels.pod}&${__url_time_range}")

ON_A_CORE = rate("unlatch_process_cpu_seconds_total", ANY_POD, ONE)
BUSY = f"rate(unlatch_worker_busy_seconds_total{{{ANY_POD}}}[$__rate_interval])"


def _by_worker(metric: str) -> str:
    """A counter of processes, for workers only, with the label of workers' own metrics."""
    growth = rate(metric, OF_WORKERS, ONE)
    return f'sum by ({ONE_WORKER}) (label_replace({growth}, "worker", "$1", "process", "worker-(.*)"))'


WORKERS_ON_A_CORE = _by_worker("unlatch_process_cpu_seconds_total")
WORKERS_WAITING = _by_worker("unlatch_process_core_wait_seconds_total")
IN_A_RUN = f"sum by ({ONE_WORKER}) ({BUSY})"
BLOCKED = f"clamp_min({IN_A_RUN} - {WORKERS_ON_A_CORE} - {WORKERS_WAITING}, 0)"
# A limit of 0 means no limit.
MEMORY_RATIO = (
    f"unlatch_worker_memory_bytes{{{ANY_POD}}} / on (namespace, pod, unit) group_left () "
    f"(unlatch_worker_memory_limit_bytes{{{ANY_POD}}} > 0)"
)
RESTARTS = born_or_grown("unlatch_worker_restarts_total", ANY_POD)

_TOP = (
    figure(
        1,
        "Workers down",
        "Slots without a process that takes calls. A worker is replaced in milliseconds, so if this stays above 0, "
        "kernels kill it at once or do not load. See restarts by reason, and the dispatcher's log.",
        "short",
        f"sum(1 - unlatch_worker_up{{{ANY_POD}}})",
        limits=((1, "red"),),
    ),
    figure(
        2,
        "Replacements in 15 min",
        "Replaced workers. Some replacements are planned (recycling), or follow cancelled calls: see the reasons "
        "below.",
        "short",
        f"sum(increase(unlatch_worker_replacement_seconds_count{{{ANY_POD}}}[15m]))",
        limits=((1, "orange"), (10, "red")),
    ),
    figure(
        3,
        "Longest run now",
        "Time of the longest present run. If its kernel never takes that long, the run hangs. The caller's deadline "
        "will end it; the kernel's own `timeout` could end it sooner.",
        "s",
        f"max(unlatch_worker_running_seconds{{{ANY_POD}}})",
        limits=((60, "orange"), (600, "red")),
        none="none runs",
    ),
    figure(
        4,
        "Busiest loop",
        "Processor time of the busiest gateway or dispatcher: 1 is one core, which is all that a loop can use. Near "
        "1 it limits calls: add gateways, or use replicas with fewer workers each.",
        "percentunit",
        f"max(unlatch_process_utilization_ratio{{{LOOPS}}})",
        limits=((0.7, "orange"), (0.9, "red")),
    ),
    figure(
        5,
        "Worst loop lag, p99",
        "Lag of the slowest event loop. Over 10 ms: large unary messages, or no free core for the loop (see waiting "
        "for a core).",
        "s",
        f"max({quantile(0.99, 'unlatch_event_loop_lag_seconds', LOOPS, ONE)})",
        limits=((0.01, "orange"), (0.1, "red")),
    ),
    figure(
        6,
        "Longest stall now",
        "Time by which a loop is overdue now. With seconds, the loop is stopped or in one long piece of work: take a "
        "stack of that process (`py-spy dump --pid`), then restart it.",
        "s",
        f"max(unlatch_event_loop_stalled_seconds{{{LOOPS}}})",
        limits=((0.5, "orange"), (2, "red")),
    ),
    figure(
        7,
        "Worst GIL contention",
        "Share of time that a thread of a gateway or dispatcher waits for its interpreter's lock. Above 0.5 some "
        "code in that process computes, which it should not.",
        "percentunit",
        f"max(unlatch_gil_contention_ratio{{{LOOPS}}})",
        limits=((0.3, "orange"), (0.5, "red")),
    ),
    figure(
        8,
        "Highest memory use",
        "Memory of the worker that is closest to its limit. At 1 its call fails with RESOURCE_EXHAUSTED: raise "
        "`--worker-memory-bytes` and the pod's limit, or `memory=` of its kernel, or send smaller calls.",
        "percentunit",
        f"max({MEMORY_RATIO})",
        limits=((0.8, "orange"), (0.95, "red")),
        none="no limit",
    ),
    heat(
        11,
        "Utilisation of every process",
        "A row for each process: dark is a whole core, pale is idle. If all workers are dark, add replicas. If one is "
        "dark for long, see what it runs. A dark gateway or dispatcher limits all others. If workers are pale while "
        "calls wait, the loops cannot feed them.",
        "percentunit",
        Query(owned(ON_A_CORE), NAME),
        most=1,
        width=WHOLE,
        height=10,
    ),
    lines(
        12,
        "Utilisation",
        "The same as lines, killed processes' time included: 1 is one core. Blue gateways and purple dispatchers "
        "should stay below 0.7; orange workers may be fully used.",
        "percentunit",
        Query(owned(ON_A_CORE), NAME),
        width=WHOLE,
        height=9,
        coloured=colours.ROLES,
        limits=((0.7, "orange"), (0.9, "red")),
        most=1,
        link=POD,
    ),
)

_TIME = (
    lines(
        21,
        "What workers do with their time",
        "Mean of all workers. Waits for a core: more workers (or BLAS threads) than cores, or the CPU limit "
        "throttles. Waits for something else: its kernels sleep, read or write: more workers than cores would do "
        "more. Idle: no calls.",
        "percentunit",
        Query(f"avg({WORKERS_ON_A_CORE})", "on a core"),
        Query(f"avg({WORKERS_WAITING})", "waits for a core"),
        Query(f"avg({BLOCKED})", "waits for something else"),
        Query(f"avg(1 - {IN_A_RUN})", "idle"),
        coloured=colours.STATES,
        most=1,
        stacked=True,
    ),
    lines(
        22,
        "Waiting for a core",
        "Share of time in which each process was ready to run but had no core. For loops it should be near 0, since "
        "all calls wait with them. If it is high for all, the pod's CPU limit is below its workers, or the node is "
        "full.",
        "percentunit",
        Query(owned(rate("unlatch_process_core_wait_seconds_total", ANY_POD, ONE)), NAME),
        coloured=colours.ROLES,
        limits=((0.2, "red"),),
        most=1,
        link=POD,
    ),
    lines(
        23,
        "In a run, by worker",
        "Share of time in which each worker ran kernels. Compare it with utilisation to see whether its kernels "
        "compute.",
        "percentunit",
        Query(owned(IN_A_RUN), WORKER),
        most=1,
        link=POD,
    ),
    lines(
        24,
        "In a run, but on no core and waiting for none",
        "Share of time in which a worker's kernel slept, read or wrote. For kernels that only compute it is near 0: "
        "if not, they wait for a lock, a file, or memory that is paged in.",
        "percentunit",
        Query(owned(BLOCKED), WORKER),
        width=HALF,
        most=1,
        link=POD,
    ),
    lines(
        25,
        "Calls: running and waiting",
        "Seconds that calls spent in each stage at the replicas, each second: how many run, and how many wait for a "
        "worker. Waiting above running: add replicas.",
        "short",
        Query(
            rate(
                "unlatch_call_seconds_sum",
                f'{ANY_POD}, component="compute", kernel=~"$kernel", stage=~"run|queue"',
                "stage",
            ),
            "{{stage}}",
        ),
        width=HALF,
        coloured=colours.STAGES,
    ),
)

_RUNS = (
    lines(
        31,
        "Present run of each worker",
        "How long each worker has run its present kernel. A line that keeps rising is a hanging run; the legend "
        "names its kernel.",
        "s",
        Query(owned(f'unlatch_worker_running_seconds{{{ANY_POD}, kernel=~"$kernel"}}'), f"{WORKER} {{{{kernel}}}}"),
        link=POD,
    ),
    lines(
        32,
        "Calls that workers ended",
        "By kernel and outcome. Errors are the kernels' own; a worker that ends none while others do is stuck, see "
        "its present run.",
        "reqps",
        Query(
            rate("unlatch_worker_calls_total", f'{ANY_POD}, kernel=~"$kernel"', "kernel, outcome"),
            "{{kernel}} {{outcome}}",
        ),
        coloured={"error": "red"},
    ),
    lines(
        33,
        "Wasted processor time",
        "Processor time of runs whose callers had left, or whose deadlines had passed. Kernels that check "
        "`unlatch.cancelled()` end sooner; callers can set longer deadlines.",
        "short",
        Query(rate("unlatch_wasted_cpu_seconds_total", ANY_POD, "pod"), "{{pod}}"),
        link=POD,
    ),
)

_RESTARTS = (
    lines(
        41,
        "Restarts by reason",
        "Workers that ended and were replaced. `killed`, with no limit of ours: the machine ran out of memory. "
        "`segmentation_fault`: a kernel's native code. `abandoned`: callers cancel. `recycled_after_growth`, "
        "`recycled_after_calls`: recycling, as its settings plan it.",
        "short",
        Query(f"sum by (reason) {RESTARTS}", "{{reason}}"),
        stacked=True,
        bars=True,
        width=HALF,
    ),
    lines(
        42,
        "Restarts by worker",
        "The same by slot. If a single slot restarts, certain calls kill it, and calls like them will be refused. If "
        "all of a pod do, look at its memory or its kernels.",
        "short",
        Query(owned(f"sum by (pod, unit, worker) {RESTARTS}"), WORKER),
        stacked=True,
        bars=True,
        width=HALF,
        link=POD,
    ),
    lines(
        43,
        "Time without a worker",
        "From the end of a worker until its replacement takes calls, normally some 10 ms. With seconds, its kernels "
        "take long to load, or keep killing it so that each start waits longer.",
        "s",
        *(Query(quantile(q, "unlatch_worker_replacement_seconds", ANY_POD), f"p{q * 100:g}") for q in (0.5, 0.99)),
        coloured=colours.QUANTILES,
        width=HALF,
    ),
    states(
        44,
        "Workers",
        "Whether a process that takes calls fills each slot. If one stays red, the dispatcher's log has the reason.",
        Query(owned(f"unlatch_worker_up{{{ANY_POD}}}"), WORKER),
        {0: ("none takes calls", "red"), 1: ("takes calls", "green")},
        width=HALF,
    ),
    states(
        45,
        "Units",
        "Whether each unit of `unlatch serve --units N` answers for its metrics. If one stays red, its process ends "
        "again and again, or is stopped: see the log for `restarting service` and `metrics of unit not read`.",
        Query(owned(f"unlatch_unit_up{{{ANY_POD}}}"), "{{owner}}"),
        {0: ("does not answer", "red"), 1: ("answers", "green")},
        width=WHOLE,
    ),
)

_MEMORY = (
    lines(
        51,
        "Memory in RAM",
        "Of every process, shared arenas included. All of a pod's together must stay below its limit; a dispatcher's "
        "grows with what calls bring, bounded by `--input-arena-bytes`.",
        "bytes",
        Query(owned(f"unlatch_process_resident_memory_bytes{{{ANY_POD}}}"), NAME),
        coloured=colours.ROLES,
        link=POD,
    ),
    lines(
        52,
        "Workers' own memory, and its limit",
        "What each worker has beyond what it started with, and (red) what it may have. A line that climbs with each "
        "call is a kernel that leaks: `--recycle-growth-bytes` replaces such a worker.",
        "bytes",
        Query(owned(f"unlatch_worker_memory_bytes{{{ANY_POD}}}"), WORKER),
        Query(owned(f"unlatch_worker_memory_limit_bytes{{{ANY_POD}}} > 0"), "{{owner}} limit"),
        coloured={"limit$": "red", "worker-": "shades of orange"},
        link=POD,
    ),
    lines(
        53,
        "Workers' memory against the limit",
        "At 1 the call is RESOURCE_EXHAUSTED and the worker serves on, or is replaced. Near 1 for one kernel: give it "
        "`memory=`, or send it less at a time.",
        "percentunit",
        Query(owned(MEMORY_RATIO), WORKER),
        limits=((0.8, "orange"), (0.95, "red")),
        most=1,
        link=POD,
    ),
    lines(
        54,
        "Page faults, minor",
        "Pages that were found in RAM. With thousands a second, a worker returns memory and takes it again with "
        "each call: see its kernels' temporary arrays.",
        "short",
        Query(owned(rate("unlatch_process_page_faults_total", f'{ANY_POD}, kind="minor"', ONE)), NAME),
        coloured=colours.ROLES,
        width=HALF,
        link=POD,
    ),
    lines(
        55,
        "Page faults, major",
        "Pages that were read from a disk. After the start it is 0: if not, the node has no memory left and "
        "everything waits for its disk.",
        "short",
        Query(owned(rate("unlatch_process_page_faults_total", f'{ANY_POD}, kind="major"', ONE)), NAME),
        coloured=colours.ROLES,
        limits=((1, "red"),),
        width=HALF,
        link=POD,
    ),
)

_LOOPS = (
    lines(
        61,
        "Loop lag, p99",
        "Lag of a timer that is due every 50 ms, which every event at that moment had to wait. Over 10 ms: large unary "
        "messages, or no free core for the loop.",
        "s",
        Query(owned(quantile(0.99, "unlatch_event_loop_lag_seconds", LOOPS, ONE)), NAME),
        coloured=colours.ROLES,
        limits=((0.01, "orange"), (0.1, "red")),
        width=HALF,
        link=POD,
    ),
    heat(
        62,
        "Loop lag, all loops",
        "Distribution of lags. One band near the bottom is a healthy loop; a second band above it is work in long "
        "pieces.",
        "s",
        Query(rate("unlatch_event_loop_lag_seconds_bucket", LOOPS, "le"), "{{le}}"),
        buckets=True,
        width=HALF,
    ),
    lines(
        63,
        "Loop stalled",
        "Time by which each loop was overdue when it was scraped. More than some milliseconds, repeatedly, means that "
        "the loop is blocked.",
        "s",
        Query(owned(f"unlatch_event_loop_stalled_seconds{{{LOOPS}}}"), NAME),
        coloured=colours.ROLES,
        limits=((0.5, "orange"), (2, "red")),
        width=HALF,
        link=POD,
    ),
    lines(
        64,
        "GIL contention",
        "Share of time that a thread of each process waits for the interpreter's lock. It follows utilisation; above "
        "0.5 some code in that process computes, which it should not.",
        "percentunit",
        Query(owned(f"unlatch_gil_contention_ratio{{{LOOPS}}}"), NAME),
        coloured=colours.ROLES,
        limits=((0.3, "orange"), (0.5, "red")),
        most=1,
        width=HALF,
        link=POD,
    ),
)

BOARD = Board(
    uid="unlatch-processes",
    says="How each process uses its time and memory, and which one causes trouble.",
    variables=(
        Variable(name="namespace", title="Namespace", series="unlatch_process_utilization_ratio", label="namespace"),
        Variable(
            name="pod", title="Pod", series='unlatch_process_utilization_ratio{namespace=~"$namespace"}', label="pod"
        ),
        Variable(
            name="kernel", title="Kernel", series='unlatch_worker_calls_total{namespace=~"$namespace"}', label="kernel"
        ),
    ),
    top=_TOP,
    rows={
        "Run time and waiting": _TIME,
        "Runs": _RUNS,
        "Restarts": _RESTARTS,
        "Memory": _MEMORY,
        "Event loops": _LOOPS,
    },
)
