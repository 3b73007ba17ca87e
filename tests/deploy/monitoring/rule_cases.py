"""Cases for alerts: series over time, and the alert that they fire or do not fire.

Values are in promtool's notation: `0+60x90` begins at 0 and rises by 60 ninety times, `_` is a missing value. A value
comes each `every`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GATEWAY_POD = 'job="unlatch-gateway",namespace="mesh",pod="gateway-0"'
DISPATCHER_POD = 'job="unlatch-compute",namespace="mesh",pod="compute-0"'
# What a pod says of its component has that label too.
GATEWAY = f'component="gateway",{GATEWAY_POD}'
DISPATCHER = f'component="compute",{DISPATCHER_POD}'
OTHER_DISPATCHER = DISPATCHER.replace("compute-0", "compute-1")
CERTIFICATE = f'unlatch_certificate_expiry_timestamp_seconds{{{GATEWAY},role="tls-cert",file="/tls/tls.crt"}}'
STALLED = f'unlatch_event_loop_stalled_seconds{{{GATEWAY_POD},process="gateway"}}'
EJECTED = f'unlatch_replica_ejected{{{GATEWAY},replica="10.0.0.1:8011"}}'
UP = f'unlatch_replica_up{{{GATEWAY},replica="10.0.0.1:8011"}}'
UP_ELSEWHERE = UP.replace("gateway-0", "gateway-1")
WORKER_UP = f'unlatch_worker_up{{{DISPATCHER},worker="0"}}'
LOST = f'unlatch_worker_restarts_total{{{DISPATCHER},worker="0",reason="killed"}}'
PLANNED = LOST.replace("killed", "recycled_after_growth")
CANCELLED = LOST.replace("killed", "abandoned")
MEMORY = f'unlatch_worker_memory_bytes{{{DISPATCHER},worker="0"}}'
MEMORY_LIMIT = f"unlatch_worker_memory_limit_bytes{{{DISPATCHER}}}"
GATEWAY_TARGET = f'up{{{GATEWAY_POD},instance="10.0.0.1:8002"}}'
UNIT_POD = 'job="unlatch",namespace="mesh",pod="unit-0"'
UNIT_TARGET = f'up{{{UNIT_POD},instance="10.0.0.3:8002"}}'
UNIT_UP = f'unlatch_unit_up{{{UNIT_POD},unit="0"}}'
DISPATCHER_TARGET = f'up{{{DISPATCHER_POD},instance="10.0.0.2:8012"}}'
OF_GATEWAY = {"namespace": "mesh", "job": "unlatch-gateway", "pod": "gateway-0"}
OF_LOOP = OF_GATEWAY | {"process": "gateway"}
OF_REPLICA = {"namespace": "mesh", "replica": "10.0.0.1:8011"}
OF_MESH = {"namespace": "mesh"}


def calls(code: str) -> str:
    return f'unlatch_calls_total{{{GATEWAY},kernel="fft",code="{code}"}}'


def busy(dispatcher: str = DISPATCHER) -> str:
    return f'unlatch_worker_busy_seconds_total{{{dispatcher},worker="0"}}'


def cpu(process: str, owner: str = GATEWAY_POD, mode: str = "user") -> str:
    return f'unlatch_process_cpu_seconds_total{{{owner},process="{process}",mode="{mode}"}}'


def answered(all_of_them: str, within_a_second: str) -> Mapping[str, str]:
    of = f'{GATEWAY},kernel="fft",stage="total"'
    return {
        f"unlatch_call_seconds_count{{{of}}}": all_of_them,
        f'unlatch_call_seconds_bucket{{{of},le="1.0"}}': within_a_second,
    }


def lag(within_a_tenth: str, within_a_fifth: str) -> Mapping[str, str]:
    of = f'unlatch_event_loop_lag_seconds_bucket{{{GATEWAY_POD},process="gateway",le="%s"}}'
    return {of % "0.1": within_a_tenth, of % "0.2": within_a_fifth, of % "+Inf": within_a_fifth}


def units(*units: Mapping[str, str]) -> Mapping[str, str]:
    """Return the series of several units of one target, whose supervisor adds a label."""
    return {
        name.replace("{", f'{{unit="{number}",', 1): values
        for number, series in enumerate(units)
        for name, values in series.items()
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case.

    `at` is the time of the check; `fires` has the labels of the alert, or is None; `evaluated` defaults to `every`.
    """

    alert: str
    what: str
    series: Mapping[str, str]
    at: str = "30m"
    every: str = "15s"
    evaluated: str = ""
    fires: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.alert}: {self.what}"


