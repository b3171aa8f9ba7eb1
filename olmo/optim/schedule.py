"""Learning rate and clipping threshold as functions of the step (or of the tokens seen).

All numbers of a schedule have the same unit, config.scheduler.units: steps or tokens. The formulas
are those of OLMo's olmo/optim.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import cos, pi, sqrt

from olmo.config import SchedulerConfig, SchedulerType, TrainConfig


@dataclass
class Scheduler:
    """What all schedules share.

    Fields:
        grad_clip_warmup_steps, grad_clip_warmup_factor: up to this step, the clipping threshold
            is the configured one times this factor.
        warmup_min_lr: the learning rate where warm-up starts; None: a tenth of the peak.
    """

    grad_clip_warmup_steps: int | None
    grad_clip_warmup_factor: float | None
    warmup_min_lr: float | None

    def get_lr(self, initial_lr: float, step: int, max_steps: int) -> float:
        """The learning rate at `step`, where the peak is `initial_lr`.

        Args:
            step, max_steps: the current step and the run's last, in the schedule's unit.
        """
        raise NotImplementedError

    def get_max_grad_norm(
        self, initial_max_grad_norm: float | None, step: int, max_steps: int
    ) -> float | None:
        """The clipping threshold at `step`, in the schedule's unit; None stays None."""
        factor = self.grad_clip_warmup_factor
        if initial_max_grad_norm is None or self.grad_clip_warmup_steps is None or factor is None:
            return initial_max_grad_norm
        in_warmup = step <= self.grad_clip_warmup_steps
        return factor * initial_max_grad_norm if in_warmup else initial_max_grad_norm

    def get_max_grad_norm_ratio(
        self, initial_max_grad_norm_ratio: float | None, step: int, max_steps: int
    ) -> float | None:
        """The ratio of adaptive clipping at `step`."""
        return self.get_max_grad_norm(initial_max_grad_norm_ratio, step, max_steps)

    def _warm_up(self, initial_lr: float, step: int, warmup_steps: int) -> float:
        start = initial_lr * 0.10 if self.warmup_min_lr is None else self.warmup_min_lr
        return start + (initial_lr - start) * min(step, warmup_steps) / warmup_steps


@dataclass
class _WithWarmup(Scheduler):
    """Linear warm-up for `warmup_steps`, then `_after_warmup`."""

    warmup_steps: int

    def get_lr(self, initial_lr: float, step: int, max_steps: int) -> float:
        if step < self.warmup_steps:
            return self._warm_up(initial_lr, step, self.warmup_steps)
        return self._after_warmup(initial_lr, step, max_steps)

    def _after_warmup(self, initial_lr: float, step: int, max_steps: int) -> float:
        raise NotImplementedError


@dataclass
class _WithDecay(_WithWarmup):
    """Decay from the peak after warm-up to alpha_f of it at t_max (None: max_steps); then flat."""

    alpha_f: float = 0.1
    t_max: int | None = None

    def _after_warmup(self, initial_lr: float, step: int, max_steps: int) -> float:
        end = max_steps if self.t_max is None else self.t_max
        final = initial_lr * self.alpha_f
        if step >= end:
            return final
        progress = (step - self.warmup_steps) / (end - self.warmup_steps)
        return final + (initial_lr - final) * self._remaining(progress)

    def _remaining(self, progress: float) -> float:
        """The share of the decay that remains, from 1 to 0, at `progress`, from 0 to 1."""
        raise NotImplementedError


@dataclass
class CosWithWarmup(_WithDecay):
    """Half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983)."""

    def _remaining(self, progress: float) -> float:
        return (1 + cos(pi * progress)) / 2


@dataclass
class LinearWithWarmup(_WithDecay):
    def _remaining(self, progress: float) -> float:
        return 1 - progress


@dataclass
class CosLinearEnvelope(_WithDecay):
    """A cosine times a linear decay."""

    def _remaining(self, progress: float) -> float:
        return (1 - progress) * (1 + cos(pi * progress)) / 2


@dataclass
class InvSqrtWithWarmup(_WithWarmup):
    """Decay as 1/sqrt(step). With warmup_steps = 0 it starts at step 1; OLMo divides by 0 there."""

    def _after_warmup(self, initial_lr: float, step: int, max_steps: int) -> float:
        warmup_steps = max(1, self.warmup_steps)
        return initial_lr * sqrt(warmup_steps / max(warmup_steps, step))


