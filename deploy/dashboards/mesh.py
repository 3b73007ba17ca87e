"""The board of the mesh: whether calls succeed, and if not, where on their path they fail."""

from deploy.dashboards import colours
from deploy.dashboards.board import Board, Variable
from deploy.dashboards.panels import HALF, Column, Link, Query, figure, heat, lines, rows, states
from deploy.dashboards.queries import COMPUTE, FAULTS, GATEWAY, mean, owned, quantile, rate

KERNEL = f'{GATEWAY}, kernel=~"$kernel"'
CALLS = "unlatch_calls_total"
TIMES = "unlatch_call_seconds"
FAULTY = f'{KERNEL}, code=~"{FAULTS}"'
SUCCEEDED = f'{KERNEL}, stage="total"'
TO_PROCESSES = Link(title="Its processes", url="/d/unlatch-processes?var-pod=${__field.labels.pod}&${__url_time_range}")
TO_KERNEL = Link(
    title="This kernel alone", url="/d/unlatch-mesh?var-kernel=${__data.fields.kernel}&${__url_time_range}"
)

_TOP = (
    figure(
        1,
        "Calls",
        "Calls that ended, with any status. If the rate fell and nothing else changed, check the callers.",
        "reqps",
        rate(CALLS, KERNEL),
    ),
    figure(
        2,
        "Failed by a fault",
        "Share of calls that ended ABORTED, DEADLINE_EXCEEDED, INTERNAL or UNAVAILABLE. Above 0.1 %: see the failed "
        "calls by kernel below. If a single kernel fails, the fault is in that kernel; if all fail, in the fleet.",
        "percentunit",
        f"{rate(CALLS, FAULTY)} / {rate(CALLS, KERNEL)}",
        limits=((0.001, "orange"), (0.01, "red")),
    ),
    figure(
        3,
        "Latency, p99",
        "Of calls that succeeded, from arrival to answer. The panels below show where the time goes: queue means "
        "too few workers, run means the kernel itself, transfer means large tensors or a busy gateway.",
        "s",
        quantile(0.99, TIMES, SUCCEEDED),
    ),
    figure(
        4,
        "Workers busy",
        "Share of all workers' time in which they ran kernels. Near 1, calls wait for workers: add replicas, or "
        "workers if cores are free.",
        "percentunit",
        f"avg(rate(unlatch_worker_busy_seconds_total{{{COMPUTE}}}[$__rate_interval]))",
        limits=((0.8, "orange"), (0.95, "red")),
    ),
    figure(
        5,
        "Wait for a worker, p99",
        "At the replicas, from the arrival of a call's bytes until its run. It grows before latency does: add "
        "replicas while it is still less than callers' deadlines.",
        "s",
        quantile(0.99, "unlatch_queue_wait_seconds", COMPUTE),
        limits=((0.5, "orange"), (2, "red")),
    ),
    figure(
        6,
        "Waiting calls",
        "At the gateways for a replica with room, at the replicas for a worker. With thousands of them, refusals are "
        "near: see saturation below.",
        "short",
        f"sum(unlatch_queue_depth{{{GATEWAY}}}) + sum(unlatch_queue_depth{{{COMPUTE}}})",
        limits=((1000, "orange"), (10000, "red")),
    ),
    figure(
        7,
        "Replicas that take calls",
        "The lowest number that any gateway sees. At 0 no call is served: see the states of the fleet below, and a "
        "replica's log for `replica takes no calls`.",
        "short",
        f"min(sum by (namespace, pod, unit) (unlatch_replica_up{{{GATEWAY}}}))",
        limits=((0, "red"), (1, "orange"), (2, "green")),
    ),
    figure(
        8,
        "Workers up",
        "Share of workers' slots whose process takes calls. If it stays below 1, a kernel kills its workers or does "
        "not load: see restarts by reason on the board of processes.",
        "percentunit",
        f"avg(unlatch_worker_up{{{COMPUTE}}})",
        limits=((0, "red"), (0.5, "orange"), (0.999, "green")),
    ),
)