CASES = (
    Case(
        alert="UnlatchErrorBudgetBurn",
        what="one call in eleven fails",
        series={calls("OK"): "0+600x90", calls("INTERNAL"): "0+60x90"},
        every="1m",
        at="80m",
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchErrorBudgetBurn",
        what="one in a hundred, for hours",
        series={calls("OK"): "0+99x400", calls("UNAVAILABLE"): "0+1x400"},
        every="1m",
        at="390m",
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchErrorBudgetBurn",
        what="one in three thousand fails, which the budget has",
        series={calls("OK"): "0+3000x90", calls("INTERNAL"): "0+1x90"},
        every="1m",
        at="80m",
    ),
    Case(
        alert="UnlatchErrorBudgetBurn",
        what="they failed, and do not any more",
        series={calls("OK"): "0+600x110", calls("INTERNAL"): "0+60x60 3600x50"},
        every="1m",
        at="100m",
    ),
    Case(
        alert="UnlatchErrorBudgetBurn",
        what="a mesh of few calls, of which one failed",
        series={calls("OK"): "0+0.2x90", calls("INTERNAL"): "0x75 1x15"},
        every="1m",
        at="80m",
    ),
    Case(
        alert="UnlatchErrorBudgetBurn",
        what="calls end as their callers deserve",
        series={calls("OK"): "0+600x90"}
        | {calls(code): "0+600x90" for code in ("INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED", "RESOURCE_EXHAUSTED")},
        every="1m",
        at="80m",
    ),
    Case(
        alert="UnlatchErrorBudgetBurnSlow",
        what="one in two hundred, for a day",
        series={calls("OK"): "0+597x1700", calls("DEADLINE_EXCEEDED"): "0+3x1700"},
        every="1m",
        evaluated="5m",
        at="26h",
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchErrorBudgetBurnSlow",
        what="one in five hundred, for three days",
        series={calls("OK"): "0+499x4600", calls("INTERNAL"): "0+1x4600"},
        every="1m",
        evaluated="5m",
        at="75h",
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchErrorBudgetBurnSlow",
        what="one in two thousand, for a day",
        series={calls("OK"): "0+1999x1700", calls("INTERNAL"): "0+1x1700"},
        every="1m",
        evaluated="5m",
        at="26h",
    ),
    Case(
        alert="UnlatchLatencyBudgetBurn",
        what="one in five takes longer",
        series=answered("0+600x90", "0+480x90"),
        every="1m",
        at="80m",
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchLatencyBudgetBurn",
        what="one in two hundred does",
        series=answered("0+600x90", "0+597x90"),
        every="1m",
        at="80m",
    ),
    Case(
        alert="UnlatchLatencyBudgetBurnSlow",
        what="one in twenty, for a day",
        series=answered("0+600x1700", "0+570x1700"),
        every="1m",
        evaluated="5m",
        at="26h",
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchLatencyBudgetBurnSlow",
        what="one in two hundred, for a day",
        series=answered("0+600x1700", "0+597x1700"),
        every="1m",
        evaluated="5m",
        at="26h",
    ),
    Case(
        alert="UnlatchCallsRefused",
        what="a tenth is",
        series={calls("OK"): "0+90x130", calls("RESOURCE_EXHAUSTED"): "0+10x130"},
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchCallsRefused",
        what="a hundredth is",
        series={calls("OK"): "0+99x130", calls("RESOURCE_EXHAUSTED"): "0+1x130"},
    ),
    Case(
        alert="UnlatchUnauthenticatedFlood",
        what="twenty a second",
        series={f'unlatch_unauthenticated_total{{{GATEWAY},reason="missing_token"}}': "0+300x130"},
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchUnauthenticatedFlood",
        what="one a second",
        series={f'unlatch_unauthenticated_total{{{GATEWAY},reason="missing_token"}}': "0+15x130"},
    ),
    Case(
        alert="UnlatchPoolSaturated",
        what="every worker is busy and three calls wait for each",
        series={busy(): "0+15x130", WORKER_UP: "1x130", f"unlatch_queue_depth{{{GATEWAY}}}": "3x130"},
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchPoolSaturated",
        what="every worker is busy and nothing waits",
        series={busy(): "0+15x130", WORKER_UP: "1x130", f"unlatch_queue_depth{{{GATEWAY}}}": "0x130"},
    ),
    Case(
        alert="UnlatchPoolSaturated",
        what="calls wait for one replica while another idles",
        series={
            busy(): "0+15x130",
            busy(OTHER_DISPATCHER): "0x130",
            WORKER_UP: "1x130",
            f"unlatch_queue_depth{{{DISPATCHER}}}": "3x130",
        },
    ),
    Case(
        alert="UnlatchPoolSaturated",
        what="two units' workers have the same number, and each is busy half of the time",
        series=units(*[{busy(): "0+7.5x130", WORKER_UP: "1x130", f"unlatch_queue_depth{{{DISPATCHER}}}": "3x130"}] * 2),
    ),
    Case(
        alert="UnlatchQueueWait",
        what="twenty wait at the gateway and the replica, and two end in a second",
        series={
            f"unlatch_queue_depth{{{GATEWAY}}}": "15x130",
            f"unlatch_queue_depth{{{DISPATCHER}}}": "5x130",
            calls("OK"): "0+30x130",
        },
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchQueueWait",
        what="some wait and none ends",
        series={f"unlatch_queue_depth{{{GATEWAY}}}": "15x130", calls("OK"): "100x130"},
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchQueueWait",
        what="twenty wait, and a hundred end in a second",
        series={f"unlatch_queue_depth{{{GATEWAY}}}": "20x130", calls("OK"): "0+1500x130"},
    ),
    Case(
        alert="UnlatchNoReplica",
        what="none that it knows takes calls",
        series={UP: "0x130", f"unlatch_calls_in_flight{{{GATEWAY}}}": "7x130"},
        fires={"namespace": "mesh", "pod": "gateway-0"},
    ),
    Case(
        alert="UnlatchNoReplica",
        what="it knows none",
        series={f"unlatch_calls_in_flight{{{GATEWAY}}}": "7x130"},
        fires={"namespace": "mesh", "pod": "gateway-0"},
    ),
    Case(
        alert="UnlatchNoReplica",
        what="one of two takes calls",
        series={
            UP: "0x130",
            UP.replace("10.0.0.1", "10.0.0.2"): "1x130",
            f"unlatch_calls_in_flight{{{GATEWAY}}}": "7x130",
        },
    ),
    Case(
        alert="UnlatchNoReplica",
        what="one of two units has none",
        series=units({UP: "1x130"}, {UP: "0x130"}),
        fires={"namespace": "mesh", "pod": "gateway-0", "unit": "1"},
    ),
    Case(
        alert="UnlatchReplicaDown",
        what="no gateway has it",
        series={UP: "0x130", UP_ELSEWHERE: "0x130"},
        fires=OF_REPLICA,
    ),
    Case(alert="UnlatchReplicaDown", what="one gateway has it", series={UP: "0x130", UP_ELSEWHERE: "1x130"}),
    Case(
        alert="UnlatchReplicaEjected",
        what="most of the time",
        series={EJECTED: "1 1 0 1" + " 1 1 0 1" * 30},
        fires=OF_REPLICA,
    ),
    Case(alert="UnlatchReplicaEjected", what="now and then", series={EJECTED: "1 0 0 0" + " 1 0 0 0" * 30}),
    Case(
        alert="UnlatchReplicaImbalance",
        what="one is busy and one idles",
        series={busy(): "0+14x130", busy(OTHER_DISPATCHER): "0+1x130"},
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchReplicaImbalance",
        what="one unit of two is busy, which has all callers",
        series=units({busy(): "0+14x130"}, {busy(): "0+1x130"}),
    ),
    Case(
        alert="UnlatchReplicaImbalance",
        what="one has a quarter more",
        series={busy(): "0+12x130", busy(OTHER_DISPATCHER): "0+9x130"},
    ),
    Case(
        alert="UnlatchRetryBudgetSpent",
        what="runs are lost for want of it",
        series={f'unlatch_retries_refused_total{{{GATEWAY},reason="budget"}}': "0x60 0+1x70"},
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchRetryBudgetSpent",
        what="runs are lost since they are not pure",
        series={
            f'unlatch_retries_refused_total{{{GATEWAY},reason="budget"}}': "4x130",
            f'unlatch_retries_refused_total{{{GATEWAY},reason="not_pure"}}': "0+1x130",
        },
    ),
    Case(
        alert="UnlatchWorkerFlapping",
        what="six in two scrapes, of which the counter is born with three",
        series={WORKER_UP: "1x130", LOST: "_x100 3 6x30"},
        fires={"namespace": "mesh", "pod": "compute-0"},
    ),
    Case(
        alert="UnlatchWorkerFlapping",
        what="six of one unit's",
        series=units({WORKER_UP: "1x130", LOST: "40x130"}, {WORKER_UP: "1x130", LOST: "_x100 3 6x30"}),
        fires={"namespace": "mesh", "pod": "compute-0", "unit": "1"},
    ),
    Case(
        alert="UnlatchWorkerFlapping",
        what="one of two units was started again; both had lost many long ago",
        series=units(
            {WORKER_UP: "1x130", LOST: "40x130"},
            {WORKER_UP: "1x110 stale 1x20", LOST: "40x110 stale _x20"},
        ),
    ),
    Case(
        alert="UnlatchWorkerFlapping",
        what="some are replaced as planned, many since their callers left",
        series={WORKER_UP: "1x130", PLANNED: "0+1x130", CANCELLED: "0+4x130", LOST: "0x100 1x30"},
    ),
    Case(
        alert="UnlatchWorkerFlapping",
        what="Prometheus has just begun to look, and many were lost long ago",
        series={WORKER_UP: "_x110 1x20", LOST: "_x110 40x20"},
    ),
    Case(
        alert="UnlatchWorkerDown",
        what="one of two is",
        series={WORKER_UP: "1x60 0x70", WORKER_UP.replace('worker="0"', 'worker="1"'): "1x130"},
        fires={"namespace": "mesh", "pod": "compute-0", "worker": "0"},
    ),
    Case(
        alert="UnlatchWorkerDown",
        what="the second unit's is, which has the number of the first's",
        series=units({WORKER_UP: "1x130"}, {WORKER_UP: "1x60 0x70"}),
        fires={"namespace": "mesh", "pod": "compute-0", "unit": "1", "worker": "0"},
    ),
    Case(alert="UnlatchWorkerDown", what="one was, for a moment", series={WORKER_UP: "1x110 0 0 1x18"}),
    Case(
        alert="UnlatchWorkerMemoryNearLimit",
        what="it has 95 of 100",
        series={MEMORY: "95x130", MEMORY_LIMIT: "100x130"},
        fires={"namespace": "mesh", "pod": "compute-0", "worker": "0"},
    ),
    Case(
        alert="UnlatchWorkerMemoryNearLimit",
        what="it has 95 of 100 in one of two units",
        series=units({MEMORY: "95x130", MEMORY_LIMIT: "200x130"}, {MEMORY: "95x130", MEMORY_LIMIT: "100x130"}),
        fires={"namespace": "mesh", "pod": "compute-0", "unit": "1", "worker": "0"},
    ),
    Case(
        alert="UnlatchWorkerMemoryNearLimit",
        what="it has 50 of 100",
        series={MEMORY: "50x130", MEMORY_LIMIT: "100x130"},
    ),
    Case(
        alert="UnlatchWorkerMemoryNearLimit",
        what="there is no limit",
        series={MEMORY: "95x130", MEMORY_LIMIT: "0x130"},
    ),
    Case(
        alert="UnlatchWorkWasted",
        what="a half is",
        series={
            f'unlatch_wasted_cpu_seconds_total{{{DISPATCHER},worker="0"}}': "0+5x130",
            cpu("worker-0", DISPATCHER_POD): "0+10x130",
        },
        fires=OF_MESH,
    ),
    Case(
        alert="UnlatchWorkWasted",
        what="a tenth is",
        series={
            f'unlatch_wasted_cpu_seconds_total{{{DISPATCHER},worker="0"}}': "0+1x130",
            cpu("worker-0", DISPATCHER_POD): "0+10x130",
        },
    ),
    Case(alert="UnlatchLoopStalled", what="for a minute", series={STALLED: "0x116 3 18 33 48x10"}, fires=OF_LOOP),
    Case(
        alert="UnlatchLoopStalled",
        what="of one of two units",
        series=units({STALLED: "0x130"}, {STALLED: "0x116 3 18 33 48x10"}),
        fires=OF_LOOP | {"unit": "1"},
    ),
    Case(alert="UnlatchLoopStalled", what="a message held it for a moment", series={STALLED: "0x119 3 0x10"}),
    Case(
        alert="UnlatchLoopLagging",
        what="a tenth of the timers is late",
        series=lag("0+270x130", "0+300x130"),
        fires=OF_LOOP,
    ),
    Case(
        alert="UnlatchLoopLagging",
        what="a tenth of the timers of one unit is late, and none of the other's many",
        series=units(lag("0+3300x130", "0+3300x130"), lag("0+270x130", "0+300x130")),
        fires=OF_LOOP | {"unit": "1"},
    ),
    Case(alert="UnlatchLoopLagging", what="one in a thousand is", series=lag("0+999x130", "0+1000x130")),
    Case(
        alert="UnlatchLoopSaturated",
        what="it uses its core, partly in the system",
        series={cpu("gateway"): "0+10x130", cpu("gateway", mode="system"): "0+4x130"},
        fires=OF_LOOP,
    ),
    Case(
        alert="UnlatchLoopSaturated",
        what="it uses half of it, and a worker all of its own",
        series={cpu("gateway"): "0+7x130", cpu("worker-0", DISPATCHER_POD): "0+15x130"},
    ),
    Case(
        alert="UnlatchLoopSaturated",
        what="one unit uses its core",
        series=units({cpu("gateway"): "0+5x130"}, {cpu("gateway"): "0+14x130"}),
        fires=OF_LOOP | {"unit": "1"},
    ),
    Case(
        alert="UnlatchLoopSaturated",
        what="two units use half a core each",
        series=units({cpu("gateway"): "0+8x130"}, {cpu("gateway"): "0+8x130"}),
    ),
    Case(
        alert="UnlatchUnitDown",
        what="one of two is",
        series={UNIT_UP: "1x130", UNIT_UP.replace('unit="0"', 'unit="1"'): "1x100 0x30"},
        fires={"namespace": "mesh", "job": "unlatch", "pod": "unit-0", "unit": "1"},
    ),
    Case(
        alert="UnlatchUnitDown",
        what="it was started again",
        series={UNIT_UP: "1x116 0 0 1x12"},
    ),
    Case(
        alert="UnlatchServiceRestarting",
        what="one unit of two, three times",
        series=units({cpu("unit", UNIT_POD): "0+1x130"}, {cpu("unit", UNIT_POD): "9x30 2x30 1x30 0.5x40"}),
        fires={"namespace": "mesh", "job": "unlatch", "pod": "unit-0", "unit": "1"},
    ),
    Case(
        alert="UnlatchServiceRestarting",
        what="four units were started again together, once",
        series=units(*[{cpu("unit", UNIT_POD): "9x60 2x70"}] * 4),
    ),
    Case(
        alert="UnlatchServiceRestarting",
        what="three times",
        series={cpu("dispatcher", DISPATCHER_POD): "9x30 2x30 1x30 0.5x40"},
        fires={"namespace": "mesh", "job": "unlatch-compute", "pod": "compute-0"},
    ),
    Case(
        alert="UnlatchServiceRestarting",
        what="once, while its workers were replaced often",
        series={cpu("dispatcher", DISPATCHER_POD): "9x60 2x70", cpu("worker-0", DISPATCHER_POD): "0+1x130"},
    ),
    Case(
        alert="UnlatchCertificateExpiresSoon",
        what="in five days",
        series={CERTIFICATE: "432000x600", CERTIFICATE.replace("tls.crt", "ca.crt"): "8640000x600"},
        at="90m",
        fires={"namespace": "mesh", "job": "unlatch-gateway", "role": "tls-cert"},
    ),
    Case(alert="UnlatchCertificateExpiresSoon", what="in thirty days", series={CERTIFICATE: "2592000x600"}, at="90m"),
    Case(
        alert="UnlatchCertificateExpires",
        what="in ten hours",
        series={CERTIFICATE: "36000x600"},
        fires={"namespace": "mesh", "job": "unlatch-gateway", "role": "tls-cert"},
    ),
    Case(alert="UnlatchCertificateExpires", what="in five days", series={CERTIFICATE: "432000x600"}),
    Case(
        alert="UnlatchScrapeDown",
        what="one of two does not answer",
        series={
            GATEWAY_TARGET: "1x100 0x30",
            DISPATCHER_TARGET: "1x130",
        },
        fires=OF_GATEWAY | {"instance": "10.0.0.1:8002"},
    ),
    Case(
        alert="UnlatchScrapeDown",
        what="it missed a scrape; somebody else's is gone",
        series={
            GATEWAY_TARGET: "1x115 0 1x14",
            DISPATCHER_TARGET.replace("unlatch-compute", "another"): "0x130",
        },
    ),
    Case(
        alert="UnlatchAbsent",
        what="no gateway is there",
        series={DISPATCHER_TARGET: "1x130"},
        fires={"job": "unlatch-gateway"},
    ),
    Case(
        alert="UnlatchAbsent",
        what="both are",
        series={
            GATEWAY_TARGET: "1x130",
            DISPATCHER_TARGET: "1x130",
        },
    ),
    Case(
        alert="UnlatchAbsent",
        what="a unit is there, which is both",
        series={UNIT_TARGET: "1x130"},
    ),
)
