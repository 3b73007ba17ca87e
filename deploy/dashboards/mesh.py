"""Mesh: whether callers get what they ask for, and if not, where along a call's path it is lost."""

from deploy.dashboards import colours
from deploy.dashboards.board import Board, Variable
from deploy.dashboards.panels import HALF, Column, Link, Query, figure, heat, lines, rows, states
from deploy.dashboards.queries import COMPUTE, FAULTS, GATEWAY, mean, quantile, rate

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
        "Calls that ended, of every status. If it has fallen and nothing else has changed, look at who calls.",
        "reqps",
        rate(CALLS, KERNEL),
    ),
    figure(
        2,
        "Failed by our fault",
        "Share of calls that ended DEADLINE_EXCEEDED, INTERNAL or UNAVAILABLE. Above 0.1 %: see the failed calls by "
        "kernel below. One kernel alone is that kernel's fault, all kernels are the fleet's.",
        "percentunit",
        f"{rate(CALLS, FAULTY)} / {rate(CALLS, KERNEL)}",
        limits=((0.001, "orange"), (0.01, "red")),
    ),
    figure(
        3,
        "Latency, p99",
        "Of calls that succeeded, from their coming to their answer. Where the time goes is told below: queue means "
        "too few workers, run the kernel itself, transfer large tensors or a busy gateway.",
        "s",
        quantile(0.99, TIMES, SUCCEEDED),
    ),
    figure(
        4,
        "Workers busy",
        "Share of all workers' time in which they ran kernels. Near 1 calls wait for workers: more replicas, or more "
        "workers where there are cores to spare.",
        "percentunit",
        f"avg(rate(unlatch_worker_busy_seconds_total{{{COMPUTE}}}[$__rate_interval]))",
        limits=((0.8, "orange"), (0.95, "red")),
    ),
    figure(
        5,
        "Wait for a worker, p99",
        "At the replicas, from a call's bytes being there until its run. It grows before latency does: add replicas "
        "while it is still less than callers' deadlines.",
        "s",
        quantile(0.99, "unlatch_queue_wait_seconds", COMPUTE),
        limits=((0.5, "orange"), (2, "red")),
    ),
    figure(
        6,
        "Calls that wait",
        "At the gateways, for a replica that has room; at the replicas, for a worker. Thousands mean that refusals "
        "are near: see saturation below.",
        "short",
        f"sum(unlatch_queue_depth{{{GATEWAY}}}) + sum(unlatch_queue_depth{{{COMPUTE}}})",
        limits=((1000, "orange"), (10000, "red")),
    ),
    figure(
        7,
        "Replicas that take calls",
        "As the gateway sees it that sees fewest. 0: nobody is served; see the fleet's states below, and the log of a "
        "replica for `replica takes no calls`.",
        "short",
        f"min(sum by (namespace, pod) (unlatch_replica_up{{{GATEWAY}}}))",
        limits=((0, "red"), (1, "orange"), (2, "green")),
    ),
    figure(
        8,
        "Workers in place",
        "Share of the workers' slots that a process fills which takes calls. Below 1 for long: a kernel kills its "
        "workers, or does not load. See restarts by reason on the board of processes.",
        "percentunit",
        f"avg(unlatch_worker_up{{{COMPUTE}}})",
        limits=((0, "red"), (0.5, "orange"), (0.999, "green")),
    ),
)

