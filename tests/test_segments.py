"""The scripted segment tests of tests/segments, one test for each file."""

from pathlib import Path

import pytest

from tests.segment_script import Script

SCRIPTS = sorted((Path(__file__).parent / "segments").glob("*.pkt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    Script(path).run()
