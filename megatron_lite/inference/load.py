"""A GPT from a checkpoint that any layout wrote, for one process or the ranks of a tensor-parallel mesh."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_lite.checkpoint import CheckpointError, Reader
from megatron_lite.config import Config, KernelsConfig, build_config
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.ops import Needs, build_ops
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import mark, spec_of
from megatron_lite.tokenizers import Tokenizer, TokenizerError, load_tokenizer

_META = torch.device("meta")


def read_config(reader: Reader, tensor: int = 1) -> Config:
    """The configuration a checkpoint was trained with, on `tensor` ranks and without what only training needs.

    Raises:
        CheckpointError: the checkpoint does not say how its model is made.
        ConfigError: the model does not divide over `tensor` ranks; the message names the nearest number.
    """
    tree = reader.metadata.get("config")
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise CheckpointError(
            f'{reader.path}: its metadata holds no "config", so the model is unknown; save it with this release'
        )
    # The optimizer's partitioning has rules of its own with tensor parallelism, which do not matter here.
    kept = {key: value for key, value in tree.items() if key != "deepspeed"}
    config = build_config(kept | {"parallel": {"tensor": tensor}}, str(reader.path))
    if config.model.vocab_size is None:
        raise CheckpointError(f"{reader.path}: its configuration leaves model.vocab_size open")
    return config


def open_tokenizer(config: Config, given: str | None = None) -> Tokenizer | None:
    """The tokenizer `given` (--tokenizer of the tools), else the one the model was trained with, if any.

    Raises:
        TokenizerError: it cannot be loaded.
    """
    if given is not None:
        return load_tokenizer(given)
    if config.data.tokenizer is None:
        return None
    try:
        return load_tokenizer(config.data.tokenizer)
    except TokenizerError as error:
        raise TokenizerError(
            f"the model's tokenizer, {config.data.tokenizer}: {error}; say where it is now with --tokenizer SPEC"
        ) from error


def load_model(
    reader: Reader,
    config: Config,
    *,
    mesh: Mesh | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> GPT:
    """The model of `config` with the weights of a checkpoint, ready for inference.

    Each rank reads its own slices, one parameter at a time, so that no more than the model is in memory; kernels are
    the best of this machine, whatever the training used.

    Raises:
        CheckpointError: a parameter is missing, of another shape, or unreadable.
    """
    needs = replace(Needs.of(config, torch.device(device), dtype), attention_dropout=False, documents="runs")
    runtime = Runtime(mesh or Mesh(), build_ops(KernelsConfig(), needs), dtype, _META)
    model = GPT(config.model, runtime)
    model.runtime = replace(runtime, device=torch.device(device))
    _allocate(model, model.runtime.device)

    def read(name: str, dim: int | None, start: int, stop: int) -> Tensor:
        return reader.read(name, dim=dim, start=start, stop=stop)

    for parameter in model.parameters():
        spec = spec_of(parameter)
        if (shape := reader.shape(spec.name)) != spec.global_shape:
            raise CheckpointError(
                f"{reader.path}: {spec.name} is {shape}, but its configuration makes it {spec.global_shape}"
            )
    model.load_weights(read)
    return model.eval()


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Gives parameters made on the meta device memory without values.

    `Module.to_empty` would drop their specs, and untie the head from the embedding.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(
                    torch.empty_like(parameter, device=device), requires_grad=False
                )
                mark(made[parameter], spec_of(parameter))
            setattr(module, name, made[parameter])
