"""What users install: the contents of wheel and sdist, and the wheel at work in a clean environment."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from support.package import module_names
from support.processes import run

pytestmark = pytest.mark.slow

IMPORT_EVERYTHING = """
import importlib, sys
import lightning_robust
assert lightning_robust.__file__.startswith(sys.prefix), lightning_robust.__file__
count = 0
for name in {names!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.prefix), module.__file__
    for public in module.__all__:
        getattr(module, public)
        count += 1
assert not {{"callbacks", "recipes"}} & set(sys.modules)
print(count)
"""


def package_files(repository: Path) -> set[str]:
    """Every file of the package, under the name that it has once installed."""
    rooms = {"lightning_robust": "lightning_robust"}
    rooms |= {room: f"lightning_robust/{room}" for room in ("callbacks", "recipes")}
    return {
        f"{installed}/{path.relative_to(repository / folder).as_posix()}"
        for folder, installed in rooms.items()
        for path in (repository / folder).rglob("*")
        if path.suffix in {".py", ".yaml"} or path.name == "py.typed"
    }


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path, repository: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files(repository)


def test_wheel_is_licensed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_holds_the_mapped_folders(dist: Path, repository: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"{room}/__init__.py" for room in ("lightning_robust", "callbacks", "recipes")}
    recipes = {f"recipes/{recipe.name}" for recipe in (repository / "recipes").glob("*.yaml")}
    assert sources | recipes | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_clean_environment_lists_recipes(clean_environment: Path, repository: Path, tmp_path: Path) -> None:
    output = run(clean_environment / "lightning-robust", "list", cwd=tmp_path)
    for recipe in (repository / "recipes").glob("*.yaml"):
        assert recipe.stem in output


def test_clean_environment_imports_every_public_name(clean_environment: Path, tmp_path: Path) -> None:
    code = IMPORT_EVERYTHING.format(names=module_names())
    assert int(run(clean_environment / "python", "-c", code, cwd=tmp_path)) > 0


def test_installed_requirements_are_satisfied(clean_environment: Path, tmp_path: Path) -> None:
    code = """
import importlib.metadata as metadata
from packaging.requirements import Requirement
for line in metadata.distribution("lightning-robust").requires:
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), line
        assert not any(part.operator in ("<", "<=", "==", "~=") for part in requirement.specifier), f"{line} is capped"
"""
    run(clean_environment / "python", "-c", code, cwd=tmp_path)
