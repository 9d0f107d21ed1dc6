"""What a wheel and a source distribution must contain, and nothing else."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

from lightning_memopt import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lightning_memopt"
STEM = f"{PACKAGE}-{__version__}"
SDIST, WHEEL = f"{STEM}.tar.gz", f"{STEM}-py3-none-any.whl"

# Whoever has the sdist can read, test and build what the repository holds.
FOLDERS = (PACKAGE, "benchmarks", "docs", "examples", "tests")
FILES = {
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md"),
    *("RELEASING.md", "SECURITY.md", "constraints.txt", "pyproject.toml"),
}


def check_wheel(path: Path) -> None:
    """Check that a wheel holds the package as it is in the source tree, metadata, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist()}
    info = f"{STEM}.dist-info"
    package = {name: value for name, value in content.items() if not name.startswith(f"{info}/")}
    assert package == {name: (ROOT / name).read_bytes() for name in _files(PACKAGE)}
    assert f"{PACKAGE}/py.typed" in package
    files = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    assert content.keys() - package.keys() == {f"{info}/{name}" for name in files}
    assert b"lightning-memopt = lightning_memopt.cli:main" in content[f"{info}/entry_points.txt"]
    _check_metadata(content[f"{info}/METADATA"])


def check_sdist(path: Path) -> None:
    """Check that a source distribution holds the source tree, and what setuptools adds."""
    with tarfile.open(path) as sdist:
        content = {name.removeprefix(f"{STEM}/") for name in (entry.name for entry in sdist if entry.isfile())}
        readable = sdist.extractfile(f"{STEM}/PKG-INFO")
        assert readable is not None
        _check_metadata(readable.read())
    wanted = FILES.union(*map(_files, FOLDERS))
    assert wanted - content == set()
    added = {name for name in content - wanted if not name.startswith(f"{PACKAGE}.egg-info/")}
    assert {name for name in added if "/" in name or name.startswith(".")} == set()


def _files(folder: str) -> set[str]:
    made = {"__pycache__", "_build"}
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and not made & {*path.parts})
    return {path.relative_to(ROOT).as_posix() for path in paths}


def _check_metadata(text: bytes) -> None:
    """Check metadata as a package index does: every field is valid, and the description is the README."""
    metadata = Metadata.from_email(text, validate=True)
    assert (metadata.name, str(metadata.version)) == ("lightning-memopt", __version__)
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert (metadata.description or "").strip() == (ROOT / "README.md").read_text().strip()
    assert {"cli", "examples", "dev"} <= set(metadata.provides_extra or ())
