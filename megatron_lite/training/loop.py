"""The training loop, and what is built before it."""

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from megatron_lite.checkpoint import CheckpointError, DamagedCheckpoint
from megatron_lite.config import Config
from megatron_lite.data.build import RunData, build_run
from megatron_lite.data.errors import DatasetError
from megatron_lite.data.gpt import SampleDataset
from megatron_lite.data.loader import Batch, DataLoader, make_loader
from megatron_lite.data.sidecar import check_datasets
from megatron_lite.model.runtime import DTYPES, Runtime
from megatron_lite.ops import Needs, Ops, build_ops
from megatron_lite.parallel.launch import Launch, choose_device, init_distributed
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.tokenizers import load_tokenizer
from megatron_lite.training.allocator import set_cpu_allocator
from megatron_lite.training.engine import Engine, build_engine
from megatron_lite.training.metrics import Metrics, peak_memory_gib
from megatron_lite.training.output import Output
from megatron_lite.training.resilience import PeerWatch, RunFailed, StopSignals, check_finite
from megatron_lite.training.saver import RankLost, Saver
from megatron_lite.training.saving import (
    Progress,
    agreed_failure,
    find_start,
    gather,
    load_checkpoint,
    read_progress,
)
from megatron_lite.training.schedule import learning_rate

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything the loop works with."""

    config: Config
    engine: Engine
    train_loader: DataLoader
    data: RunData
    loader: Callable[..., DataLoader]  # of a dataset, from consumed_samples on
    output: Output
    metrics: Metrics
    progress: Progress
    stop: StopSignals
    saver: Saver


def train(run: Run) -> None:
    """Runs training to the step the configuration asks for, or to a stop signal, and saves. Collective.

    Raises:
        RunFailed: a number is not finite (see `resilience.check_finite`), data cannot be read, or a checkpoint
            cannot be written; the last checkpoint stands.
    """
    if run.progress.step >= run.config.train.steps:
        logger.info(
            "nothing to do: step %d is done, and train.steps is %d", run.progress.step, run.config.train.steps
        )
    with contextlib.ExitStack() as stack:
        for held in (run.output, run.metrics, run.train_loader):
            stack.enter_context(contextlib.closing(held))
        for context in (PeerWatch(), _failed_saves_end_the_run(), run.saver):
            stack.enter_context(context)
        _train(run)
    peak = peak_memory_gib(run.engine.runtime.device)
    logger.info("done at step %d | peak memory %.2f GiB", run.progress.step, peak)


def _train(run: Run) -> None:
    config, engine, progress, metrics = run.config, run.engine, run.progress, run.metrics
    last = config.train.steps
    if config.train.exit_after_steps is not None:
        last = min(last, progress.step + config.train.exit_after_steps)
    begin = saved = progress.step
    while progress.step < last:
        metrics.begin_step()
        rate = learning_rate(config, progress.step)
        engine.set_learning_rate(rate)
        batches = _next_batches(engine, run.train_loader)
        result = engine.train_step(batches, progress.step)
        check_finite(engine, result, batches, progress.step)
        progress.step += 1
        progress.consumed_samples = run.train_loader.consumed_samples
        progress.consumed_tokens += metrics.tokens_per_step
        metrics.end_step(
            progress.step, result.loss, result.grad_norm, rate, progress.consumed_tokens, result.skipped
        )
        stopping, failed = run.stop.agreed(run.saver.failed)
        if failed:
            run.saver.wait()
        if _due(config.train.eval_interval, progress.step, config.train.steps) and not stopping:
            evaluate(run, "valid", run.data.valid)
        full = stopping or _due(config.checkpoint.interval, progress.step, last)
        weights = _due(config.checkpoint.weights_interval, progress.step, config.train.steps)
        if full or weights:
            _save(run, full=full, weights=weights, last=stopping or progress.step == last)
            saved = progress.step if full else saved
        if stopping:
            logger.info("stopped by %s: the same command goes on from here", run.stop.received or "a signal")
            break
    if saved != progress.step:
        _save(run, last=True)
    run.saver.wait()
    if begin < progress.step == config.train.steps and config.train.eval_interval is not None:
        evaluate(run, "test", run.data.test)


def _next_batches(engine: Engine, loader: DataLoader) -> list[Batch]:
    try:
        return loader.next_step()
    except (DatasetError, OSError) as error:
        raise RunFailed(f"{engine.mesh.describe()}: {error}", shared=False) from error


def _save(run: Run, **what: bool) -> None:
    run.progress.data = run.data.state(run.progress.consumed_samples)
    run.saver.save(run.progress, **what)


@contextlib.contextmanager
def _failed_saves_end_the_run() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise RunFailed(str(error), shared=not isinstance(error, RankLost)) from error


def _due(interval: int | None, step: int, last: int) -> bool:
    """Every `interval` steps, and at the end."""
    return interval is not None and (step % interval == 0 or step == last)


def evaluate(run: Run, name: str, dataset: SampleDataset | None) -> None:
    """Reports the mean loss over the first `train.eval_steps` global batches of a held-out split. Collective."""
    if dataset is None:
        return
    begin, total, tokens = time.perf_counter(), 0.0, 0.0
    loader = run.loader(dataset)
    steps = min(run.config.train.eval_steps, loader.remaining_steps)
    if steps == 0:
        logger.warning("no %s loss: the data are less than one global batch (%d samples)", name, len(dataset))
        return
    for _ in range(steps):
        loss, count = run.engine.eval_step(_next_batches(run.engine, loader))
        total, tokens = total + loss * count, tokens + count
    loader.close()
    run.metrics.evaluation(run.progress.step, name, total / max(tokens, 1.0), time.perf_counter() - begin)


def start(config: Config, launch: Launch) -> Run:
    """Joins the ranks and builds tokenizer, data, model and engine, cheap and fallible things first. Collective.

    Raises:
        ValueError: tokenizer, data, checkpoint or output folder do not fit the configuration; on every rank once
            they have joined, and before the model is built except for a checkpoint of another model.
    """
    device = choose_device(config.train.device, launch)
    if device.type == "cpu" and config.kernels.cpu_allocator:
        set_cpu_allocator()
    init_distributed(launch, device, config.parallel.timeout_minutes)
    stop = StopSignals(device)
    _check_same_device(device)
    dtype = DTYPES[config.train.precision]
    with agreed_failure():
        ops = build_ops(config.kernels, Needs.of(config, device, dtype))
    _check_same_kernels(ops)
    with agreed_failure():
        tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        if tokenizer is not None:
            config = config.with_vocab_size(tokenizer.vocab_size)
        fingerprint = None if tokenizer is None else tokenizer.fingerprint()
        check_datasets(config.data, fingerprint)
    mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence_parallel)
    with agreed_failure():
        output = Output(config, active=mesh.rank == 0)
        metrics = Metrics(config, device, mesh.world_size, active=mesh.rank == 0)

    eod_id = None if tokenizer is None else tokenizer.eod_id
    loader = partial(make_loader, config, eod_id=eod_id, data_rank=mesh.data_rank, data_size=mesh.data_size)
    starts, engine, fault = find_start(config), None, None
    while True:
        checkpoint = starts.send(fault)
        try:
            with agreed_failure():
                progress = read_progress(config, checkpoint, fingerprint)
                data = build_run(config, progress.step, progress.consumed_samples, progress.data)
                place = {"consumed_samples": progress.consumed_samples, "first_sample": data.position.first}
                held_out = [loader(dataset) for dataset in (data.valid, data.test) if dataset is not None]
                for probe in (loader(data.train, **place), *held_out):
                    if probe.remaining_steps:
                        probe.next_step()  # data of another tokenizer show themselves at once
            if engine is None:
                runtime = Runtime(mesh, ops, dtype, device, config.train.seed, config.train.recompute)
                _log_start(config, launch, runtime, data)
                with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints reports of memory
                    engine = build_engine(config, runtime)
            if checkpoint is not None:
                load_checkpoint(engine, checkpoint)
                logger.info("starting from %s at step %d", checkpoint, progress.step)
            break
        except DamagedCheckpoint as error:
            fault = str(error)
    train_loader = loader(data.train, **place, num_workers=config.data.num_workers)
    with agreed_failure():  # and together, so that the first step's time is a step's
        metrics.open(progress.step)
    return Run(config, engine, train_loader, data, loader, output, metrics, progress, stop, Saver(engine))


def _check_same_device(device: torch.device) -> None:
    """Ranks on GPUs and ranks on CPUs would wait for each other in different backends."""
    kinds = gather(device.type)
    if "cpu" in kinds and "cuda" in kinds:
        odd = [rank for rank, kind in enumerate(kinds) if kind == "cpu"]
        raise ValueError(
            f"ranks {odd} found no GPU and the others did: look at their nodes, or set train.device"
        )


def _check_same_kernels(ops: Ops) -> None:
    """Tensor ranks that compute the same with different kernels would drift apart."""
    first, *others = gather(ops.chosen)
    for rank, chosen in enumerate(others, start=1):
        for group in first:
            if chosen[group] != first[group]:
                raise ValueError(
                    f"kernels.{group}: rank {rank} would take {chosen[group]} and rank 0 {first[group]}: install the "
                    "same packages on every node, or name a backend that all have"
                )


def _log_start(config: Config, launch: Launch, runtime: Runtime, data: RunData) -> None:
    """What the user should check before hours pass."""
    mesh, model = runtime.mesh, config.model
    why = {"cuda": "", "cpu": " (gloo)"}[runtime.device.type]
    if why and config.train.device == "auto":
        why = " (no GPU for each rank: CPU and gloo)"
    logger.info(
        "%d rank%s under %s on %s%s: tensor %d x pipeline %d x data %d, ZeRO-%d%s",
        mesh.world_size,
        "s" * (mesh.world_size > 1),
        launch.launcher,
        runtime.device.type,
        why,
        mesh.tensor_size,
        mesh.pipeline_size,
        mesh.data_size,
        config.zero_stage,
        ", sequence parallel" if mesh.sequence_parallel else "",
    )
    logger.info(
        "model: %s parameters, %d layers, %d wide, vocabulary %d padded to %d | %s, recompute %s",
        f"{model.parameter_count():,}",
        model.num_layers,
        model.hidden_size,
        model.vocab_size,
        model.padded_vocab_size,
        config.train.precision,
        config.train.recompute,
    )
    for line in runtime.ops.table():
        logger.info("kernels: %s", line)
    logger.info(
        "data: %s training samples of %d tokens%s",
        f"{data.position.first + len(data.train):,}",
        model.seq_length,
        "" if data.valid is None else f", {len(data.valid):,} for validation",
    )
    for warning in config.warnings(mesh.world_size):
        logger.warning("%s", warning)
