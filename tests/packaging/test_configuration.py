"""pyproject.toml agrees with the folders and keeps its promises."""

import importlib.resources
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lightning_robust

ROOMS = ("lightning_robust", "callbacks", "recipes")
TEXT = {".py", ".yaml", ".md", ".toml", ".in", ""}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def test_every_package_folder_is_listed(project: dict[str, Any], repository: Path) -> None:
    rooms = ("lightning_robust", "callbacks", "recipes")
    folders = {
        path.parent.relative_to(repository) for room in rooms for path in (repository / room).rglob("__init__.py")
    }
    names = {".".join(folder.parts) for folder in folders}
    installed = {name if name.startswith("lightning_robust") else f"lightning_robust.{name}" for name in names}
    assert set(project["tool"]["setuptools"]["packages"]) == installed


def test_every_folder_with_modules_is_a_package(repository: Path) -> None:
    folders = {path.parent for room in ROOMS for path in (repository / room).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_version_is_that_of_the_module(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == lightning_robust.__version__


def test_lower_bounds_without_caps(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"].values()
    lines = project["project"]["dependencies"] + [line for extra in extras for line in extra]
    capped = [line for line in lines if re.search(r"(<|==|~=)", line)]
    assert not capped


def test_recipes_are_read_as_package_resources() -> None:
    names = {entry.name for entry in importlib.resources.files("lightning_robust.recipes").iterdir()}
    assert "__init__.py" in names


def test_nothing_names_a_folder_of_one_machine(repository: Path) -> None:
    places = "|".join(("home", "work", "root", "Users"))  # joined here, so that this file passes
    local = re.compile(f"/({places})/[a-z]")
    folders = (*ROOMS, "tests", "docs", "benchmarks", ".ci")
    files = [path for folder in folders for path in (repository / folder).rglob("*") if "_build" not in path.parts]
    texts = [
        path
        for path in [*files, *repository.iterdir()]
        if path.is_file() and path.suffix in TEXT and path.name != ".git"
    ]
    assert texts
    assert [str(path) for path in texts if local.search(path.read_text())] == []
