"""The mesh of ranks: places, groups, and what DeepSpeed asks of it."""

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megatron_lite.parallel.mesh import Mesh, build_mesh
from tests.distributed import RankFailed, run_ranks


def place_and_peers(tensor: int, pipeline: int) -> tuple[tuple[int, int, int], list[list[int]]]:
    mesh = build_mesh(tensor, pipeline)
    groups = (mesh.tensor_group, mesh.pipeline_group, mesh.data_group, mesh.model_group)
    return (
        (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank),
        [dist.get_process_group_ranks(group) for group in groups if group],
    )


def test_places_and_groups() -> None:
    found = run_ranks(8, place_and_peers, 2, 2)
    assert [place for place, _ in found] == [(p, d, t) for p in range(2) for d in range(2) for t in range(2)]
    assert found[5][1] == [[4, 5], [1, 5], [5, 7], [0, 1, 4, 5]]
    for rank, (_, groups) in enumerate(found):
        assert all(rank in ranks for ranks in groups)


def test_ranks_lie_as_deepspeeds_topology_lays_them() -> None:
    """The pipeline engine takes its own groups from the topology: they have to be ours."""
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=4, num_dp=3)
    for rank in range(24):
        mesh = Mesh(rank, tensor_size=4, pipeline_size=2, data_size=3)
        at = topology.get_coord(rank)
        assert (at.pipe, at.data, at.model) == (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank)


def sum_over_groups(tensor: int, pipeline: int) -> list[float]:
    mesh = build_mesh(tensor, pipeline)
    out = []
    for group in (mesh.tensor_group, mesh.pipeline_group, mesh.data_group, mesh.model_group):
        x = torch.tensor(10.0**mesh.rank)
        dist.all_reduce(x, group=group)
        out.append(x.item())
    return out


def test_groups_communicate() -> None:
    found = run_ranks(4, sum_over_groups, 2, 1)
    assert found[0] == [11, 1, 101, 11]
    assert found[3] == [1100, 1000, 1010, 1100]


def test_too_few_ranks_are_an_error() -> None:
    with pytest.raises(RankFailed, match="2 ranks are not a multiple of tensor 2 x pipeline 2"):
        run_ranks(2, place_and_peers, 2, 2)


def test_shard() -> None:
    mesh = Mesh(rank=6, tensor_size=4, data_size=2)
    assert mesh.tensor_rank == 2 and mesh.shard(12) == (6, 9)
    with pytest.raises(ValueError, match="10 does not divide over 4"):
        mesh.shard(10)


def test_mpu_protocol() -> None:
    mesh = Mesh(rank=13, tensor_size=2, pipeline_size=4, data_size=2)
    assert (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank) == (3, 0, 1)
    assert mesh.get_model_parallel_rank() == 7 and mesh.get_model_parallel_world_size() == 8
    assert mesh.get_tensor_model_parallel_rank() == 1 and mesh.get_tensor_model_parallel_world_size() == 2
    assert mesh.get_data_parallel_rank() == 0 and mesh.get_data_parallel_world_size() == 2
    assert mesh.get_pipeline_model_parallel_rank() == 3 and mesh.get_pipeline_model_parallel_world_size() == 4
    assert mesh.world_size == 16
    assert mesh.describe() == "rank 13 (tensor 1, pipeline 3, data 0)"


def sequence_parallel(asked: bool) -> bool:
    return build_mesh(1, 1, asked).sequence_parallel


def test_sequence_parallel_needs_tensor_ranks() -> None:
    assert run_ranks(1, sequence_parallel, True) == [False]
