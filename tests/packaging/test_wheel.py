"""The built wheel, installed elsewhere, is the whole package: the quickstart runs with it."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import metaopt

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def succeeds(*command, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built with the hatchling that is here: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder))
    succeeds(*PIP, "wheel", *options, str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> dict[str, str]:
    """The environment of a process that sees the wheel in front of the sources."""
    target = tmp_path_factory.mktemp("installed")
    succeeds(*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return {**os.environ, "PYTHONPATH": str(target)}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in (ROOT / "metaopt").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    info = f"metaopt_jax-{metaopt.__version__}.dist-info/"
    assert {n: b for n, b in packed.items() if not n.startswith(info)} == sources
    for needed in ("py.typed", "report/page.html", "report/page.css", "report/page.js"):
        assert f"metaopt/{needed}" in sources
    assert packed[f"{info}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"MIT License" in packed[f"{info}licenses/metaopt/zoo/celo/LICENSE"]
    assert "metaopt = metaopt.__main__:main" in packed[f"{info}entry_points.txt"].decode()


def test_metadata_names_the_extras_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    extras = set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.M))
    assert extras >= {"all", "data", "docs", "hub", "report", "tensorboard", "test", "train"}
    assert re.search(r"^License-Expression: Apache-2.0 AND MIT$", metadata, re.M)


def test_the_quickstart_runs_with_the_wheel_from_another_folder(installed, tmp_path):
    page = (ROOT / "docs" / "quickstart.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))
    code += "\nprint('from', metaopt.__file__)"
    printed = succeeds(sys.executable, "-c", code, cwd=tmp_path, env=installed)
    assert f"from {installed['PYTHONPATH']}/metaopt/__init__.py" in printed
    assert float(re.search(r"test loss ([\d.]+)", printed)[1]) < 1.5  # guessing: log 10 = 2.3
    learned, adam = re.search(r"learned optimizer: (\d+), for Adam: (\d+)", printed).groups()
    assert int(learned) + int(adam) == 15  # 150 mini-batches, 10 to a window


def test_the_command_line_of_the_wheel_works(installed, tmp_path):
    script = Path(installed["PYTHONPATH"]) / "bin" / "metaopt"
    printed = succeeds(sys.executable, str(script), "data", "list", cwd=tmp_path, env=installed)
    assert "fashion_mnist" in printed
