"""Keras on torch, with the workloads built from Keras layers; it has no character transformer."""

# mypy: disallow-subclassing-any=false

import os
from pathlib import Path
from typing import Any

from benchmarks.contender import EPOCHS, LOG_EVERY, Job, Watch, log_folder
from benchmarks.workloads import CLASSES, SIDE

os.environ["KERAS_BACKEND"] = "torch"


def build(workload: str) -> Any:
    from keras import Input, Sequential, layers

    if workload == "cnn":
        model = Sequential([Input((SIDE, SIDE, 1))])
        for width in (16, 32):
            model.add(layers.Conv2D(width, 3, padding="same", activation="relu"))
            model.add(layers.MaxPool2D())
        model.add(layers.Flatten())
    else:
        inputs, width = {"mlp": (64, 128), "wide": (SIDE * SIDE, 2048)}[workload]
        model = Sequential([Input((inputs,))])
        for _ in range(2):
            model.add(layers.Dense(width, activation="relu"))
    model.add(layers.Dense(CLASSES))
    return model


def keras(job: Job, watch: Watch) -> None:
    import keras

    model = build(job.workload)
    model.compile(
        optimizer=keras.optimizers.AdamW(job.lr, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"] if job.typical else None,
    )
    inputs, targets = (tensor.numpy() for tensor in job.tensors("train"))
    val_inputs, val_targets = (tensor.numpy() for tensor in job.tensors("val"))
    if job.workload == "cnn":  # channels last is the default layout of Keras
        inputs = inputs.transpose(0, 2, 3, 1)
        val_inputs = val_inputs.transpose(0, 2, 3, 1)

    class RoundEnds(keras.callbacks.Callback):
        # at the start of an epoch, all callbacks of the previous one are done
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch:
                watch.epoch_end()

    watch.updates = lambda: int(model.optimizer.iterations)
    watch.loss = lambda: loss_of(model, inputs[:512], targets[:512])
    callbacks = []
    if job.typical:
        checkpoint = str(Path(job.folder, "checkpoint.keras"))
        callbacks = [writer(job), keras.callbacks.ModelCheckpoint(checkpoint)]
    model.fit(
        inputs,
        targets,
        batch_size=job.batch_size,
        epochs=EPOCHS,
        validation_data=(val_inputs, val_targets) if job.typical else None,
        validation_batch_size=256,
        callbacks=[*callbacks, RoundEnds()],
        verbose=int(job.typical),
    )


def writer(job: Job) -> Any:
    """Return a callback that writes to TensorBoard; the one of Keras needs TensorFlow."""
    import keras
    from torch.utils.tensorboard import SummaryWriter

    class Writer(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.board = SummaryWriter(log_folder(job))
            self.step = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.step += 1
            if self.step % LOG_EVERY == 0:
                self.write("train", logs)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.write("epoch", logs)

        def write(self, group: str, logs: Any) -> None:
            for name, value in logs.items():
                self.board.add_scalar(f"{group}/{name}", float(value), self.step)

    return Writer()


def loss_of(model: Any, inputs: Any, targets: Any) -> float:
    outputs = model(inputs, training=False)
    return float(model.loss(targets, outputs))
