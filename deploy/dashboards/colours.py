"""Colours by series name, so that a thing has the same colour on every board."""

from collections.abc import Mapping

# A regular expression for a series' name -> its colour, or "shades of" it for many series.
Colours = Mapping[str, str]
_MANY = "shades of "

ROLES: Colours = {
    "gateway": "blue",
    "dispatcher": "purple",
    "forkserver": "#808080",
    "worker-": f"{_MANY}orange",
}
CODES: Colours = {
    "^OK$": "green",
    "ABORTED|INTERNAL|UNAVAILABLE|UNKNOWN": f"{_MANY}red",
    "DEADLINE_EXCEEDED": "dark-orange",
    "RESOURCE_EXHAUSTED": "yellow",
    "INVALID_ARGUMENT|NOT_FOUND|FAILED_PRECONDITION": f"{_MANY}blue",
    "UNAUTHENTICATED|PERMISSION_DENIED": f"{_MANY}purple",
    "CANCELLED": "#808080",
}
STAGES: Colours = {"transfer": "blue", "queue": "orange", "run": "green", "reply": "purple"}
QUANTILES: Colours = {"^p50$": "light-green", "^p90$": "yellow", "^p99$": "red"}
STATES: Colours = {
    "on a core": "green",
    "waits for a core": "red",
    "waits for something else": "orange",
    "idle": "#808080",
}


def overrides(colours: Colours) -> list[tuple[str, dict[str, str]]]:
    """Grafana's matchers (`/…/`), with the colours in Grafana's form."""
    return [
        (
            f"/{pattern}/",
            {"mode": "shades", "fixedColor": colour.removeprefix(_MANY)}
            if colour.startswith(_MANY)
            else {"mode": "fixed", "fixedColor": colour},
        )
        for pattern, colour in colours.items()
    ]
