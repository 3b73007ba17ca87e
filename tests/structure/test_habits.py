"""The files that help contributors agree with what the repository does: CI, issue forms, pre-commit, dev container."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.mesh import ROOT

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
LOCK = (ROOT / "requirements-dev.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def parsed(path: Path) -> Any:
    """A YAML file's content."""
    return yaml.safe_load(path.read_text())


def test_workflow_runs_the_script_that_a_contributor_runs() -> None:
    """CI calls .ci/run and nothing else, on the oldest Python that the project supports."""
    (job,) = parsed(ROOT / ".github" / "workflows" / "ci.yml")["jobs"].values()
    *setup, last = job["steps"]
    assert last == {"run": ".ci/run"}
    assert all("run" not in step for step in setup)
    (python,) = (step["with"]["python-version"] for step in setup if "python-version" in step.get("with", {}))
    assert PROJECT["requires-python"] == f">={python}"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_form_is_valid(path: Path) -> None:
    """Each form has a name, a description and fields that GitHub knows, with distinct ids and with labels."""
    form = parsed(path)
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} == {"textarea"}
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)


def test_issue_links_lead_to_the_repository() -> None:
    """The links beside the forms lead to the project's own pages, and files that they name exist."""
    links = parsed(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml")["contact_links"]
    home = PROJECT["urls"]["Repository"]
    for link in links:
        assert link["url"].startswith(f"{home}/")
        if named := re.search(r"/blob/main/(.+)", link["url"]):
            assert (ROOT / named[1]).is_file()


def test_pre_commit_uses_the_locked_ruff() -> None:
    """Pre-commit's ruff is the version in requirements-dev.lock, checks and formats."""
    repositories = {entry["repo"]: entry for entry in parsed(ROOT / ".pre-commit-config.yaml")["repos"]}
    ruff = repositories["https://github.com/astral-sh/ruff-pre-commit"]
    locked = re.search(r"^ruff==(\S+)", LOCK, re.MULTILINE)
    assert locked is not None
    assert ruff["rev"] == f"v{locked[1]}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


def test_dev_container_has_the_oldest_supported_python() -> None:
    """The dev container sets the checkout up with the Python that CI uses."""
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert PROJECT["requires-python"] == f">={container['image'].rpartition(':')[2]}"
    assert container["postCreateCommand"] == "make setup"


def test_project_urls_name_files_that_exist() -> None:
    """Each link in the package's metadata that names a file of the repository names one that exists."""
    urls = PROJECT["urls"]
    named = [match[1] for url in urls.values() if (match := re.fullmatch(r".*/blob/main/(.+)", url))]
    assert len(named) == 3
    assert all((ROOT / name).is_file() for name in named)
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
