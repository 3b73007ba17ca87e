"""Tenants: who asks for how much, who gets it, and who is refused."""

from deploy.dashboards import colours
from deploy.dashboards.board import Board, Variable
from deploy.dashboards.panels import HALF, SIXTH, Column, Link, Query, figure, lines, rows
from deploy.dashboards.queries import FAULTS, rate

GATEWAY = 'job="unlatch-gateway", namespace=~"$namespace"'
TENANT = f'{GATEWAY}, tenant=~"$tenant"'
CALLS, SECONDS = "unlatch_tenant_calls_total", "unlatch_tenant_run_seconds_total"
REFUSED = f'{TENANT}, code=~"RESOURCE_EXHAUSTED|PERMISSION_DENIED"'
FAULTY = f'{TENANT}, code=~"{FAULTS}"'
ALONE = Link(title="This tenant alone", url="/d/unlatch-tenants?var-tenant=${__data.fields.tenant}&${__url_time_range}")
NAME = "{{tenant}}"

_TOP = (
    figure(
        1,
        "Tenants that call",
        "How many tenants' calls ended of late. Beyond the first 100 of the file of tenants all others are one, "
        "`other`.",
        "short",
        f"count({rate(CALLS, TENANT, 'tenant')} > 0)",
        width=SIXTH,
    ),
    figure(
        2,
        "Calls",
        "Calls of these tenants that ended, of every status. If it has fallen, see which tenant's has, below.",
        "reqps",
        rate(CALLS, TENANT),
        width=SIXTH,
    ),
    figure(
        3,
        "Refused",
        "Share of calls that met a quota, a bound, or what their tenant may not (RESOURCE_EXHAUSTED, "
        "PERMISSION_DENIED). Which tenant, and of which status, is told below.",
        "percentunit",
        f"{rate(CALLS, REFUSED)} / {rate(CALLS, TENANT)}",
        limits=((0.01, "orange"), (0.1, "red")),
        width=SIXTH,
        none="none",
    ),
    figure(
        4,
        "Worst served",
        "The largest share of a tenant's calls that failed by our fault. One tenant alone: a kernel that only it "
        "calls; see the board of the mesh for that kernel.",
        "percentunit",
        f"max({rate(CALLS, FAULTY, 'tenant')} / {rate(CALLS, TENANT, 'tenant')})",
        limits=((0.001, "orange"), (0.01, "red")),
        width=SIXTH,
        none="none failed",
    ),
    figure(
        5,
        "Largest share",
        "Of all run time, what the tenant has that has most. It is no fault as long as nobody waits: when calls wait, "
        "weights decide.",
        "percentunit",
        f"max({rate(SECONDS, TENANT, 'tenant')}) / {rate(SECONDS, GATEWAY)}",
        width=SIXTH,
    ),
    figure(
        6,
        "Not let in",
        "Calls of nobody knows whom, of all tenants. The reasons are below: a token that is not renewed, keys that "
        "are old, or somebody who tries.",
        "reqps",
        rate("unlatch_unauthenticated_total", GATEWAY),
        limits=((1, "orange"), (100, "red")),
        width=SIXTH,
        none="none",
    ),
)

_USE = (
    lines(
        11,
        "Calls by tenant",
        "Who asks, and how often. A tenant that has grown tenfold is where load comes from: talk to it, or give it a "
        "quota (`calls_per_second`).",
        "reqps",
        Query(rate(CALLS, TENANT, "tenant"), NAME),
        width=HALF,
        stacked=True,
    ),
    lines(
        12,
        "Workers used by tenant",
        "Seconds of run that each tenant is charged, each second: how many workers it keeps busy. Quotas are in "
        "seconds of it a minute (`cpu_seconds_per_minute`).",
        "short",
        Query(rate(SECONDS, TENANT, "tenant"), NAME),
        width=HALF,
        stacked=True,
    ),
    lines(
        13,
        "Share of run time",
        "What each tenant has of all run time. While calls wait it follows the tenants' weights; if it does not, that "
        "tenant asks for less than its share.",
        "percentunit",
        Query(f"{rate(SECONDS, TENANT, 'tenant')} / ignoring (tenant) group_left () {rate(SECONDS, GATEWAY)}", NAME),
        width=HALF,
        most=1,
    ),
    lines(
        14,
        "Calls in flight by tenant",
        "Calls that have not ended. One tenant with nearly all of them: `calls_in_flight` in the file of tenants "
        "bounds it.",
        "short",
        Query(f"sum by (tenant) (unlatch_tenant_calls_in_flight{{{TENANT}}})", NAME),
        width=HALF,
    ),
)