@dataclass
class ConstantScheduler(Scheduler):
    def get_lr(self, initial_lr: float, step: int, max_steps: int) -> float:
        return initial_lr


@dataclass
class ConstantWithWarmupScheduler(_WithWarmup):
    def _after_warmup(self, initial_lr: float, step: int, max_steps: int) -> float:
        return initial_lr


@dataclass
class WarmupStableDecay(_WithWarmup):
    """Constant after warm-up, then a linear decay to alpha_f times the peak over `decay_steps`.

    Hu et al. 2024 (MiniCPM, arXiv:2404.06395). `decay_steps` None: a tenth of the run.
    """

    alpha_f: float = 0.1
    t_max: int | None = None
    decay_steps: int | None = None

    def _after_warmup(self, initial_lr: float, step: int, max_steps: int) -> float:
        end = max_steps if self.t_max is None else self.t_max
        length = 0.1 * end if self.decay_steps is None else self.decay_steps
        start = max(self.warmup_steps, end - length)
        if step < start:
            return initial_lr
        progress = 1.0 if step >= end else (step - start) / (end - start)
        return initial_lr * (1 - (1 - self.alpha_f) * progress)


@dataclass
class MaxScheduler(Scheduler):
    """The maximum of two schedules."""

    sched1: Scheduler
    sched2: Scheduler

    def get_lr(self, initial_lr: float, step: int, max_steps: int) -> float:
        return max(s.get_lr(initial_lr, step, max_steps) for s in (self.sched1, self.sched2))


@dataclass
class BoltOnWarmupScheduler(Scheduler):
    """Another schedule with a warm-up from 0 in it: for a run that resumes with a new optimizer."""

    inner: Scheduler
    warmup_start: int
    warmup_end: int

    @classmethod
    def wrap(
        cls, scheduler: Scheduler, warmup_start: int, warmup_end: int
    ) -> BoltOnWarmupScheduler:
        """`scheduler`, but 0 before warmup_start, then linear up to its value at warmup_end."""
        return cls(None, None, None, scheduler, warmup_start, warmup_end)

    def get_lr(self, initial_lr: float, step: int, max_steps: int) -> float:
        if step < self.warmup_start:
            return 0.0
        if step >= self.warmup_end:
            return self.inner.get_lr(initial_lr, step, max_steps)
        target = self.inner.get_lr(initial_lr, self.warmup_end, max_steps)
        return target * (step - self.warmup_start) / (self.warmup_end - self.warmup_start)

    def get_max_grad_norm(
        self, initial_max_grad_norm: float | None, step: int, max_steps: int
    ) -> float | None:
        return self.inner.get_max_grad_norm(initial_max_grad_norm, step, max_steps)


def build_scheduler(cfg: TrainConfig, sched_cfg: SchedulerConfig | None = None) -> Scheduler:
    """The schedule that `sched_cfg` (cfg.scheduler by default) describes."""
    config = cfg.scheduler if sched_cfg is None else sched_cfg
    name = SchedulerType(config.name)

    def to_int(value: float | None) -> int | None:
        return None if value is None else int(value)

    shared = (
        to_int(config.grad_clip_warmup_steps),
        config.grad_clip_warmup_factor,
        config.warmup_min_lr,
    )
    warmup, t_max = int(config.t_warmup), to_int(config.t_max)
    if name is SchedulerType.constant:
        return ConstantScheduler(*shared)
    if name is SchedulerType.constant_with_warmup:
        return ConstantWithWarmupScheduler(*shared, warmup)
    if name is SchedulerType.inverse_sqrt_with_warmup:
        return InvSqrtWithWarmup(*shared, warmup)
    if name is SchedulerType.warmup_stable_decay:
        decay = to_int(config.t_decay)
        return WarmupStableDecay(*shared, warmup, config.alpha_f, t_max, decay)
    if name is SchedulerType.max_scheduler:
        parts = (SchedulerType.cosine_with_warmup, SchedulerType.inverse_sqrt_with_warmup)
        return MaxScheduler(
            *shared, *(build_scheduler(cfg, replace(config, name=p)) for p in parts)
        )
    decaying = {
        SchedulerType.cosine_with_warmup: CosWithWarmup,
        SchedulerType.linear_with_warmup: LinearWithWarmup,
        SchedulerType.cosine_linear_envelope: CosLinearEnvelope,
    }
    return decaying[name](*shared, warmup, config.alpha_f, t_max)
