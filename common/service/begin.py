"""The settings of a service, its log, and what can be checked before anything is loaded."""

from collections.abc import MutableMapping, Sequence
from typing import TypeVar

import structlog

from unlatch.common.net.ports import BindError, refuse_taken
from unlatch.common.net.settings import Settings, flag, parse, refused, unknown_variables, variables_without_effect
from unlatch.common.service.early import die_with_parent
from unlatch.common.telemetry.log import configure

S = TypeVar("S", bound=Settings)
log = structlog.get_logger()


def begin(
    kind: type[S],
    program: str,
    process: str,
    arguments: Sequence[str],
    environment: MutableMapping[str, str],
    *,
    ports_held: bool = False,
) -> S:
    """Read the settings and configure the log. Exits with code 2 for wrong settings, and for addresses in use.

    Addresses are not checked if they are held for this process by its supervisor.
    """
    if supervisor := environment.pop("UNLATCH_SUPERVISOR", ""):
        die_with_parent(int(supervisor))
    settings = parse(kind, program, arguments, environment)
    configure(process, settings.log_level)
    for event, variables in (
        ("unknown variable", unknown_variables(environment)),
        ("variable without effect", variables_without_effect(kind, environment)),
    ):
        for name, message in variables.items():
            if settings.strict:
                raise refused(program, [message])
            log.warning(event, message=message)
            # The processes that we start need not warn again.
            del environment[name]
    listens = () if ports_held else (name for name in kind.model_fields if name.endswith("listen"))
    try:
        refuse_taken({flag(name): getattr(settings, name) for name in listens})
    except BindError as error:
        raise refused(program, [str(error)]) from None
    return settings