_CALLS = (
    lines(
        11,
        "Calls by status",
        "Each status that callers got. Red is a fault of Unlatch or of a kernel; yellow is a limit, which the error "
        "names; blue is an error of the caller.",
        "reqps",
        Query(rate(CALLS, KERNEL, "code"), "{{code}}"),
        width=HALF,
        coloured=colours.CODES,
        stacked=True,
    ),
    lines(
        12,
        "Failed calls by kernel and status",
        "Calls that did not end OK. INTERNAL of one kernel: the dispatcher's log has the traceback, under the id in "
        "the caller's error. ABORTED or UNAVAILABLE of all kernels: replicas are lost.",
        "reqps",
        Query(rate(CALLS, f'{KERNEL}, code!="OK"', "kernel, code"), "{{kernel}} {{code}}"),
        width=HALF,
        coloured={pattern: colour for pattern, colour in colours.CODES.items() if pattern != "^OK$"},
    ),
)

_LATENCY = (
    lines(
        21,
        "Latency of calls that succeeded",
        "From arrival to answer, all kernels. If only p99 is high, some calls wait behind long ones: see "
        "docs/operations/scheduling.md.",
        "s",
        *(Query(quantile(q, TIMES, SUCCEEDED), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
        coloured=colours.QUANTILES,
    ),
    lines(
        22,
        "Latency by kernel, p99",
        "If a single kernel is slow, its inputs or its work have grown. If all are slow, calls wait: see saturation.",
        "s",
        Query(quantile(0.99, TIMES, SUCCEEDED, "kernel"), "{{kernel}}"),
    ),
    lines(
        23,
        "Where the time of a call goes",
        "Mean of a call that succeeded: its wait for a worker (queue), its run, and the rest (transfer). For queue, "
        "add replicas; for run, look at the kernel; for transfer, at large tensors or a gateway near a whole core.",
        "s",
        Query(mean(TIMES, f'{KERNEL}, stage=~"transfer|queue|run"', "stage"), "{{stage}}"),
        coloured=colours.STAGES,
        stacked=True,
    ),
    heat(
        24,
        "Latency, all calls that succeeded",
        "Number of calls by latency. Two bands are two kinds of calls; a rising band is a growing queue.",
        "s",
        Query(rate(f"{TIMES}_bucket", SUCCEEDED, "le"), "{{le}}"),
        buckets=True,
        width=HALF,
    ),
    lines(
        25,
        "Time until calls failed, p99",
        "From arrival to error. If it is as long as deadlines, calls wait and are never begun. If it is short, they "
        "are refused or fail at once.",
        "s",
        Query(quantile(0.99, TIMES, f'{KERNEL}, stage="failed"', "kernel"), "{{kernel}}"),
        width=HALF,
    ),
)

_SATURATION = (
    lines(
        31,
        "Workers busy, by replica",
        "Share of time in which a replica's workers ran kernels. If all are near 1, add replicas. If one is above the "
        "others, see the fleet.",
        "percentunit",
        Query(
            owned(f"avg by (pod, unit) (rate(unlatch_worker_busy_seconds_total{{{COMPUTE}}}[$__rate_interval]))"),
            "{{owner}}",
        ),
        width=HALF,
        limits=((0.8, "orange"), (0.95, "red")),
        most=1,
        link=TO_PROCESSES,
    ),
    lines(
        32,
        "Waiting calls, by pod",
        "For a replica with room (gateways), and for a worker (replicas, which get only as much as keeps them busy). "
        "If it grows at the gateways, all replicas are full.",
        "short",
        Query(owned(f"unlatch_queue_depth{{{GATEWAY}}}"), "{{owner}}"),
        Query(owned(f"unlatch_queue_depth{{{COMPUTE}}}"), "{{owner}}"),
        width=HALF,
        link=TO_PROCESSES,
    ),
    lines(
        33,
        "Wait for a worker",
        "At the replicas, from the arrival of a call's bytes until its run. Autoscaling uses this.",
        "s",
        *(Query(quantile(q, "unlatch_queue_wait_seconds", COMPUTE), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
        width=HALF,
        coloured=colours.QUANTILES,
    ),
    lines(
        34,
        "Calls in flight, by gateway",
        "Calls that have not ended. A gateway refuses more than `--max-live-calls` (20,000). If one gateway has all "
        "of them, callers' connections are not distributed.",
        "short",
        Query(owned(f"unlatch_calls_in_flight{{{GATEWAY}}}"), "{{owner}}"),
        width=HALF,
        link=TO_PROCESSES,
    ),
)

_FLEET = (
    states(
        41,
        "Replicas",
        "As the gateways see them. Gone: the process or the lane has ended, see the replica's log. Ejected: the lane "
        "keeps breaking or workers keep dying, see its log for the reason; it is tried again automatically.",
        Query(
            f"max by (replica) (2 * unlatch_replica_ejected{{{GATEWAY}}}) > 0 or "
            f"min by (replica) (unlatch_replica_up{{{GATEWAY}}})",
            "{{replica}}",
        ),
        {0: ("gone", "red"), 1: ("takes calls", "green"), 2: ("ejected", "orange")},
    ),
    lines(
        42,
        "Calls in flight, by replica",
        "Over all gateways. A slow replica should have fewer than the others, not more.",
        "short",
        Query(f"sum by (replica) (unlatch_replica_calls_in_flight{{{GATEWAY}}})", "{{replica}}"),
    ),
    lines(
        43,
        "Wait at replicas",
        "Expected wait of a new call, as gateways estimate it. If all are high, add replicas. If one is high, its runs "
        "take longer than predicted; the prediction adapts.",
        "s",
        Query(f"max by (replica) (unlatch_replica_wait_seconds{{{GATEWAY}}})", "{{replica}}"),
    ),
    lines(
        44,
        "Utilisation, by replica",
        "As each replica reports it. If they differ much for minutes, the fleet is out of balance: compare calls in "
        "flight, waits, and whether one serves a kernel that others do not.",
        "percentunit",
        Query(f"max by (replica) (unlatch_replica_utilization_ratio{{{GATEWAY}}})", "{{replica}}"),
        most=1,
    ),
    lines(
        45,
        "Silence of replicas",
        "Time since a replica's last report. Its lane is closed after five missing reports, 1.25 s by default. A "
        "dispatcher whose loop is blocked is silent too: see its loop lag.",
        "s",
        Query(f"max by (replica) (unlatch_replica_heartbeat_age_seconds{{{GATEWAY}}})", "{{replica}}"),
        limits=((1.25, "red"),),
    ),
    lines(
        46,
        "Retried runs",
        "Not begun is free; lost is a replica that went away, failed one that answered UNAVAILABLE. Each costs a run: "
        "see which replica restarts.",
        "reqps",
        Query(rate("unlatch_retries_total", GATEWAY, "reason"), "{{reason}}"),
    ),
    lines(
        47,
        "Runs lost for good",
        "Their callers got UNAVAILABLE, or ABORTED if the call may have had an effect. Not pure: declare kernels "
        "`pure=True` where it is true. Budget: more than a tenth of the calls are lost, which is an outage.",
        "reqps",
        Query(rate("unlatch_retries_refused_total", GATEWAY, "reason"), "{{reason}}"),
    ),
    lines(
        48,
        "Retry budget",
        "Number of begun runs that may be retried now. At 0 losses reach callers: find out what is being lost.",
        "short",
        Query(owned(f"unlatch_retry_budget{{{GATEWAY}}}"), "{{owner}}"),
        limits=((0, "red"), (1, "green")),
    ),
    lines(
        49,
        "Calls that shared a run",
        "Identical calls of pure kernels that were in flight together, and so were computed once. If there are many, "
        "a caller could cache its results.",
        "reqps",
        Query(rate("unlatch_coalesced_calls_total", KERNEL, "kernel"), "{{kernel}}"),
    ),
)

_KERNELS = (
    rows(
        51,
        "Kernels",
        "One row for each kernel, the most called first; click to show that kernel only. Failed counts faults of "
        "Unlatch or the kernel.",
        ("kernel",),
        Column(title="Calls/s", expr=rate(CALLS, KERNEL, "kernel"), unit="reqps"),
        Column(
            title="Failed",
            expr=f"{rate(CALLS, FAULTY, 'kernel')} / {rate(CALLS, KERNEL, 'kernel')}",
            unit="percentunit",
            limits=((0.001, "orange"), (0.01, "red")),
        ),
        Column(title="p50", expr=quantile(0.5, TIMES, SUCCEEDED, "kernel"), unit="s"),
        Column(title="p99", expr=quantile(0.99, TIMES, SUCCEEDED, "kernel"), unit="s"),
        Column(title="Mean run", expr=mean(TIMES, f'{KERNEL}, stage="run"', "kernel"), unit="s"),
        Column(title="Mean wait", expr=mean(TIMES, f'{KERNEL}, stage="queue"', "kernel"), unit="s"),
        Column(
            title="Last call",
            expr=f"time() - max by (kernel) (unlatch_last_call_timestamp_seconds{{{KERNEL}}})",
            unit="s",
        ),
        link=TO_KERNEL,
    ),
    lines(
        52,
        "Calls by kernel",
        "Calls with any status. A kernel whose rate has grown is a source of load.",
        "reqps",
        Query(rate(CALLS, KERNEL, "kernel"), "{{kernel}}"),
        stacked=True,
    ),
    lines(
        53,
        "Workers' time by kernel",
        "Number of workers that each kernel keeps busy. The largest is the kernel worth making faster.",
        "short",
        Query(rate(f"{TIMES}_sum", f'{COMPUTE}, kernel=~"$kernel", stage="run"', "kernel"), "{{kernel}}"),
        stacked=True,
    ),
    lines(
        54,
        "Calls a run, of kernels with batch=True",
        "Mean number of calls that ran as one. 1 is right while no calls wait. If it is 1 while calls wait, their "
        "inputs do not fit together.",
        "short",
        Query(mean("unlatch_batch_calls", f'{COMPUTE}, kernel=~"$kernel"', "kernel"), "{{kernel}}"),
    ),
)

_DOOR = (
    lines(
        61,
        "RPCs that began, by method",
        "RPCs of the Open Inference Protocol, without lanes, which are one endless RPC. With thousands of ServerReady "
        "or metadata RPCs, a client asks before each call.",
        "reqps",
        Query(rate("grpc_server_started_total", GATEWAY, "grpc_method"), "{{grpc_method}}"),
    ),
    lines(
        62,
        "RPCs that ended, by status",
        "RPCs of the Open Inference Protocol. UNAUTHENTICATED and RESOURCE_EXHAUSTED are refused before any byte of "
        "the request is read.",
        "reqps",
        Query(rate("grpc_server_handled_total", GATEWAY, "grpc_code"), "{{grpc_code}}"),
        coloured=colours.CODES,
    ),
    lines(
        63,
        "Time of RPCs, p99",
        "RPCs of the Open Inference Protocol, by method. Methods that only query kernels should take a millisecond; "
        "if they take longer, the gateway's loop is blocked.",
        "s",
        Query(quantile(0.99, "grpc_server_handling_seconds", GATEWAY, "grpc_method"), "{{grpc_method}}"),
    ),
    lines(
        64,
        "Not let in, by reason",
        "Calls whose caller could not be authenticated. Expired: a caller does not renew its token. Unknown key: the "
        "file of keys is old. Many without a token may be an attack.",
        "reqps",
        Query(rate("unlatch_unauthenticated_total", GATEWAY, "reason"), "{{reason}}"),
        width=HALF,
    ),
    lines(
        65,
        "Certificates expire in",
        "Time until the first of each file's certificates expires. Below a day, renewal has failed: look at "
        "cert-manager's Certificate, then for "
        "`certificates not replaced` in the log.",
        "s",
        Query(
            'min by (pod, role) (unlatch_certificate_expiry_timestamp_seconds{namespace=~"$namespace"}) - time()',
            "{{pod}} {{role}}",
        ),
        width=HALF,
        limits=((0, "red"), (86400, "orange"), (7 * 86400, "green")),
    ),
)

BOARD = Board(
    uid="unlatch-mesh",
    says="Whether calls succeed, and if not, where on their path they fail.",
    variables=(
        Variable(name="namespace", title="Namespace", series="unlatch_calls_in_flight", label="namespace"),
        Variable(
            name="gateway", title="Gateway", series='unlatch_calls_in_flight{namespace=~"$namespace"}', label="pod"
        ),
        Variable(name="kernel", title="Kernel", series='unlatch_calls_total{namespace=~"$namespace"}', label="kernel"),
    ),
    top=_TOP,
    rows={
        "Calls": _CALLS,
        "Latency": _LATENCY,
        "Saturation": _SATURATION,
        "Fleet": _FLEET,
        "Kernels": _KERNELS,
        "RPCs": _DOOR,
    },
)
