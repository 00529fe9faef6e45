"""Cards, ports and segments as the doctor finds them under a root folder made for the test."""

import os
import resource

import pytest

from moonlang.cli import fabric_checks


def write(root, files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


UNSET = "0000:0000:0000:0000:0000:0000:0000:0000"


def port(state="4: ACTIVE", gids=("fe80:0000:0000:0000:0000:0000:0000:0001", UNSET)):
    folder = "sys/class/infiniband/mlx5_0/ports/1"
    files = {f"{folder}/state": f"{state}\n", f"{folder}/link_layer": "Ethernet\n"}
    for index, gid in enumerate(gids):
        files[f"{folder}/gids/{index}"] = f"{gid}\n"
        files[f"{folder}/gid_attrs/types/{index}"] = "RoCE v2\n"
    return files


def found(root, name, environ=None):
    checks = list(fabric_checks.run(environ or {}, root))
    return next(check for check in checks if check.name == name)


def test_a_card_that_works(tmp_path):
    write(tmp_path, port())
    check = found(tmp_path, "rdma mlx5_0:1")
    assert check.status == "ok"
    assert check.text == "ACTIVE, Ethernet, GIDs: 0 RoCE v2"


def test_a_card_without_a_cable(tmp_path):
    write(tmp_path, port(state="1: DOWN"))
    check = found(tmp_path, "rdma mlx5_0:1")
    assert check.status == "warning"
    assert "link up" in check.fix


def test_a_card_without_an_address(tmp_path):
    write(tmp_path, port(gids=(UNSET,)))
    check = found(tmp_path, "rdma mlx5_0:1")
    assert (check.status, "IP address" in check.fix) == ("warning", True)


def test_without_cards(tmp_path):
    assert found(tmp_path, "rdma").status == "ok"


@pytest.mark.parametrize(
    ("limit", "needed", "status"),
    [(resource.RLIM_INFINITY, True, "ok"), (8 << 20, False, "ok"), (8 << 20, True, "warning")],
)
def test_locked_memory(limit, needed, status):
    check = fabric_checks._locked_memory(limit, needed=needed)
    assert check.status == status
    assert check.status == "ok" or "memlock=-1" in check.fix


def test_ports_in_use(tmp_path):
    heading = "  sl  local_address rem_address   st\n"
    rows = "".join(f"   {n}: 0100007F:{15000 + n:04X} 00000000:0000 0A\n" for n in range(10))
    write(tmp_path, {"proc/net/tcp": heading + rows, "proc/net/tcp6": heading})
    assert found(tmp_path, "mooncake ports").text == "1991 of 15000 to 17000 are free"
    few = {"MC_MIN_RPC_PORT": "15000", "MC_MAX_RPC_PORT": "15019"}
    check = found(tmp_path, "mooncake ports", few)
    assert (check.status, check.text) == ("warning", "10 of 15000 to 15019 are free")


def test_segments_of_the_dead_and_of_the_living(tmp_path):
    living = os.getpid()
    write(tmp_path, {f"proc/{living}/stat": "", f"dev/shm/mcss_{living}_aa": "x", "dev/shm/other_77_aa": "x"})
    assert found(tmp_path, "segments").status == "ok"
    write(tmp_path, {"dev/shm/mcss_77_aa": "x"})
    check = found(tmp_path, "segments")
    assert check.status == "warning"
    assert check.fix.endswith(f"rm {tmp_path}/dev/shm/mcss_77_aa")