_REFUSALS = (
    lines(
        21,
        "Refused by tenant and status",
        "RESOURCE_EXHAUSTED is a quota or a full mesh, its message says which; PERMISSION_DENIED a kernel or a "
        "priority that the tenant may not use. If it is right to have more, change the file of tenants: it is read "
        "again.",
        "reqps",
        Query(rate(CALLS, REFUSED, "tenant, code"), "{{tenant}} {{code}}"),
    ),
    lines(
        22,
        "Failed by our fault, by tenant",
        "Share of each tenant's calls. All of them: the fleet, see the board of the mesh. One: its kernels, or its "
        "deadlines.",
        "percentunit",
        Query(f"{rate(CALLS, FAULTY, 'tenant')} / {rate(CALLS, TENANT, 'tenant')}", NAME),
        limits=((0.001, "orange"), (0.01, "red")),
    ),
    lines(
        23,
        "Calls by status",
        "Of the tenants chosen above, each status that callers got. Red is our fault, yellow a quota or a bound, blue "
        "their own.",
        "reqps",
        Query(rate(CALLS, TENANT, "code"), "{{code}}"),
        coloured=colours.CODES,
        stacked=True,
    ),
    lines(
        24,
        "Not let in, by reason",
        "What to mend: a token that ended is its caller's to renew; a key that is not known is missing in "
        "`--token-keys`; no token at all is a caller that was never set up, or one who tries.",
        "reqps",
        Query(rate("unlatch_unauthenticated_total", GATEWAY, "reason"), "{{reason}}"),
        width=HALF,
    ),
    lines(
        25,
        "Mean run of a call",
        "Seconds of run that a tenant is charged for a call. It has grown: its inputs have, or it calls another "
        "kernel.",
        "s",
        Query(f"{rate(SECONDS, TENANT, 'tenant')} / {rate(CALLS, TENANT, 'tenant')}", NAME),
        width=HALF,
    ),
)

_TABLE = (
    rows(
        31,
        "Tenants",
        "One row a tenant, the most used first; a click shows that tenant alone. Failed is by our fault.",
        ("tenant",),
        Column(title="Workers used", expr=rate(SECONDS, TENANT, "tenant"), unit="short"),
        Column(title="Calls/s", expr=rate(CALLS, TENANT, "tenant"), unit="reqps"),
        Column(title="In flight", expr=f"sum by (tenant) (unlatch_tenant_calls_in_flight{{{TENANT}}})", unit="short"),
        Column(
            title="Refused",
            expr=f"{rate(CALLS, REFUSED, 'tenant')} / {rate(CALLS, TENANT, 'tenant')}",
            unit="percentunit",
            limits=((0.01, "orange"), (0.1, "red")),
        ),
        Column(
            title="Failed",
            expr=f"{rate(CALLS, FAULTY, 'tenant')} / {rate(CALLS, TENANT, 'tenant')}",
            unit="percentunit",
            limits=((0.001, "orange"), (0.01, "red")),
        ),
        link=ALONE,
    ),
)

BOARD = Board(
    uid="unlatch-tenants",
    says="Who asks for how much, who gets it, and who is refused.",
    variables=(
        Variable(name="namespace", title="Namespace", series="unlatch_calls_in_flight", label="namespace"),
        Variable(
            name="tenant", title="Tenant", series='unlatch_tenant_calls_total{namespace=~"$namespace"}', label="tenant"
        ),
    ),
    top=_TOP,
    rows={"What tenants use": _USE, "What they do not get": _REFUSALS, "Tenants": _TABLE},
)
