"""How many workers: affinity and the cgroup's quota, of both versions of cgroups."""

import os

import pytest

from gateway.cpus import cgroup_quota, usable_cpus


def cgroup(root, lines: str, **files: str):
    """Write a /proc/self/cgroup and files under /sys/fs/cgroup ("a__b__cpu_max" stands for a/b/cpu.max)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, content in files.items():
        directory, _, file = ("sys/fs/cgroup/" + name.replace("__", "/")).rpartition("/")
        (root / directory).mkdir(parents=True, exist_ok=True)
        for known in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
            if known.replace(".", "_") == file:
                (root / directory / known).write_text(content)
    return root


@pytest.mark.parametrize(
    ("content", "quota"),
    [("max 100000\n", None), ("150000 100000\n", 1.5), ("50000 100000\n", 0.5), ("garbage\n", None), ("1 0\n", None)],
)
def test_version_2(tmp_path, content, quota):
    assert cgroup_quota(cgroup(tmp_path, "0::/a/b\n", a__b__cpu_max=content)) == quota


def test_the_tightest_level_counts(tmp_path):
    root = cgroup(
        tmp_path, "0::/a/b\n", a__b__cpu_max="400000 100000", a__cpu_max="200000 100000", cpu_max="max 100000"
    )
    assert cgroup_quota(root) == 2.0


def test_in_a_container_the_mount_is_the_cgroup(tmp_path):
    assert cgroup_quota(cgroup(tmp_path, "0::/../../elsewhere\n", cpu_max="300000 100000")) == 3.0


def test_version_1(tmp_path):
    root = cgroup(
        tmp_path,
        "4:memory:/x\n1:cpu,cpuacct:/x\n0::/\n",
        cpu__x__cpu_cfs_quota_us="250000",
        cpu__x__cpu_cfs_period_us="100000",
        cpu__cpu_cfs_quota_us="-1",
        cpu__cpu_cfs_period_us="100000",
    )
    assert cgroup_quota(root) == 2.5


def test_without_cgroups_nothing_limits(tmp_path):
    assert cgroup_quota(tmp_path) is None
    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_a_quota_below_one_is_one_worker(tmp_path):
    assert usable_cpus(cgroup(tmp_path, "0::/a\n", a__cpu_max="10000 100000")) == 1


def test_affinity_limits_as_well(tmp_path):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cpus(cgroup(tmp_path, "0::/a\n", a__cpu_max="900000 100000")) == 1
    finally:
        os.sched_setaffinity(0, before)
