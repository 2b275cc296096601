"""Loops written by hand: as people write them, as tight as they can be made, and that with the step compiled."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.contender import EPOCHS, LOG_EVERY, Job, Watch, log_folder


class Extras:
    """What the typical mode does besides training, by the usual means; nothing in the bare mode."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        val: Callable[[], Iterable[Any]],
    ):
        self.job, self.model, self.optimizer, self.val = job, model, optimizer, val
        self.step, self.correct, self.seen = (
            0,
            torch.zeros((), dtype=torch.int64, device=job.device),
            0,
        )
        if job.typical:
            from torch.utils.tensorboard import SummaryWriter  # the bare loop does not pay for it

            self.writer = SummaryWriter(log_folder(job))

    def after_step(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Count the right ones; at log points read and write what was counted."""
        self.step += 1
        if self.job.typical:
            self.correct += (outputs.argmax(1) == targets).sum()
            self.seen += targets.numel()
        if self.step % LOG_EVERY == 0:
            value = loss.item()
            if self.job.typical:
                self.writer.add_scalar("train/loss", value, self.step)
                self.writer.add_scalar("train/accuracy", self.correct.item() / self.seen, self.step)
                self.correct.zero_()
                self.seen = 0

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        """Validate, log and save."""
        if not self.job.typical:
            return
        self.model.eval()
        loss, correct, seen = 0.0, 0, 0
        for inputs, targets in self.val():
            inputs, targets = inputs.to(self.job.device), targets.to(self.job.device)
            outputs = self.model(inputs)
            loss += F.cross_entropy(outputs, targets).item() * targets.numel()
            correct += (outputs.argmax(1) == targets).sum().item()
            seen += targets.numel()
        self.model.train()
        self.writer.add_scalar("val/loss", loss / seen, self.step)
        self.writer.add_scalar("val/accuracy", correct / seen, self.step)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
        }
        torch.save(state, Path(self.job.folder, "checkpoint.pt"))

    def bar(self, batches: DataLoader, epoch: int) -> Iterable[Any]:
        """A progress bar, where tqdm is installed; else a line an epoch."""
        if not self.job.typical:
            return batches
        with contextlib.suppress(ImportError):
            from tqdm import tqdm  # no dependency of ours

            return tqdm(batches, desc=f"epoch {epoch}", leave=False)
        print(f"epoch {epoch}", file=sys.stderr)
        return batches


def handwritten(job: Job, watch: Watch) -> None:
    """As people write it: a DataLoader, the optimizer with its defaults, `.item()` where something is logged."""
    model, train, val = job.model(), job.loader("train"), job.loader("val")
    optimizer, criterion = torch.optim.AdamW(model.parameters(), lr=job.lr), nn.CrossEntropyLoss()
    watch.on(model, optimizer)
    extras = Extras(job, model, optimizer, lambda: val)
    for epoch in range(EPOCHS):
        for inputs, targets in extras.bar(train, epoch):
            inputs, targets = inputs.to(job.device), targets.to(job.device)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, targets)
            loss.backward()
            optimizer.step()
            extras.after_step(loss, outputs, targets)
        extras.after_epoch(epoch)
        watch.epoch_end()


def tight(job: Job, watch: Watch) -> None:
    """Data in one tensor on the device, a fused optimizer, nothing else."""
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, outputs

    run_tight(job, watch, model, optimizer, step)


def tight_compiled(job: Job, watch: Watch) -> None:
    """The same with the whole step in one graph. torch's `optimizer.step()` breaks it, so AdamW is written out."""
    import torch._dynamo

    if hasattr(
        torch._dynamo.config, "trace_autograd_ops"
    ):  # before torch 2.11 there was no such thing
        torch._dynamo.config.trace_autograd_ops = True
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr)
    parameters = list(model.parameters())
    count = torch.zeros((), device=job.device)
    for parameter in parameters:
        moments = {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        optimizer.state[parameter] = {"step": count, **moments}
    states = [
        (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for p in parameters
    ]

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            count.add_(1)
            size = job.lr / (1 - 0.9**count)
            for (parameter, mean, square), gradient in zip(states, gradients, strict=True):
                mean.lerp_(gradient, 0.1)
                square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                spread = (square / (1 - 0.999**count)).sqrt_().add_(1e-8)
                parameter.mul_(1 - 0.01 * job.lr).sub_(size * mean / spread)
        return loss.detach(), outputs.detach()

    run_tight(job, watch, model, optimizer, torch.compile(step, dynamic=False))


def run_tight(
    job: Job, watch: Watch, model: nn.Module, optimizer: Any, step: Callable[..., Any]
) -> None:
    """Run a step over whole tensors, in a new order each epoch."""
    inputs, targets = (tensor.to(job.device) for tensor in job.tensors("train"))
    val = [tensor.to(job.device) for tensor in job.tensors("val")]
    watch.on(model, optimizer)
    extras = Extras(job, model, optimizer, lambda: slices(*val))
    for epoch in range(EPOCHS):
        if job.typical:
            print(f"epoch {epoch}", file=sys.stderr)
        order = torch.randperm(len(inputs), device=job.device)
        for index in order.split(job.batch_size):
            batch = targets.index_select(0, index)
            loss, outputs = step(inputs.index_select(0, index), batch)
            extras.after_step(loss, outputs, batch)
        extras.after_epoch(epoch)
        watch.epoch_end()


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(256) for tensor in tensors), strict=True)
