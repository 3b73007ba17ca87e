"""The whole protocol as NVIDIA's client uses it: tests/mesh/clients/triton.py runs in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.support.mesh import KERNELS, ROOT, Mesh
from unlatch.compute.worker.catalogue import load


def seen(mesh: Mesh, scenario: str) -> Any:
    """The output of tritonclient's process."""
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "tests/mesh/clients/triton.py"), mesh.gateway]
    isolated = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UNLATCH"))}
    ran = subprocess.run(
        [*command, scenario], check=False, capture_output=True, text=True, env=isolated, cwd="/", timeout=50
    )
    assert ran.returncode == 0, f"{ran.stderr}\n{mesh}"
    return json.loads(ran.stdout)


def test_metadata(mesh: Mesh) -> None:
    """Server and kernels have names, versions and tensors. A complex tensor is FP64 with one more axis."""
    told = seen(mesh, "metadata")
    assert (told["live"], told["ready"], told["models"]) == (True, True, [True, True, False, False])
    assert told["server"]["name"] == "unlatch"
    assert "statistics" in told["server"]["extensions"]
    assert (told["summarise"]["name"], told["summarise"]["versions"]) == ("summarise", ["1"])
    assert told["summarise"]["inputs"] == [{"name": "x", "datatype": "FP64", "shape": ["-1"]}]
    assert [output["name"] for output in told["summarise"]["outputs"]] == ["mean", "ranks"]
    assert told["conjugate"]["inputs"] == [{"name": "z", "datatype": "FP64", "shape": ["-1", "2"]}]
    assert told["halve"]["inputs"][0]["datatype"].startswith("FP")
    status, message = told["unknown"]
    assert status == "StatusCode.NOT_FOUND"
    assert "halve" in message


def test_config(mesh: Mesh) -> None:
    """A kernel's configuration has its name, its tensors and their types, and no batching."""
    told = seen(mesh, "config")
    config = told["summarise"]["config"]
    assert config["name"] == "summarise"
    assert int(config.get("max_batch_size", 0)) == 0
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP64", "dims": ["-1"]}]
    assert [(tensor["name"], tensor["data_type"]) for tensor in config["output"]] == [
        ("mean", "TYPE_FP64"),
        ("ranks", "TYPE_INT64"),
    ]
    assert told["fixed_axes"]["config"]["input"][0]["dims"] == ["-1", "-1", "3"]
    assert told["unknown"][0] == "StatusCode.NOT_FOUND"


def test_config_of_a_kernel_whose_calls_run_as_one(mesh: Mesh) -> None:
    """The configuration has the largest number of rows, and the axes without that of the rows."""
    config = seen(mesh, "config")["turned"]["config"]
    assert config["max_batch_size"] == 32
    assert config["dynamic_batching"] == {}
    assert [tensor["dims"] for tensor in config["input"]] == [["3"], ["-1", "2"]]
    assert [tensor["dims"] for tensor in config["output"]] == [["3"], ["-1", "2"]]
    assert "dynamic_batching" not in seen(mesh, "config")["summarise"]["config"]


def test_statistics_of_calls_that_run_as_one(mesh: Mesh) -> None:
    """Inferences count successful calls, and executions count runs, by their sizes."""
    told = seen(mesh, "batches")
    assert told["failed"] == 1
    executions, inferences = (
        int(told["after"][name]) - int(told["before"].get(name, 0)) for name in ("execution_count", "inference_count")
    )
    assert inferences == 59
    assert 1 <= executions <= inferences
    sizes = told["after"]["batch_stats"]
    runs = [(int(size["batch_size"]), int(size["compute_infer"]["count"])) for size in sizes]
    assert sum(count for _, count in runs) == int(told["after"]["execution_count"])
    assert sum(size * count for size, count in runs) == int(told["after"]["inference_count"])
    assert all(1 <= size <= 32 for size, _ in runs)


def test_repository_index(mesh: Mesh) -> None:
    """Every kernel, built-in or the tests', is listed once with its version, and is ready."""
    listed = seen(mesh, "index")["models"]
    assert sorted(model["name"] for model in listed) == sorted(load((str(KERNELS),)).specs)
    assert {(model["version"], model["state"]) for model in listed} == {("1", "READY")}


def test_statistics(mesh: Mesh) -> None:
    """Counts rise by the calls that were made, and times by what the calls took."""
    told = seen(mesh, "statistics")

    def risen(kernel: tuple[str, str], name: str, unit: str = "count") -> int:
        before, after = ((told[when]["inference_stats"]).get(name, {}) for when in kernel)
        return int(after.get(unit, 0)) - int(before.get(unit, 0))

    sleeps, refusing = ("before", "after"), ("refusing_before", "refusing_after")
    assert (risen(sleeps, "success"), risen(sleeps, "fail")) == (7, 0)
    assert (risen(refusing, "success"), risen(refusing, "fail")) == (0, 3)
    assert risen(sleeps, "queue") == risen(sleeps, "compute_infer") == 7
    slept, whole = risen(sleeps, "compute_infer", "ns"), risen(sleeps, "success", "ns")
    assert 7 * 10_000_000 <= slept <= whole
    assert sorted(told["every"]) == sorted(load((str(KERNELS),)).specs)
    assert told["unknown"][0] == "StatusCode.NOT_FOUND"


def test_async_infer(mesh: Mesh) -> None:
    """Of 200 calls in flight each gets its own answer."""
    assert seen(mesh, "async_infer") == {"wrong": [], "answered": 200}


