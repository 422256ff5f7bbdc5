"""Who am I, and which groups do I belong to: the frozen mesh of ranks, passed to whoever needs it.

Ranks are laid out with the tensor dimension fastest and the pipeline dimension slowest, as Megatron-LM and
DeepSpeed's `PipeModelDataParallelTopology` do: rank = (pipeline_rank * data_size + data_rank) * tensor_size +
tensor_rank, so that tensor-parallel peers share a node.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """One rank's place in the pipeline x data x tensor grid, and its process groups (None: not distributed).

    The `get_*` methods are the `mpu` protocol through which DeepSpeed asks the same questions.
    """

    rank: int = 0
    tensor_size: int = 1
    pipeline_size: int = 1
    data_size: int = 1
    tensor_group: ProcessGroup | None = None
    pipeline_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    model_group: ProcessGroup | None = None  # every rank that holds a part of one model replica
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor_size * self.pipeline_size * self.data_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size % self.data_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor_size * self.data_size)

    def shard(self, size: int) -> tuple[int, int]:
        """The half-open range of a dimension of `size` that this tensor rank holds.

        Raises:
            ValueError: the size does not divide by the tensor-parallel size.
        """
        if size % self.tensor_size:
            raise ValueError(
                f"a dimension of {size} does not divide over {self.tensor_size} tensor-parallel ranks"
            )
        part = size // self.tensor_size
        return self.tensor_rank * part, (self.tensor_rank + 1) * part

    def describe(self) -> str:
        """This rank's coordinates in words, for logs and error messages."""
        return f"rank {self.rank} (tensor {self.tensor_rank}, pipeline {self.pipeline_rank}, data {self.data_rank})"

    # DeepSpeed's mpu protocol.
    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_tensor_model_parallel_group(self) -> ProcessGroup | None:
        return self.tensor_group

    # What DeepSpeed calls "model parallel" is everything that is not data parallel.
    def get_model_parallel_rank(self) -> int:
        return self.pipeline_rank * self.tensor_size + self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size * self.pipeline_size

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self.model_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> ProcessGroup | None:
        return self.data_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.pipeline_size

    def get_pipeline_model_parallel_group(self) -> ProcessGroup | None:
        return self.pipeline_group


def build_mesh(tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False) -> Mesh:
    """Builds this rank's mesh over the initialised default process group; data parallelism is what remains.

    Collective: every rank must call it with the same arguments.

    Raises:
        ValueError: the number of ranks is not a multiple of tensor x pipeline.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world % (tensor * pipeline):
        raise ValueError(f"{world} ranks are not a multiple of tensor {tensor} x pipeline {pipeline}")
    data = world // (tensor * pipeline)

    def at(p: int, d: int, t: int) -> int:
        return (p * data + d) * tensor + t

    def my_group(lists: list[list[int]]) -> ProcessGroup | None:
        mine = None
        for ranks in lists:  # every rank must take part in the creation of every group
            group = dist.new_group(ranks)
            if rank in ranks:
                mine = group
        return mine

    ps, ds, ts = range(pipeline), range(data), range(tensor)
    return Mesh(
        rank,
        tensor,
        pipeline,
        data,
        tensor_group=my_group([[at(p, d, t) for t in ts] for p in ps for d in ds]),
        pipeline_group=my_group([[at(p, d, t) for p in ps] for d in ds for t in ts]),
        data_group=my_group([[at(p, d, t) for d in ds] for p in ps for t in ts]),
        model_group=my_group([[at(p, d, t) for p in ps for t in ts] for d in ds]),
        sequence_parallel=sequence_parallel and tensor > 1,
    )
