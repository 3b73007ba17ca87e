"""The board of tenants: what each one asks for, what it gets, and what is refused."""

from deploy.dashboards import colours
from deploy.dashboards.board import Board, Variable
from deploy.dashboards.panels import HALF, SIXTH, Column, Link, Query, figure, lines, rows
from deploy.dashboards.queries import FAULTS, rate

GATEWAY = 'component="gateway", namespace=~"$namespace"'
TENANT = f'{GATEWAY}, tenant=~"$tenant"'
CALLS, SECONDS = "unlatch_tenant_calls_total", "unlatch_tenant_run_seconds_total"
REFUSED = f'{TENANT}, code=~"RESOURCE_EXHAUSTED|PERMISSION_DENIED"'
FAULTY = f'{TENANT}, code=~"{FAULTS}"'
ALONE = Link(title="This tenant alone", url="/d/unlatch-tenants?var-tenant=${__data.fields.tenant}&${__url_time_range}")
NAME = "{{tenant}}"

_TOP = (
    figure(
        1,
        "Active tenants",
        "Number of tenants whose calls ended recently. Tenants after the first 100 of the tenants file count as one, "
        "`other`.",
        "short",
        f"count({rate(CALLS, TENANT, 'tenant')} > 0)",
        width=SIXTH,
    ),
    figure(
        2,
        "Calls",
        "Calls of these tenants that ended, with any status. If the rate fell, see below for which tenant.",
        "reqps",
        rate(CALLS, TENANT),
        width=SIXTH,
    ),
    figure(
        3,
        "Refused",
        "Share of calls that exceeded a quota or a limit, or that their tenant may not make (RESOURCE_EXHAUSTED, "
        "PERMISSION_DENIED). See below for tenants and statuses.",
        "percentunit",
        f"{rate(CALLS, REFUSED)} / {rate(CALLS, TENANT)}",
        limits=((0.01, "orange"), (0.1, "red")),
        width=SIXTH,
        none="none",
    ),
    figure(
        4,
        "Worst served",
        "The largest share of a tenant's calls that failed by a fault. If it is a single tenant, look on the board of "
        "the mesh for a kernel that only this tenant calls.",
        "percentunit",
        f"max({rate(CALLS, FAULTY, 'tenant')} / {rate(CALLS, TENANT, 'tenant')})",
        limits=((0.001, "orange"), (0.01, "red")),
        width=SIXTH,
        none="none failed",
    ),
    figure(
        5,
        "Largest share",
        "Share of all run time that the largest tenant has. It does no harm while no calls wait; when calls wait, "
        "weights decide.",
        "percentunit",
        f"max({rate(SECONDS, TENANT, 'tenant')}) / {rate(SECONDS, GATEWAY)}",
        width=SIXTH,
    ),
    figure(
        6,
        "Not let in",
        "Calls whose caller could not be authenticated. See below for reasons: a token that is not renewed, an old "
        "file of keys, or an attack.",
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
        "Calls of each tenant. If a tenant has grown tenfold, it is the source of load: talk to its owner, or set a "
        "quota (`calls_per_second`).",
        "reqps",
        Query(rate(CALLS, TENANT, "tenant"), NAME),
        width=HALF,
        stacked=True,
    ),
    lines(
        12,
        "Workers used by tenant",
        "Run seconds that each tenant is charged, each second: the number of workers that it keeps busy. Quotas are "
        "in run seconds a minute (`cpu_seconds_per_minute`).",
        "short",
        Query(rate(SECONDS, TENANT, "tenant"), NAME),
        width=HALF,
        stacked=True,
    ),
    lines(
        13,
        "Share of run time",
        "Each tenant's share of all run time. While calls wait it follows the tenants' weights; a tenant below its "
        "weight asks for less than its share.",
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
        "priority that the tenant may not use. To allow more, change the tenants file, which is then "
        "read again.",
        "reqps",
        Query(rate(CALLS, REFUSED, "tenant, code"), "{{tenant}} {{code}}"),
    ),
    lines(
        22,
        "Failed by a fault, by tenant",
        "Share of each tenant's calls. If all tenants fail, see the board of the mesh for the fleet; if one does, look "
        "at its kernels or its deadlines.",
        "percentunit",
        Query(f"{rate(CALLS, FAULTY, 'tenant')} / {rate(CALLS, TENANT, 'tenant')}", NAME),
        limits=((0.001, "orange"), (0.01, "red")),
    ),
    lines(
        23,
        "Calls by status",
        "Statuses of calls of the chosen tenants. Red is a fault of Unlatch or of a kernel, yellow a quota or a limit, "
        "blue an error of the caller.",
        "reqps",
        Query(rate(CALLS, TENANT, "code"), "{{code}}"),
        coloured=colours.CODES,
        stacked=True,
    ),
    lines(
        24,
        "Not let in, by reason",
        "What to fix: the caller must renew an expired token; an unknown key is missing in `--token-keys`; without any "
        "token, a caller was never set up, or it is an attack.",
        "reqps",
        Query(rate("unlatch_unauthenticated_total", GATEWAY, "reason"), "{{reason}}"),
        width=HALF,
    ),
    lines(
        25,
        "Mean run of a call",
        "Run seconds that a tenant is charged for a call. If it has grown, inputs have grown, or the tenant calls "
        "another kernel.",
        "s",
        Query(f"{rate(SECONDS, TENANT, 'tenant')} / {rate(CALLS, TENANT, 'tenant')}", NAME),
        width=HALF,
    ),
)

_TABLE = (
    rows(
        31,
        "Tenants",
        "One row for each tenant, the busiest first; click to show that tenant only. Failed counts faults.",
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
    says="What each tenant asks for, what it gets, and what is refused.",
    variables=(
        Variable(name="namespace", title="Namespace", series="unlatch_calls_in_flight", label="namespace"),
        Variable(
            name="tenant", title="Tenant", series='unlatch_tenant_calls_total{namespace=~"$namespace"}', label="tenant"
        ),
    ),
    top=_TOP,
    rows={"What tenants use": _USE, "What they do not get": _REFUSALS, "Tenants": _TABLE},
)
