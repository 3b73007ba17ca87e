"""Files of replicas' addresses: what a line may be, and what stays while a file is missing, empty or wrong."""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.support.watching import until
from unlatch.common.net.settings import parse
from unlatch.gateway.fleet.discovery import AddressFile, Discovery, by_tenant
from unlatch.gateway.settings import GatewaySettings


async def loaded(path: Path) -> AddressFile:
    """A file, read for the first time."""
    file = AddressFile(str(path))
    await file.load()
    return file


async def written(path: Path, content: bytes | str) -> AddressFile:
    """A file with this content, read for the first time."""
    await asyncio.to_thread(path.write_bytes, content if isinstance(content, bytes) else content.encode())
    return await loaded(path)


@pytest.mark.parametrize(
    ("content", "addresses"),
    [
        ("10.0.0.1:8011\n10.0.0.2:8011\n", ["10.0.0.1:8011", "10.0.0.2:8011"]),
        ("node-17.cluster:8011", ["node-17.cluster:8011"]),
        ("# two racks\n\n  \t\none:1 # the first\n\ttwo:2\t# the second\n#three:3\n", ["one:1", "two:2"]),
        ("[fd00::1]:8011\nunix:/run/a.sock\nunix:/run/a#b\n", ["[fd00::1]:8011", "unix:/run/a.sock", "unix:/run/a#b"]),
        ("one:1\ntwo:2\none:1\n one:1 \n", ["one:1", "two:2"]),
        (b"\xef\xbb\xbfone:1\r\ntwo:2\r\n", ["one:1", "two:2"]),
    ],
    ids=["lines", "no newline at the end", "comments and blank lines", "kinds", "duplicates", "from Windows"],
)
async def test_each_line_is_an_address(content: bytes | str, addresses: list[str], tmp_path: Path) -> None:
    """Comments and blank lines count for nothing, and an address that is there twice counts once."""
    with capture_logs() as told:
        assert (await written(tmp_path / "replicas", content)).addresses == addresses
    assert told == []


@pytest.mark.parametrize(
    "line",
    [
        b"10.0.0.1",
        b"10.0.0.1:",
        b":8011",
        b"10.0.0.1:0",
        b"10.0.0.1:99999",
        b"10.0.0.1:80a",
        b"one:1,two:2",
        b"one:1 two:2",
        b"one\ttwo:2",
        b"fd00::1:8011",
        b"dns:///replicas:8011",
        b"file:/other",
        b"tenant=one:1",
        b"unix:",
        b"http://one:8011",
        b"\xff\xfe:8011",
        b"unix:/\xff",
        b"o\x00ne:8011",
        b"one" * 10_000,
    ],
    ids=lambda line: repr(line[:16]),
)
async def test_wrong_line_is_named_and_the_others_hold(line: bytes, tmp_path: Path) -> None:
    """The log has the file, the line's number and what was wanted."""
    path = tmp_path / "replicas"
    with capture_logs() as told:
        file = await written(path, b"# racks\none:1\n" + line + b"\ntwo:2\n")
    assert file.addresses == ["one:1", "two:2"]
    (entry,) = told
    assert (entry["event"], entry["path"], entry["line"]) == ("line not used, other lines are", str(path), 3)
    assert "wanted" in entry["message"]
    assert len(entry["message"]) <= 200


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\n# none\n", b"one\n", b"one:1\n" * 200_000],
    ids=["missing", "empty", "comments", "wrong", "too large"],
)
async def test_file_without_an_address_keeps_the_known_ones(content: bytes | None, tmp_path: Path) -> None:
    """An editor may empty or remove a file for a moment. The log reports it once, and the next good content counts."""
    path = tmp_path / "replicas"
    file = await written(path, "one:1\ntwo:2\n")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with capture_logs() as told:
        for _ in range(3):
            await file.look()
    assert file.addresses == ["one:1", "two:2"]
    assert [entry["event"] for entry in told].count("file not replaced, old content stays") == 1
    path.write_text("three:3\n")
    await file.look()
    assert file.addresses == ["three:3"]


