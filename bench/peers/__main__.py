"""`make bench-peers`: the same calls to Unlatch and to servers of other projects, by turns.

Each peer is installed in an environment of its own under .peers, from the package index, and started alone
beside `unlatch serve`. A peer that cannot be installed or started is left out, and the table says so. Exit codes: 1
calls failed, 2 the bench could not measure.
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median

from bench.load.load import Load, calls_for, require_h2load
from bench.peers.peers import PEERS, Peer, loader, start
from bench.processes import OUT, BenchError
from bench.subjects import oip, subjects

CASES = (("identity_1k", 1), ("identity_1k", 32), ("identity_1m", 32), ("spin10", 32))
Loader = Callable[[int, int], Load]
HEADINGS = ("1 KiB, 1 caller", "1 KiB, 32 in flight", "1 MiB, 32 in flight", "10 ms of CPU, 32 in flight")


@dataclass(slots=True, kw_only=True)
class Compared:
    """The rates of one peer and of Unlatch in one case, round by round, and the peer's CPU microseconds a call."""

    case: str
    theirs: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    cpu_us: list[tuple[float, float]] = field(default_factory=list)
    failed_calls: int = 0

    @property
    def ratio(self) -> float:
        """Unlatch's rate over the peer's: the median of the rounds."""
        return median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))


def compare(
    peer: Peer, ours: subjects.Subject, works: dict[str, oip.Work], rounds: int, seconds: float
) -> Iterator[Compared]:
    """Start a peer and measure each case, the peer and Unlatch by turns. Raises BenchError if the peer does not run."""
    with ExitStack() as stack:
        theirs = start(stack, peer, [works[name] for name in dict.fromkeys(name for name, _ in CASES)])
        for name, in_flight in CASES:
            work = works[name]
            yield _case(
                Compared(case=f"{name}_c{in_flight}"),
                [(theirs, loader(theirs, work, http=peer.http)), (ours, loader(ours, work, http=False))],
                in_flight,
                rounds,
                seconds,
            )


def _case(
    found: Compared, pair: Sequence[tuple[subjects.Subject, Loader]], in_flight: int, rounds: int, seconds: float
) -> Compared:
    # A first round warms up, and shows how many calls fill the time.
    rates = [_loaded(*one, 8 * in_flight + 64, in_flight)[0].calls_per_second for one in pair]
    for _ in range(rounds):
        both = [
            _loaded(*one, calls_for(seconds, rate, in_flight), in_flight) for one, rate in zip(pair, rates, strict=True)
        ]
        rates = [loaded.calls_per_second for loaded, _ in both]
        found.theirs.append(rates[0])
        found.ours.append(rates[1])
        found.cpu_us.append((both[0][1], both[1][1]))
        found.failed_calls += sum(loaded.failed_calls for loaded, _ in both)
    return found


def _loaded(subject: subjects.Subject, run: Loader, calls: int, in_flight: int) -> tuple[Load, float]:
    """Put a subject under load; returns the results, and the CPU microseconds of a call of all its processes."""
    before = sum(subject.cpu().values())
    loaded = run(calls, in_flight)
    return loaded, (sum(subject.cpu().values()) - before) / calls * 1e6


def table(found: dict[str, list[Compared]], left_out: dict[str, str]) -> str:
    """Return the results as a Markdown table: the peer's calls a second, and how many times Unlatch's rate is that."""
    lines = ["| | " + " | ".join(HEADINGS) + " |", "|---|" + "---|" * len(HEADINGS)]
    for name, cases in found.items():
        cells = [f"{median(case.theirs):,.0f} ({case.ratio:.2f})" for case in cases]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if found:
        columns = zip(*found.values(), strict=True)
        ours = [median([rate for case in column for rate in case.ours]) for column in columns]
        lines.append("| Unlatch | " + " | ".join(f"{rate:,.0f}" for rate in ours) + " |")
    lines += [f"| {name} | did not run: {why} |" for name, why in left_out.items()]
    return "\n".join(lines)


def measure(names: Collection[str], rounds: int, seconds: float) -> tuple[dict[str, list[Compared]], dict[str, str]]:
    """Measure the named peers, or all; returns the results, and why peers were left out."""
    works = oip.works()
    found: dict[str, list[Compared]] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        ours = subjects.start(stack, "unlatch")
        subjects.await_ready(ours, works["identity_1k"])
        for peer in PEERS:
            if names and peer.name not in names:
                continue
            try:
                found[peer.name] = list(compare(peer, ours, works, rounds, seconds))
            except BenchError as error:
                print(error, file=sys.stderr)
                left_out[peer.name] = str(error).splitlines()[0]
    return found, left_out


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=[peer.name for peer in PEERS], help="measure only this peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="the length of each stretch of load")
    args = parser.parse_args()
    try:
        require_h2load()
        found, left_out = measure(args.only or (), args.rounds, args.seconds)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(table(found, left_out))
    path = OUT / "peers.json"
    path.write_text(json.dumps({name: [asdict(case) for case in cases] for name, cases in found.items()}, indent=1))
    print(f"written: {path}")
    return 1 if any(case.failed_calls for cases in found.values() for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
