"""`python -m deploy.dashboards DIRECTORY` writes each board to a file named after its uid."""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.dashboards import mesh, processes, tenants

BOARDS = (mesh.BOARD, processes.BOARD, tenants.BOARD)


def write(directory: Path) -> None:
    """Write all boards to a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        text = json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / f"{board.uid}.json").write_text(f"{text}\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
