"""Memory that is left: of the host, and of a container."""

from moonlang.base.host_memory import free_bytes


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_free_memory_is_the_least_of_host_and_control_group(tmp_path):
    write(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"})
    assert free_bytes(tmp_path) == 4000 * 1024
    write(tmp_path, {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "1000\n"})
    assert free_bytes(tmp_path) == 4000 * 1024
    write(tmp_path, {"sys/fs/cgroup/memory.max": "500000\n"})
    assert free_bytes(tmp_path) == 499_000
    version_1 = "sys/fs/cgroup/memory/memory."
    write(tmp_path, {f"{version_1}limit_in_bytes": "3000", f"{version_1}usage_in_bytes": "5000"})
    assert free_bytes(tmp_path) == 0
