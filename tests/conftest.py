"""What all tests share: what this machine allows, and how that is told."""

import os

import pytest

from tests import peers


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs network namespaces where they cannot be had."""
    if item.get_closest_marker("netns") is not None:
        reason = peers.why_no_namespaces()
        if reason:
            pytest.skip(reason)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that demands every peer (RINGWAY_REQUIRE_PEERS=1) and skipped a test for want of one."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not peers.required() or reporter is None:
        return
    reasons = {
        str(report.longrepr[2]) for report in reporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)
    }
    missing = sorted(reason for reason in reasons if "not installed" in reason)
    if missing and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"RINGWAY_REQUIRE_PEERS is set, and tests were skipped: {'; '.join(missing)}", red=True)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the environment of whoever runs the tests out of the configuration."""
    for name in list(os.environ):
        if name.startswith("RINGWAY_") and name != peers.REQUIRE:
            monkeypatch.delenv(name)
    for name in ("NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
