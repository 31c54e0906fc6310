"""The distributions under test: those of `--dist-folder`, else built once from a copy of the checkout."""

import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from support.processes import run

INGREDIENTS = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "lightning_robust", "callbacks", "recipes")


@pytest.fixture(scope="session")
def dist(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sdist and one wheel; the wheel is built from the sdist."""
    given = request.config.getoption("--dist-folder")
    if given is not None:
        return (request.config.invocation_params.dir / given).resolve()
    source = tmp_path_factory.mktemp("source")
    for name in INGREDIENTS:
        if (repository / name).is_dir():
            shutil.copytree(repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(repository / name, source / name)
    # Without isolation: the test must not need the network. `make wheel-test` builds in isolation.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source), cwd=source)
    return source / "dist"


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def clean_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the installed wheel and nothing else of ours; returns its folder of programs.

    The dependencies (gigabytes) are those of the running environment, reached through one path line. Path files in a
    folder reached that way are not read, so the editable installation stays out of sight.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    programs = folder / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    site_packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (site_packages / "shared_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs
