"""A callback that logs the wait for data, the memory and the use of the device."""

import time

import torch

from framework import (
    Callback,
    Context,
    PositiveFloat,
    RaggedSplit,
    WindowSplit,
    callbacks,
    dtensors,
    memory,
    read_layers,
    read_spread_samples,
    seconds_of_waiting,
)

PRODUCTS = 8  # of matrices, to measure the peak of a device
SMALLEST = 128  # rows of a matrix
MOST_SECONDS = 0.1  # larger matrices are not multiplied: some CPUs need seconds in fp16


@callbacks.register("speed")
class Speed(Callback):
    """Logs the wait for data, the memory and the use of the device, at logged steps.

    The tags are:

    - speed/data_wait: the share of the time since the last logged step, without validations, in
      which the loop waited for data.
    - speed/memory_gib: the largest memory until now: of tensors on a CUDA device, otherwise the
      resident memory of the process.
    - speed/tokens_per_second: for language models.
    - speed/mfu: model FLOPs utilization: the FLOPs of the forward and backward passes per second
      (three times those of `framework plan`), divided by the peak of the devices (Chowdhery et al.
      2022, arXiv:2204.02311, appendix B). It is not logged for a sharded model, for samples of
      unequal length, and if the model has neither matrix products nor convolutions.

    `train/samples_per_second` is logged without this callback.

    Args:
        peak_tflops: the peak of a device in 10¹² FLOP/s, from its data sheet for the precision of
            the run; null: that of a product of two large matrices, measured when the fit starts.
    """

    changes_training = False

    def __init__(self, peak_tflops: PositiveFloat | None = None):
        self.peak_tflops = peak_tflops
        self.peak = 0.0  # FLOP/s of all devices
        self.flops = 0  # of a sample in a training step
        self.tokens = 0  # of a sample
        self.began = 0.0  # when the time since the last logged step began
        self.samples = 0
        self.waited = 0.0

    def on_fit_start(self, trainer: Context) -> None:
        split = trainer.train_batches.split
        self.tokens = split.length if isinstance(split, WindowSplit) else 0
        self.flops = step_flops(trainer)
        if self.flops:
            own = measured_peak(trainer) if self.peak_tflops is None else self.peak_tflops * 1e12
            self.peak = own * trainer.strategy.world_size
        self._restart(trainer)

    def on_log(self, trainer: Context) -> None:
        seconds = max(time.perf_counter() - self.began, 1e-9)
        rate = (trainer.state.samples - self.samples) / seconds
        waited = seconds_of_waiting(trainer.clock) - self.waited
        values = {
            "speed/data_wait": min(waited / seconds, 1.0),
            "speed/memory_gib": memory.peak_bytes(trainer.device) / 2**30,
        }
        if self.tokens:
            values["speed/tokens_per_second"] = rate * self.tokens
        if self.flops:
            values["speed/mfu"] = rate * self.flops / self.peak
        trainer.log(values)
        self._restart(trainer)

    def on_validation_start(self, trainer: Context) -> None:
        self.began -= time.perf_counter()  # the validation does not count

    def on_validation_end(self, trainer: Context) -> None:
        self.began += time.perf_counter()

    def _restart(self, trainer: Context) -> None:
        self.began = time.perf_counter()
        self.samples = trainer.state.samples
        self.waited = seconds_of_waiting(trainer.clock)


def step_flops(trainer: Context) -> int:
    """Return the FLOPs of a sample in a training step; 0 if they are not known."""
    split = trainer.train_batches.split
    if split is None or isinstance(split, RaggedSplit) or dtensors.has_dtensors(trainer.model):
        return 0
    sample = read_spread_samples(trainer.train_batches, 1, trainer.device)
    layers, _ = read_layers(trainer.model, sample, trainer.task)
    forward = sum(layer.flops for layer in layers)
    return 3 * forward  # the backward pass costs twice as much


def measured_peak(trainer: Context) -> float:
    """Return the FLOP/s of the best of some products of large matrices in the run's precision."""
    device = trainer.device
    largest = 1024 if device.type == "cpu" else 4096
    dtype = trainer.precision.dtype or torch.float32
    size = SMALLEST
    while True:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(PRODUCTS):
            began = time.perf_counter()
            matrix @ matrix
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best = min(best, time.perf_counter() - began)
        if size == largest or best * PRODUCTS > MOST_SECONDS:
            return 2 * size**3 / best
        size *= 2
