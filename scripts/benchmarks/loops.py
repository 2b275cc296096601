"""Hand-written loops: the usual one, a tight one, and the tight one with a compiled step."""

# mypy: allow-untyped-calls

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
    """Logging, validation and checkpoints of the typical mode; without effect in the bare mode."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        val: Callable[[], Iterable[Any]],
    ):
        self.job = job
        self.model = model
        self.optimizer = optimizer
        self.val = val
        self.step = 0
        self.correct = torch.zeros((), dtype=torch.int64, device=job.device)
        self.seen = 0
        if job.typical:
            from torch.utils.tensorboard import SummaryWriter  # the bare loop does not import it

            self.writer = SummaryWriter(log_folder(job))

    def after_step(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Count the correct predictions; write loss and accuracy at log points."""
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
        loss = 0.0
        correct = 0.0
        seen = 0
        for batch in self.val():
            inputs, targets = (tensor.to(self.job.device) for tensor in batch)
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

    def bar(self, batches: DataLoader[Any], epoch: int) -> Iterable[Any]:
        """Show a progress bar if tqdm is installed, otherwise one line for each epoch."""
        if not self.job.typical:
            return batches
        try:
            from tqdm import tqdm  # `scripts/setup` installs it, as a dependency of optuna
        except ImportError:
            print(f"epoch {epoch}", file=sys.stderr)
            return batches
        bar: Iterable[Any] = tqdm(batches, desc=f"epoch {epoch}", leave=False)
        return bar


def handwritten(job: Job, watch: Watch) -> None:
    """Train with the usual loop: a DataLoader, a default optimizer and `.item()` for logging."""
    model = job.model()
    train = job.loader("train")
    val = job.loader("val")
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr)
    criterion = nn.CrossEntropyLoss()
    watch.on(model, optimizer)
    extras = Extras(job, model, optimizer, lambda: val)
    for epoch in range(EPOCHS):
        for batch in extras.bar(train, epoch):
            inputs, targets = (tensor.to(job.device) for tensor in batch)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, targets)
            loss.backward()
            optimizer.step()
            extras.after_step(loss, outputs, targets)
        extras.after_epoch(epoch)
        watch.epoch_end()


def tight(job: Job, watch: Watch) -> None:
    """Train with the data in one tensor on the device, a fused optimizer and nothing else."""
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
    """Train with the complete step in one graph.

    torch's `optimizer.step()` breaks the graph, therefore AdamW is written out.
    """
    import torch._dynamo

    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # since torch 2.11
        torch._dynamo.config.trace_autograd_ops = True
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr)
    parameters = list(model.parameters())
    count = torch.zeros((), device=job.device)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": count,
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    states = [optimizer.state[parameter] for parameter in parameters]
    means = [state["exp_avg"] for state in states]
    squares = [state["exp_avg_sq"] for state in states]

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            count.add_(1)
            size = job.lr / (1 - 0.9**count)
            for parameter, mean, square, gradient in zip(
                parameters, means, squares, gradients, strict=True
            ):
                mean.lerp_(gradient, 0.1)
                square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                spread = (square / (1 - 0.999**count)).sqrt_().add_(1e-8)
                parameter.mul_(1 - 0.01 * job.lr).sub_(size * mean / spread)
        return loss.detach(), outputs.detach()

    run_tight(job, watch, model, optimizer, torch.compile(step, dynamic=False))


def run_tight(
    job: Job, watch: Watch, model: nn.Module, optimizer: Any, step: Callable[..., Any]
) -> None:
    """Run a step over the batches of complete tensors, in a new order in each epoch."""
    inputs, targets = (tensor.to(job.device) for tensor in job.tensors("train"))
    val = [tensor.to(job.device) for tensor in job.tensors("val")]
    watch.on(model, optimizer)
    extras = Extras(job, model, optimizer, lambda: slices(*val))
    for epoch in range(EPOCHS):
        if job.typical:
            print(f"epoch {epoch}", file=sys.stderr)
        order = torch.randperm(len(inputs), device=job.device)
        for index in torch.split(order, job.batch_size):
            batch = targets.index_select(0, index)
            loss, outputs = step(inputs.index_select(0, index), batch)
            extras.after_step(loss, outputs, batch)
        extras.after_epoch(epoch)
        watch.epoch_end()


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, 256) for tensor in tensors), strict=True)
