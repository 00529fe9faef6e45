"""Which ranks belong together."""

from __future__ import annotations

import pytest

from moonlang.base.errors import ConfigError
from moonlang.distributed.mesh import Mesh, node_ranks

MESH = Mesh(tp=4, pp=2, dp=3, ep=2)


def test_every_rank_has_a_place_of_its_own() -> None:
    assert MESH.world == 24
    for rank in range(MESH.world):
        at = MESH.place(rank)
        assert MESH.rank(dp=at.dp, pp=at.pp, tp=at.tp) == rank


@pytest.mark.parametrize("group", [Mesh.tp_group, Mesh.pp_group, Mesh.dp_group, Mesh.ep_group])
def test_groups_part_the_world(group) -> None:
    """Everybody is in the group of everybody in theirs, and groups do not overlap."""
    groups = {group(MESH, rank) for rank in range(MESH.world)}
    assert sorted(rank for one in groups for rank in one) == list(range(MESH.world))
    assert all(rank in group(MESH, rank) for rank in range(MESH.world))


def test_neighbours_share_layers() -> None:
    assert MESH.tp_group(5) == (4, 5, 6, 7)
    assert MESH.ep_group(5) == (4, 5)
    assert MESH.ep_group(6) == (6, 7)
    assert MESH.pp_group(1) == (1, 5)
    assert MESH.dp_group(1) == (1, 9, 17)


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        Mesh(tp=2, ep=4)
    with pytest.raises(ConfigError, match="spread evenly"):
        node_ranks(3, 2, 0)
    with pytest.raises(ConfigError, match="not one of"):
        node_ranks(4, 2, 2)
    assert node_ranks(4, 2, 1) == range(2, 4)
