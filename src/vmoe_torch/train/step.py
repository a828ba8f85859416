"""One update of the weights: forwards, backwards, clipping, the optimiser, the moving average."""

import contextlib

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from vmoe_torch.control import auxiliary_loss
from vmoe_torch.layers.loss_scale import follow_loss_scale
from vmoe_torch.parallel import clip_grad_norm
from vmoe_torch.train.config import PRECISIONS, Config
from vmoe_torch.train.mixup import DirichletMixup
from vmoe_torch.train.nonfinite import FiniteWatch
from vmoe_torch.train.process_group import Processes
from vmoe_torch.train.state import RunState


class Update:
    """Called with the batches of one update, changes the state of the run by it.

    Args:
        config: of the run.
        group: its processes.
        state: what an update changes; counting updates is left to the caller.
        loss: of logits (B, N) and targets.
        mixup: of images and labels, or None.
        schedule: of the learning rate, or None.

    Attributes:
        watch: knows the first update whose loss or clipped gradient was not finite.
    """

    def __init__(
        self,
        config: Config,
        group: Processes,
        state: RunState,
        loss: nn.Module,
        mixup: Mixup | DirichletMixup | None,
        schedule: Scheduler | None,
    ):
        self.group = group
        self.device = group.device
        self.state = state
        self.loss = loss
        self.mixup = mixup
        self.schedule = schedule
        self.clip_norm = config.optim.clip_norm
        self.spread = config.parallel.enabled
        self.watch = FiniteWatch(group.device)
        self.dtype = PRECISIONS[config.run.precision]
        self.model = state.model if self.spread else group.replicate(state.model)
        # A spread model compiles its parts itself.
        if config.run.compile and not self.spread:
            self.model = torch.compile(self.model)

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """One update from the batches of its accumulation steps.

        Args:
            batches: of images (B, C, H, W) and labels (B,), on any device.

        Returns:
            0-dim norm of the gradient before clipping, where it clips.
        """
        state = self.state
        if self.schedule is not None:
            self.schedule.step_update(state.update)
        state.optimizer.zero_grad(set_to_none=True)
        for step, (images, labels) in enumerate(batches):
            self._backward(images, labels, len(batches), is_last=step + 1 == len(batches))
        norm = None
        if self.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            clip = clip_grad_norm if self.spread else nn.utils.clip_grad_norm_
            norm = clip(state.model.parameters(), self.clip_norm)
            if not state.scaler.is_enabled():
                # With loss scaling an infinite gradient is no accident: the scaler skips that update.
                self.watch.note(norm, state.update + 1)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None:
            state.ema.update(state.model, step=state.update + 1)
        return norm

    def _backward(self, images: Tensor, labels: Tensor, steps: int, is_last: bool) -> None:
        """Adds one accumulation step's share to the gradients, and its sums to the meter."""
        state = self.state
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        inputs, targets = images, labels
        if self.mixup is not None:
            # Of clips all frames alike: as if they were channels.
            inputs, targets = self.mixup(images.flatten(1, -3), labels)
            inputs = inputs.view_as(images)
        # A spread model adds up its gradients' parts, reduced at every step.
        shared = self.spread or self.group.world_size == 1 or is_last
        with contextlib.nullcontext() if shared else self.model.no_sync():
            with self.autocast():
                logits = self.model(inputs)
            loss = self.loss(logits.float(), targets)
            # Detached where the layers inject its gradient themselves.
            auxiliary = auxiliary_loss(state.model).to(self.device)
            total = loss + auxiliary
            follow_loss_scale(total)
            state.scaler.scale(total / steps).backward()
        self.watch.note(loss, state.update + 1)
        state.meter.add(logits, labels, loss, auxiliary)

    def autocast(self) -> torch.autocast:
        """The run's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
