"""deploy/ and the project's own files: they are right, and they say what the program does."""

import configparser
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from gateway import __version__
from gateway.config import Config, load
from gateway.keys import KEYS
from tests.peers import need

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def test_every_key_stands_in_the_example_with_its_default(tmp_path: Path) -> None:
    text = (DEPLOY / "ringway.toml").read_text()
    assert tomllib.loads(text) == {}
    # A key's line has no space behind the "#", a sentence has one.
    example = tmp_path / "ringway.toml"
    example.write_text(re.sub(r"^#(?=[a-z])", "", text, flags=re.MULTILINE))
    keys = tomllib.loads(example.read_text())
    assert list(keys) == [key.name for key in KEYS]
    assert msgspec.convert(keys, Config) == Config()
    assert load(example, {}, {}) == Config()


def test_the_example_explains_every_key() -> None:
    text = " ".join((DEPLOY / "ringway.toml").read_text().replace("\n#", " ").split())
    for key in KEYS:
        assert f"{key.help} Allowed is {key.allowed}." in text


@pytest.mark.peer
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    unit = (DEPLOY / "ringway.service").read_text()
    # verify wants the program to exist.
    patched = tmp_path / "ringway.service"
    patched.write_text(unit.replace("/opt/ringway/bin/ringway", sys.executable))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(patched)], capture_output=True, text=True, timeout=60, check=False
    )
    about_us = [line for line in (done.stdout + done.stderr).splitlines() if "ringway" in line]
    assert (done.returncode, about_us) == (0, [])


def test_unit_and_program_start_what_exists() -> None:
    unit = (DEPLOY / "ringway.service").read_text()
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert start is not None
    program = configparser.ConfigParser(inline_comment_prefixes=(";",))
    program.read(DEPLOY / "supervisord.conf")
    for command in (start[1], program["program:ringway"]["command"]):
        words = shlex.split(command)
        assert words == ["/opt/ringway/bin/ringway", "run", "--config", "/etc/ringway/ringway.toml"]
    for setting in ("Type=notify", "NotifyAccess=main", "Restart=on-failure", "RestartPreventExitStatus=2"):
        assert f"\n{setting}\n" in unit
    assert "\nPrivateDevices=yes" not in unit
    assert "\nDeviceAllow=/dev/net/tun rw\n" in unit


def test_project_file_and_program_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"ringway": "gateway.__main__:main"}
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("script", sorted((ROOT / ".ci").iterdir()), ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script: Path) -> None:
    shell = script.read_text().splitlines()[0].removeprefix("#!")
    subprocess.run([shell, "-n", str(script)], timeout=20, check=True)
    assert script.stat().st_mode & stat.S_IXUSR


def make(directory: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(directory)} | environment,
    )
    return done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what make needs, with an environment that is already there and whose Python prints its arguments."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed (apt-get install make)")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    python.chmod(0o755)
    for stamp in (".run.stamp", ".dev.stamp"):
        (tmp_path / ".venv" / stamp).touch()
    return tmp_path


def test_make_alone_says_what_there_is(checkout: Path) -> None:
    text = make(checkout)
    for target in ("run", "test", "check", "bench", "clean"):
        assert f"make {target}" in text


def test_make_run_passes_the_command_on_untouched(checkout: Path) -> None:
    assert make(checkout, "run") == "<-m><gateway.demo>"
    for command in ("curl -sI http://example.com", "echo \"a b\" 'c' $HOME | wc, (x); `id`", "a=$(id -u); echo $$"):
        assert make(checkout, "run", f"CMD={command}") == f"<-m><gateway.demo><--shell><{command}>"


def test_make_without_a_usable_python_says_what_to_do(checkout: Path, tmp_path: Path) -> None:
    """pyenv's shims exist and fail; the environment's own Python may be gone."""
    shutil.rmtree(checkout / ".venv")
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        (shims / name).write_text("#!/bin/sh\necho pyenv: not found >&2\nexit 127\n")
        (shims / name).chmod(0o755)
    for name in ("make", "sh", "dirname", "id", "rm", "touch", "echo", "printf"):
        found = shutil.which(name)
        assert found is not None
        (shims / name).symlink_to(found)
    script = (checkout / ".ci" / "environment").read_text()
    (checkout / ".ci" / "environment").write_text(
        script.replace("/usr/bin/", "/nowhere/").replace("/usr/local/bin/", "/nowhere/")
    )
    text = make(checkout, "run", PATH=str(shims))
    assert "ringway: no Python 3.11 or later found: apt-get install python3" in text
    assert not (checkout / ".venv" / ".run.stamp").exists()