def test_stream_survives_a_bad_request(mesh: Mesh) -> None:
    """Of 50 requests one is wrong: 49 results come in order, one error says why, and the stream goes on."""
    told = seen(mesh, "stream")
    assert told["right"] == [number for number in range(50) if number != 25]
    assert told["wrong"] == []
    (error,) = told["errors"]
    assert "x: wanted float64" in error
    assert (told["after"], told["more"]) == ("after", False)


def test_streams_one_after_another(mesh: Mesh) -> None:
    """A stream ends when its client closes it, and the next one works as well."""
    assert seen(mesh, "two_streams") == ["first", "second"]


def test_stream_says_which_request_failed_and_why(mesh: Mesh) -> None:
    """Errors come in order, each with the name of the status before the text."""
    told = seen(mesh, "stream_failures")
    assert [number for number, _ in told] == ["no such kernel", "no array", "kernel's"]
    assert [text.partition(":")[0] for _, text in told] == ["NOT_FOUND", "INVALID_ARGUMENT", "INVALID_ARGUMENT"]
    assert "halve" in told[0][1]
    assert "x" in told[1][1]
    assert told[2][1] == "INVALID_ARGUMENT: so it is"


def test_cancelled_stream(mesh: Mesh) -> None:
    """A client that closes a stream gets CANCELLED and no more answers. The next call is answered."""
    assert seen(mesh, "cancel_stream") == {"status": "StatusCode.CANCELLED", "more": False, "back": [0.5]}


def test_cancel(mesh: Mesh) -> None:
    """A caller that cancels gets CANCELLED, and the next call is answered."""
    assert seen(mesh, "cancel") == {"result": False, "status": "StatusCode.CANCELLED", "back": [0.5]}


def test_timeout(mesh: Mesh) -> None:
    """A caller without time left gets DEADLINE_EXCEEDED, and the next call is answered."""
    told = seen(mesh, "timeout")
    assert told["blocking"][0] == told["asynchronous"] == "StatusCode.DEADLINE_EXCEEDED"
    assert told["back"] == [0.5]


def test_request_parameters(mesh: Mesh) -> None:
    """`priority` and `timeout` mean what they mean in Triton; the rest is UNIMPLEMENTED, and the error names it."""
    told = seen(mesh, "parameters")
    assert told["priority"] == [[0.5]] * 5
    assert told["in time"] == [0.5]
    assert told["too late"] == ["StatusCode.DEADLINE_EXCEEDED", "kernel sleeps did not answer within 0.05 s"]
    for name in ("sequence", "named sequence"):
        assert told[name][0] == "StatusCode.UNIMPLEMENTED", told[name]
    assert told["empty final response"].startswith("UNIMPLEMENTED: triton_enable_empty_final_response: ")
    assert told["sequence"][1].startswith("sequence_")
    assert told["named sequence"][1].startswith("sequence_id: ")


def test_every_datatype_and_odd_shape(mesh: Mesh) -> None:
    """Twelve datatypes and BYTES, 0-d, empty and of rank 8, extremes, NaN and empty strings come back unchanged."""
    assert seen(mesh, "datatypes") == []


def test_complex_and_times(mesh: Mesh) -> None:
    """A dtype without a datatype of its own travels in another's, and `np_dtype` names it both ways."""
    assert seen(mesh, "carried") == []


def test_requested_outputs(mesh: Mesh) -> None:
    """The named outputs are returned, or all if none is named. An unknown one is refused by name."""
    told = seen(mesh, "outputs")
    both = {"mean": 2.0, "ranks": [2, 0, 1]}
    assert told["none named"] == told["both"] == both
    assert (told["first"], told["second"]) == ({"mean": 2.0}, {"ranks": [2, 0, 1]})
    status, message = told["unknown"]
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "median" in message


def test_typed_contents(mesh: Mesh) -> None:
    """Typed contents work as bytes do. Unfit contents, contents beside bytes, and BF16 are refused."""
    told = seen(mesh, "typed_contents")
    assert told.pop("wrong") == []
    assert {status for status, _ in told.values()} == {"StatusCode.INVALID_ARGUMENT"}
    assert all("x" in message for name, (_, message) in told.items() if name != "both ways")
    assert all("BF16" in told[name][1] for name in ("BF16", "BF16 as bytes"))


def test_ids_come_back(mesh: Mesh) -> None:
    """Any id comes back unchanged."""
    told = seen(mesh, "ids")
    assert told["back"] == told["sent"]


def test_no_shared_memory(mesh: Mesh) -> None:
    """Requests for the state of shared memory, or to leave it, are answered. A region cannot be registered."""
    told = seen(mesh, "shared_memory")
    assert (told["system"], told["cuda"]) == ({}, {})
    assert told["unregister"][0] == "OK"
    assert told["register"][0] == "StatusCode.UNIMPLEMENTED"


def test_keepalive_pings_every_second(mesh: Mesh) -> None:
    """A long call is answered, and so is a call on the same connection after a rest in which pings went on."""
    told = seen(mesh, "keepalive")
    assert told == {"errors": ["None", "None"], "back": [[0.5], [0.5]]}


def test_every_form_of_a_signature(mesh: Mesh) -> None:
    """An input may be left out, a list is a parameter of JSON, and a choice and texts are what they are."""
    told = seen(mesh, "forms")
    assert told["left out"] == ["[1.0]", "None", "[1.0]"]
    assert told["lists"][:3] == ["[1.0, 0.5]", "(1, 2)", "('ß',)"]
    assert told["choices"][:2] == ["'cubic'", "2"]
    assert told["wrong"] == ["StatusCode.INVALID_ARGUMENT", "kind: wanted one of 'linear', 'cubic', got 'square'"]
    assert told["texts"] == ["GRÖSSE", ""]
    assert told["optional"] == [False, True, True]
