"""What is installed without a checkout has all that its commands need."""

import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

from tests.support import ROOT


def test_wheel_has_the_revisions_that_make_a_ledger(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    wanted = [file.name for file in (ROOT / "alembic" / "versions").glob("0*.py")]
    assert wanted and all(f"pipeline/revisions/alembic/versions/{name}" in names for name in wanted)
    code = "import pipeline.install as i; print(i.has_revisions(), i.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", str(tmp_path / "installed" / "pipeline" / "install.py")]
