"""Certificate authorities for tests, and directories whose files are swapped as Kubernetes and others do it."""

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from unlatch import TLS

# The contents of certificate files, by file name.
Named = Mapping[str, bytes]


class Authority:
    """A certificate authority."""

    def __init__(self) -> None:
        self._ca = trustme.CA(organization_name="unlatch's tests")

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return self._ca.cert_pem.bytes()

    def issue(self, name: str, *, seconds: float = 3600.0, after: float | None = None, through: bool = False) -> Named:
        """Issue a certificate for a name, valid for so many `seconds` from now, and its key.

        The certificate became valid an hour ago, or becomes valid in `after` seconds. With `through`, an intermediate
        authority that this one has signed issues it.
        """
        issuer = self._ca.create_child_ca() if through else self._ca
        now = datetime.now(UTC)
        begins = min(now, now + timedelta(seconds=seconds)) - timedelta(hours=1)
        if after is not None:
            begins = now + timedelta(seconds=after)
        leaf = issuer.issue_cert(name, not_before=begins, not_after=now + timedelta(seconds=seconds))
        chain = b"".join(part.bytes() for part in leaf.cert_chain_pems)
        return {"tls.crt": chain, "tls.key": leaf.private_key_pem.bytes()}


class Renamed:
    """A directory whose files are replaced one after another, each atomically."""

    def __init__(self, directory: Path, files: Named) -> None:
        self.directory = directory
        directory.mkdir()
        self.swap(files)

    def swap(self, files: Named) -> None:
        """Replace these files."""
        for name, content in files.items():
            new = self.directory / f".{name}.new"
            new.write_bytes(content)
            new.rename(self.directory / name)

    def __getitem__(self, name: str) -> str:
        return str(self.directory / name)

    @property
    def tls(self) -> TLS:
        """Make a client's TLS settings from these files."""
        return TLS(ca=self["ca.crt"], cert=self["tls.crt"], key=self["tls.key"])


class Mounted(Renamed):
    """A directory as a kubelet mounts a secret: its files are links through `..data`, and are swapped all at once."""

    _versions = 0

    def swap(self, files: Named) -> None:
        data = self.directory / "..data"
        before = {path.name: path.read_bytes() for path in data.iterdir()} if data.exists() else {}
        self._versions += 1
        version = self.directory / f"..version_{self._versions}"
        version.mkdir()
        for name, content in {**before, **files}.items():
            (version / name).write_bytes(content)
            if not (self.directory / name).is_symlink():
                (self.directory / name).symlink_to(f"..data/{name}")
        link = self.directory / "..data_tmp"
        link.symlink_to(version.name)
        os.replace(link, data)
