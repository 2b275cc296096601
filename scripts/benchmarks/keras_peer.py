"""Keras on torch. It has layers and optimizers of its own, so the models are built anew; no character transformer."""

import os
from pathlib import Path
from typing import Any

from benchmarks.contender import EPOCHS, LOG_EVERY, Job, Watch, log_folder
from benchmarks.workloads import CLASSES, SIDE

os.environ["KERAS_BACKEND"] = "torch"


def build(workload: str) -> Any:
    from keras import Input, Sequential, layers

    if workload == "cnn":
        pairs = [
            (layers.Conv2D(width, 3, padding="same", activation="relu"), layers.MaxPool2D())
            for width in (16, 32)
        ]
        hidden: list[Any] = [layer for pair in pairs for layer in pair] + [layers.Flatten()]
        shape: tuple[int, ...] = (SIDE, SIDE, 1)
    else:
        inputs, width = {"mlp": (64, 128), "wide": (SIDE * SIDE, 2048)}[workload]
        hidden, shape = [layers.Dense(width, activation="relu") for _ in range(2)], (inputs,)
    return Sequential([Input(shape), *hidden, layers.Dense(CLASSES)])


def keras(job: Job, watch: Watch) -> None:
    import keras

    model = build(job.workload)
    model.compile(
        optimizer=keras.optimizers.AdamW(job.lr, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"] if job.typical else None,
    )
    (inputs, targets), val = (
        [part.numpy() for part in job.tensors(name)] for name in ("train", "val")
    )
    if job.workload == "cnn":  # channels last is the layout that it has by default
        inputs, val[0] = inputs.transpose(0, 2, 3, 1), val[0].transpose(0, 2, 3, 1)

    class RoundEnds(keras.callbacks.Callback):
        def on_epoch_begin(
            self, epoch: int, logs: Any = None
        ) -> None:  # when the epoch before is wholly done
            if epoch:
                watch.epoch_end()

    watch.updates = lambda: int(model.optimizer.iterations)
    watch.loss = lambda: loss_of(model, inputs[:512], targets[:512])
    extras = []
    if job.typical:
        extras = [
            writer(job),
            keras.callbacks.ModelCheckpoint(str(Path(job.folder, "checkpoint.keras"))),
        ]
    model.fit(
        *(inputs, targets),
        batch_size=job.batch_size,
        epochs=EPOCHS,
        validation_data=tuple(val) if job.typical else None,
        validation_batch_size=256,
        callbacks=[*extras, RoundEnds()],
        verbose=int(job.typical),
    )


def writer(job: Job) -> Any:
    """Return what writes to TensorBoard; the one of Keras needs TensorFlow."""
    import keras
    from torch.utils.tensorboard import SummaryWriter

    class Writer(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.board, self.step = SummaryWriter(log_folder(job)), 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.step += 1
            if self.step % LOG_EVERY == 0:
                self.write("train", logs)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.write("epoch", logs)

        def write(self, where: str, logs: Any) -> None:
            for name, value in logs.items():
                self.board.add_scalar(f"{where}/{name}", float(value), self.step)

    return Writer()


def loss_of(model: Any, inputs: Any, targets: Any) -> float:
    outputs = model(inputs, training=False)
    return float(model.loss(targets, outputs))