async def test_file_that_is_replaced_by_its_new_version_is_read(tmp_path: Path) -> None:
    """A rename over the file, and another target of a link to it, count as changes."""
    path, link, new = tmp_path / "replicas", tmp_path / "link", tmp_path / "new"
    path.write_text("one:1\n")
    link.symlink_to(path)
    file = await loaded(link)
    new.write_text("two:2\n")
    os.replace(new, path)
    await file.look()
    assert file.addresses == ["two:2"]
    new.write_text("six:6\n")
    (tmp_path / "other link").symlink_to(new)
    os.replace(tmp_path / "other link", link)
    await file.look()
    assert file.addresses == ["six:6"]


async def test_file_may_be_missing_at_the_start(tmp_path: Path) -> None:
    """A launcher that starts after the gateway writes the file later. Until then the log names the file."""
    path = tmp_path / "replicas"
    file = AddressFile(str(path))
    with capture_logs() as told:
        await file.load()
        await file.look()
    assert [(entry["event"], entry["message"]) for entry in told] == [
        ("file has no replicas yet", f"--replicas {path}: No such file or directory")
    ]
    path.write_text("one:1\n")
    await file.look()
    assert file.addresses == ["one:1"]


async def test_files_stand_beside_addresses_and_other_files(tmp_path: Path) -> None:
    """The fleet is the union of all targets, and follows each file within a look or two."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("one:1\ntwo:2\n")
    told: list[list[str]] = []

    def tell(addresses: Sequence[str]) -> None:
        told.append(list(addresses))

    discovery = Discovery(["two:2", f"file:{first}", f"file:{second}"], 60.0, 64, name="", bound=True)
    running = asyncio.ensure_future(discovery.run(tell))
    try:
        await until(lambda: told == [["two:2", "one:1"]], "the first file is read")
        second.write_text("three:3\n")
        await until(lambda: told[-1] == ["two:2", "one:1", "three:3"], "the second file is there")
        first.write_text("four:4\n")
        await until(lambda: told[-1] == ["two:2", "four:4", "three:3"], "the first file has changed")
        assert len(told) == 3
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def test_tenant_may_have_a_file_of_its_own() -> None:
    """A sign of equality in a file's name is none."""
    assert by_tenant(["file:/a=b", "a=file:/c=d"]) == {"": ("file:/a=b",), "a": ("file:/c=d",)}


@pytest.mark.parametrize(
    "target", ["one", "one:0", "one:1:2", "unix:", "file:", "fil:/replicas", "dns//one:1", "http://one:8011"]
)
def test_wrong_target_is_a_wrong_setting(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A target that is none is refused at the start. It would never have a lane."""
    with pytest.raises(SystemExit):
        parse(GatewaySettings, "unlatch gateway", ["--replicas", f"one:1,{target}"], {})
    assert "unlatch gateway: --replicas" in (shown := capsys.readouterr().err)
    assert "wanted" in shown


async def test_pipe_holds_up_no_other_address(tmp_path: Path) -> None:
    """A pipe in place of a file is named in the log. Other addresses are known at once, and the file when it comes."""
    path, told = tmp_path / "replicas", list[list[str]]()
    os.mkfifo(path)
    discovery = Discovery(["one:1", f"file:{path}"], 0.05, 64, name="", bound=True)
    with capture_logs() as log:
        running = asyncio.create_task(discovery.run(lambda addresses: told.append(list(addresses))))
        await until(lambda: told, "the address is known")
        assert [entry["message"] for entry in log] == [f"--replicas {path}: not a regular file"]
    assert told == [["one:1"]]
    path.unlink()
    path.write_text("two:2\n")
    await until(lambda: told[-1] == ["one:1", "two:2"], "the file is read")
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