_CALLS = (
    lines(
        11,
        "Calls by status",
        "Each status that callers got. Red is ours or a kernel's fault, yellow a bound that was reached (the message "
        "that callers get names it), blue their own.",
        "reqps",
        Query(rate(CALLS, KERNEL, "code"), "{{code}}"),
        width=HALF,
        coloured=colours.CODES,
        stacked=True,
    ),
    lines(
        12,
        "Failed calls by kernel and status",
        "All that did not end OK. INTERNAL of one kernel: the dispatcher's log has its traceback, by the id that the "
        "caller was told. UNAVAILABLE of all: replicas are lost.",
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
        "From a call's coming to its answer, all kernels. If p99 alone is high some calls wait behind long ones: see "
        "docs/operations/scheduling.md.",
        "s",
        *(Query(quantile(q, TIMES, SUCCEEDED), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
        coloured=colours.QUANTILES,
    ),
    lines(
        22,
        "Latency by kernel, p99",
        "Which kernel is slow. One alone: its inputs have grown, or it has. All of them: they wait, see saturation.",
        "s",
        Query(quantile(0.99, TIMES, SUCCEEDED, "kernel"), "{{kernel}}"),
    ),
    lines(
        23,
        "Where the time of a call goes",
        "Mean of a call that succeeded: its wait for a worker, its run, and all else (transfer). Queue: more "
        "replicas. Run: the kernel. Transfer: tensors' bytes, or a gateway near a whole core.",
        "s",
        Query(mean(TIMES, f'{KERNEL}, stage=~"transfer|queue|run"', "stage"), "{{stage}}"),
        coloured=colours.STAGES,
        stacked=True,
    ),
    heat(
        24,
        "Latency, all calls that succeeded",
        "How many calls took how long. Two bands are two kinds of calls; a band that climbs is a queue that grows.",
        "s",
        Query(rate(f"{TIMES}_bucket", SUCCEEDED, "le"), "{{le}}"),
        buckets=True,
        width=HALF,
    ),
    lines(
        25,
        "Time until calls failed, p99",
        "From coming to error. As long as deadlines: calls wait and are not begun. Short: they are refused or break "
        "at once, which costs nobody's time.",
        "s",
        Query(quantile(0.99, TIMES, f'{KERNEL}, stage="failed"', "kernel"), "{{kernel}}"),
        width=HALF,
    ),
)

_SATURATION = (
    lines(
        31,
        "Workers busy, by replica",
        "Share of time in which a replica's workers ran kernels. All near 1: more replicas. One above the others: see "
        "the fleet.",
        "percentunit",
        Query(
            f"avg by (pod) (rate(unlatch_worker_busy_seconds_total{{{COMPUTE}}}[$__rate_interval]))",
            "{{pod}}",
        ),
        width=HALF,
        limits=((0.8, "orange"), (0.95, "red")),
        most=1,
        link=TO_PROCESSES,
    ),
    lines(
        32,
        "Calls that wait, by pod",
        "For a replica that has room (gateways), and for a worker (replicas, which are sent no more than keeps them "
        "busy). Grows at the gateways: all replicas are full.",
        "short",
        Query(f"unlatch_queue_depth{{{GATEWAY}}}", "{{pod}}"),
        Query(f"unlatch_queue_depth{{{COMPUTE}}}", "{{pod}}"),
        width=HALF,
        link=TO_PROCESSES,
    ),
    lines(
        33,
        "Wait for a worker",
        "At the replicas, between a call's bytes being there and its run. It is what autoscaling goes by.",
        "s",
        *(Query(quantile(q, "unlatch_queue_wait_seconds", COMPUTE), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
        width=HALF,
        coloured=colours.QUANTILES,
    ),
    lines(
        34,
        "Calls in flight, by gateway",
        "Calls that have not ended; a gateway refuses what comes beyond `--max-live-calls` (20,000). One gateway with "
        "all of them: callers' connections are not spread.",
        "short",
        Query(f"unlatch_calls_in_flight{{{GATEWAY}}}", "{{pod}}"),
        width=HALF,
        link=TO_PROCESSES,
    ),
)

_FLEET = (
    states(
        41,
        "Replicas",
        "As the gateways see them. Gone: its process or its lane, see its log. Ejected: its lane keeps breaking or "
        "its workers keep dying, its log says of what; it is tried again by itself.",
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
        "How long a new call would wait there, as gateways reckon. All high: more replicas. One high: what it was "
        "given runs longer than was learnt, which it learns.",
        "s",
        Query(f"max by (replica) (unlatch_replica_wait_seconds{{{GATEWAY}}})", "{{replica}}"),
    ),
    lines(
        44,
        "Utilisation, by replica",
        "As each replica reports it. Far apart for minutes: the fleet is out of balance; compare calls in flight, "
        "waits, and whether one serves a kernel that others do not.",
        "percentunit",
        Query(f"max by (replica) (unlatch_replica_utilization_ratio{{{GATEWAY}}})", "{{replica}}"),
        most=1,
    ),
    lines(
        45,
        "Silence of replicas",
        "How long nothing has been heard of a replica; its lane is broken off after five reports that have not come, "
        "1.25 s by default. A dispatcher that is held up is silent too: see its loop.",
        "s",
        Query(f"max by (replica) (unlatch_replica_heartbeat_age_seconds{{{GATEWAY}}})", "{{replica}}"),
        limits=((1.25, "red"),),
    ),
    lines(
        46,
        "Runs sent again",
        "Not begun is free; lost is a replica that went away, failed one that answered UNAVAILABLE. Each costs a run: "
        "see which replica restarts.",
        "reqps",
        Query(rate("unlatch_retries_total", GATEWAY, "reason"), "{{reason}}"),
    ),
    lines(
        47,
        "Runs lost for good",
        "Their callers got UNAVAILABLE. Not pure: declare kernels `pure=True` where it is true. Budget: more is lost "
        "than a tenth of the calls, an outage, not an accident.",
        "reqps",
        Query(rate("unlatch_retries_refused_total", GATEWAY, "reason"), "{{reason}}"),
    ),
    lines(
        48,
        "Budget for runs sent again",
        "How many runs that were begun may be sent again now. At 0 losses reach callers: find out what is being lost.",
        "short",
        Query(f"unlatch_retry_budget{{{GATEWAY}}}", "{{pod}}"),
        limits=((0, "red"), (1, "green")),
    ),
    lines(
        49,
        "Calls that shared a run",
        "Identical calls of pure kernels that were in flight together. Work that was not done twice; many of them are "
        "a caller that could keep its answers.",
        "reqps",
        Query(rate("unlatch_coalesced_calls_total", KERNEL, "kernel"), "{{kernel}}"),
    ),
)

_KERNELS = (
    rows(
        51,
        "Kernels",
        "One row a kernel, the most called first; a click shows that kernel alone. Failed is by our fault or the "
        "kernel's.",
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
        "Which kernels are called, all statuses. What has grown is where load comes from.",
        "reqps",
        Query(rate(CALLS, KERNEL, "kernel"), "{{kernel}}"),
        stacked=True,
    ),
    lines(
        53,
        "Workers' time by kernel",
        "How many workers each kernel keeps running. The kernel that needs most is where making it faster pays.",
        "short",
        Query(rate(f"{TIMES}_sum", f'{COMPUTE}, kernel=~"$kernel", stage="run"', "kernel"), "{{kernel}}"),
        stacked=True,
    ),
    lines(
        54,
        "Calls a run, of kernels with batch=True",
        "Mean of how many calls ran as one. 1 while nothing waits, which is right; 1 while calls wait: their inputs "
        "do not fit together.",
        "short",
        Query(mean("unlatch_batch_calls", f'{COMPUTE}, kernel=~"$kernel"', "kernel"), "{{kernel}}"),
    ),
)

_DOOR = (
    lines(
        61,
        "RPCs that began, by method",
        "At the protocol's door; lanes are one endless RPC and are not here. ServerReady and metadata in thousands: a "
        "client asks before each call.",
        "reqps",
        Query(rate("grpc_server_started_total", GATEWAY, "grpc_method"), "{{grpc_method}}"),
    ),
    lines(
        62,
        "RPCs that ended, by status",
        "At the protocol's door. UNAUTHENTICATED and RESOURCE_EXHAUSTED are refused before a byte of them is read.",
        "reqps",
        Query(rate("grpc_server_handled_total", GATEWAY, "grpc_code"), "{{grpc_code}}"),
        coloured=colours.CODES,
    ),
    lines(
        63,
        "Time of RPCs, p99",
        "At the protocol's door, by method. Methods that only ask about kernels take a millisecond: if they do not, "
        "the gateway's loop is held up.",
        "s",
        Query(quantile(0.99, "grpc_server_handling_seconds", GATEWAY, "grpc_method"), "{{grpc_method}}"),
    ),
    lines(
        64,
        "Not let in, by reason",
        "Calls that nobody knows the caller of. Expired: a caller does not renew its token. A key that is not known: "
        "the file of keys is old. A flood with no token is somebody who tries.",
        "reqps",
        Query(rate("unlatch_unauthenticated_total", GATEWAY, "reason"), "{{reason}}"),
        width=HALF,
    ),
    lines(
        65,
        "Certificates expire in",
        "The first of each file's. Below a day renewal does not work: look at cert-manager's Certificate, then for "
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
    says="Whether callers get what they ask for, and if not, where along a call's path it is lost.",
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
        "The gateway's door": _DOOR,
    },
)
