"""The learning rate as a function of the step: no state to save, the same after every resume."""

import math

from megatron_lite.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The rate used for the optimizer step that follows `step` finished ones.

    Linear warmup to `lr` (the first step already takes lr / warmup_steps), then by schedule:
    cosine (Loshchilov and Hutter 2017, arXiv:1608.03983) or linear decay to `min_lr` at `decay_steps`; wsd
    (warmup-stable-decay, Hu et al. 2024, arXiv:2404.06395) holds `lr` until the last `wsd_decay_steps`, then decays
    linearly; constant stays. After the decay the rate is `min_lr`.
    """
    settings = config.optimizer
    lr, low, warmup = settings.lr, settings.min_lr, settings.warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return lr
    end = config.decay_steps
    start = max(warmup, end - config.wsd_decay_steps) if settings.schedule == "wsd" else warmup
    progress = min(max((step - start) / max(1, end - start), 0.0), 1.0)
    if settings.schedule == "cosine":
        return low + 0.5 * (lr - low) * (1 + math.cos(math.pi * progress))
    return lr - (lr - low) * progress
