"""Labels of metrics: every value is a code, or a name from a short list of labels whose values are names."""

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.mesh.faults.conftest import FAULT_KERNELS, restarts
from tests.mesh.faults.test_deaths import DEATHS
from tests.mesh.security.test_tokens import BAD
from tests.support.doors import Oip, vector
from tests.support.issuer import Issuer, bearer
from tests.support.mesh import MESHES, ROOT, Mesh
from tests.support.watching import Scrape, wait_until
from unlatch.common.errors import NAMES

CODE = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
# The allowed values of each label. A label that is not listed here is a mistake.
GRAMMAR = {
    **dict.fromkeys(("grpc_type", "kind", "mode", "outcome", "place", "reason", "stage"), CODE),
    "component": "gateway|compute",
    "process": r"gateway|dispatcher|unit|forkserver|worker-\d+",
    "role": r"[a-z]+(-[a-z]+)*",  # a flag's name
    **dict.fromkeys(("code", "grpc_code"), "|".join(NAMES.values())),
    "worker": r"\d+",
    "le": r"\d+\.\d+|\+Inf",
    # Names that users or the platform choose.
    **dict.fromkeys(("file", "grpc_method", "grpc_service", "kernel", "replica", "tenant"), ".+"),
}
WAYS = ("sigkill", "sigsegv", "exit", "real-time signal", "garbage", "other call")


@pytest.fixture(scope="module", params=MESHES)
def used(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh that has answered calls, refused some, and lost workers: in two processes, or in one."""
    directory: Path = tmp_path_factory.mktemp("labels")
    issuer = Issuer(directory)
    dispatcher = ["--kernels", str(FAULT_KERNELS)]
    with MESHES[request.param](directory, dispatcher=dispatcher, gateway=issuer.flags) as mesh:
        with grpc.insecure_channel(mesh.gateway) as channel:
            known = Oip(channel, bearer(issuer.token()))
            assert known.serves()
            assert known.refusal(vector("nowhere", 1.0)).code == "NOT_FOUND"
            for number, how in enumerate(WAYS):
                assert known.refusal(vector("dies", float(number), how=how)).code == "ABORTED"
                wait_until(lambda: restarts(mesh) == number + 1, "the worker is replaced")  # noqa: B023 (called here)
            for make, _ in BAD.values():
                said = make(issuer)
                metadata = (("authorization", said),) if said is not None else ()
                assert Oip(channel, metadata).refusal(vector("identity", 1.0)).code == "UNAUTHENTICATED"
        yield mesh


def documented(metric: str) -> set[str]:
    """Return the reasons of a metric that docs/operations/metrics.md lists."""
    _, _, chapter = (ROOT / "docs" / "operations" / "metrics.md").read_text().partition("\n### Reasons\n")
    _, _, listed = chapter.partition(f"\nThe reasons of `{metric}`")
    first_column = re.findall(
        r"^\| (`[^|]+) \|", listed.partition("\nThe reasons of `")[0].partition("\n#")[0], re.MULTILINE
    )
    return {code.group(1) for cell in first_column for code in re.finditer(rf"`({CODE})`", cell)}


def test_label_values_are_codes_or_names(used: Mesh) -> None:
    """No service exports a label value that is a sentence, or a label that is not listed above."""
    wrong = {
        (name, label, value)
        for address in (used.gateway_metrics, used.dispatcher_metrics)
        for name, labels in Scrape(address).samples
        for label, value in labels
        if re.fullmatch(GRAMMAR.get(label, "(?!)"), value) is None
    }
    assert wrong == set()


def test_reasons_are_counted_and_listed(used: Mesh) -> None:
    """Each event is counted under its reason, and the docs explain every reason."""
    lost = {labels["reason"] for labels in Scrape(used.dispatcher_metrics).labels("unlatch_worker_restarts_total")}
    assert lost == {DEATHS[how] for how in WAYS}
    refused = {labels["reason"] for labels in Scrape(used.gateway_metrics).labels("unlatch_unauthenticated_total")}
    assert documented("unlatch_worker_restarts_total") >= lost
    not_tried = {"repeated_authorization", "missing_key_id", "unnamed_certificate"}
    assert documented("unlatch_unauthenticated_total") == refused | not_tried


def test_log_has_reason_and_message(used: Mesh) -> None:
    """A worker's end is logged with its reason, a code, and with a message that says the same as a sentence."""
    ended = [entry for entry in used.dispatcher_service.entries if entry["event"] == "worker ended"]
    assert [entry["reason"] for entry in ended] == [DEATHS[how] for how in WAYS]
    assert all(re.fullmatch(CODE, entry["reason"]) and " " in entry["message"] for entry in ended)
    process = "unit" if used.dispatcher_service is used.gateway_service else "dispatcher"
    assert {entry["process"] for entry in used.dispatcher_service.entries} == {process}
