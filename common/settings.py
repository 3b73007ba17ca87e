"""What both services' settings have in common: a flag --a-name or a variable UNLATCH_A_NAME each, checked at birth."""

import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, NoDecode, SettingsConfigDict

from common.errors import near

MiB = 1024 * 1024


class Settings(BaseSettings):
    """Frozen; does nothing."""

    model_config = SettingsConfigDict(
        env_prefix="UNLATCH_",
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
    )

    listen: str
    metrics_listen: str
    health_listen: str
    drain_seconds: float = Field(20.0, ge=0, description="How long calls in flight may take to end after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged")


def separated(value: object) -> object:
    """A list as flags and variables give it: a,b,c. (--replicas a --replicas b works too.)"""
    if isinstance(value, str):
        return tuple(filter(None, value.split(",")))
    if isinstance(value, list | tuple):
        return tuple(part for item in value for part in str(item).split(",") if part)
    return value


def _weights(value: object) -> object:
    parts = separated(value)
    if not isinstance(parts, tuple):
        return value
    return {name: weight for name, _, weight in (part.rpartition("=") for part in parts)}


def _positive(weights: dict[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not name or not 0 < weight < math.inf:
            raise ValueError(f"a weight is name=number, above 0, not {name}={weight:g}")
    return weights


# Both ends of a lane order calls by them.
TenantWeights = Annotated[dict[str, float], NoDecode, BeforeValidator(_weights), AfterValidator(_positive)]

S = TypeVar("S", bound=Settings)


def parse(kind: type[S], program: str, arguments: Sequence[str]) -> S:
    """Settings from flags, then the environment, then defaults. Exits with code 2 and a message for wrong ones."""
    _refuse_unknown(kind, program, arguments)
    try:
        return CliApp.run(kind, cli_args=list(arguments), cli_settings_source=_source(kind, program))
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            print(f"{program}: {flag}: {problem['msg']}", file=sys.stderr)
        raise SystemExit(2) from None


def _refuse_unknown(kind: type[S], program: str, arguments: Sequence[str]) -> None:
    """Argparse would refuse it too, but knows no near ones. It lets a flag be shortened: that is left to it."""
    known = ["--help", *(f"--{name.replace('_', '-')}" for name in kind.model_fields)]
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        if not any(name.startswith(flag.replace("--no-", "--")) for name in known):
            print(f"{program}: there is no option {flag}{near(flag, known)}", file=sys.stderr)
            raise SystemExit(2)


def _source(kind: type[S], program: str) -> CliSettingsSource[Any]:
    return CliSettingsSource(kind, cli_prog_name=program, cli_parse_args=False)
