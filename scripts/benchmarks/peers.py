"""Loops of other frameworks, written as in their documentation. They run in their own environment.

In the typical mode, each logs loss and accuracy to TensorBoard every 50 steps (poutyne: every
epoch), validates and saves in each epoch, and shows a progress bar. In the bare mode, all of that
is off. `RoundEnds` counts an epoch when all its callbacks are done, mostly at the start of the next
one.
"""

# mypy: disallow-subclassing-any=false

import contextlib
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contender import EPOCHS, LOG_EVERY, Job, Watch, log_folder

warnings.filterwarnings("ignore")


def adamw(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=job.lr)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def lightning(job: Job, watch: Watch) -> None:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()
            self.criterion = nn.CrossEntropyLoss()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.evaluate("train", batch, on_step=True)

        def validation_step(self, batch: Any, index: int) -> Tensor:
            return self.evaluate("val", batch, on_step=False)

        def evaluate(self, split: str, batch: Any, on_step: bool) -> Tensor:
            outputs = self.model(batch[0])
            loss: Tensor = self.criterion(outputs, batch[1])
            if job.typical:
                values = {f"{split}/loss": loss, f"{split}/accuracy": accuracy(outputs, batch[1])}
                self.log_dict(values, on_step=on_step, on_epoch=not on_step, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = adamw(job, self)
            watch.on(self.model, optimizer)
            return optimizer

    class RoundEnds(L.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch:
                watch.epoch_end()

    callbacks: list[Any] = [RoundEnds()]
    if job.typical:
        callbacks.append(ModelCheckpoint(job.folder))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        logger=TensorBoardLogger(job.folder) if job.typical else False,
        callbacks=callbacks,
        enable_checkpointing=job.typical,
        enable_progress_bar=job.typical,
        enable_model_summary=False,
        log_every_n_steps=LOG_EVERY,
        num_sanity_val_steps=0,
        devices=1,
    )
    trainer.fit(Module(), job.loader("train"), job.loader("val") if job.typical else None)


def accelerate(job: Job, watch: Watch) -> None:
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(
        log_with="tensorboard" if job.typical else None, project_dir=job.folder
    )
    if job.typical:
        accelerator.init_trackers("run")
    model = job.model()
    optimizer = adamw(job, model)
    model, optimizer, train, val = accelerator.prepare(
        model, optimizer, job.loader("train"), job.loader("val")
    )
    criterion = nn.CrossEntropyLoss()
    step = 0
    watch.on(model, optimizer)
    for _ in range(EPOCHS):
        for inputs, targets in tqdm(train, leave=False) if job.typical else train:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, targets)
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            if job.typical and step % LOG_EVERY == 0:
                values = {
                    "train/loss": loss.item(),
                    "train/accuracy": accuracy(outputs, targets).item(),
                }
                accelerator.log(values, step=step)
        if job.typical:
            accelerator.log(validate(accelerator, model, val), step=step)
            accelerator.save_state(str(Path(job.folder, "checkpoint")))
        watch.epoch_end()


@torch.no_grad()
def validate(accelerator: Any, model: nn.Module, batches: Any) -> dict[str, float]:
    model.eval()
    found = [
        accelerator.gather_for_metrics((model(inputs), targets)) for inputs, targets in batches
    ]
    model.train()
    outputs, targets = map(torch.cat, zip(*found, strict=True))
    loss = nn.functional.cross_entropy(outputs, targets)
    return {"val/loss": loss.item(), "val/accuracy": accuracy(outputs, targets).item()}


def transformers(job: Job, watch: Watch) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model()
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = self.model(inputs)
            return {"loss": self.criterion(outputs, labels), "logits": outputs}

    class RoundEnds(TrainerCallback):
        def on_epoch_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if watch.loss is None:
                watch.on(module.model, optimizer)
            else:
                watch.epoch_end()

    def rows(split: str) -> list[dict[str, Tensor]]:
        return [{"inputs": x, "labels": y} for x, y in zip(*job.tensors(split), strict=True)]

    def compute_metrics(predicted: Any) -> dict[str, float]:
        correct = predicted.predictions.argmax(1) == predicted.label_ids
        return {"accuracy": float(correct.mean())}

    module = Module()
    arguments = TrainingArguments(
        output_dir=job.folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=256,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        optim="adamw_torch",
        logging_steps=LOG_EVERY,
        logging_strategy="steps" if job.typical else "no",
        eval_strategy="epoch" if job.typical else "no",
        save_strategy="epoch" if job.typical else "no",
        save_total_limit=1,
        report_to="tensorboard" if job.typical else "none",
        disable_tqdm=not job.typical,
        use_cpu=job.device == "cpu",
    )
    trainer = Trainer(
        module,
        arguments,
        train_dataset=rows("train"),
        eval_dataset=rows("val"),
        compute_metrics=compute_metrics,
        callbacks=[RoundEnds()],
    )
    trainer.train()


def ignite(job: Job, watch: Watch) -> None:
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import (
        Checkpoint,
        DiskSaver,
        ProgressBar,
        TensorboardLogger,
        global_step_from_engine,
    )
    from ignite.metrics import Accuracy, Loss

    model = job.model()
    criterion = nn.CrossEntropyLoss()
    optimizer = adamw(job, model)
    watch.on(model, optimizer)
    engine = create_supervised_trainer(
        model,
        optimizer,
        criterion,
        device=job.device,
        output_transform=lambda x, y, outputs, loss: (outputs, y, loss),
    )
    if job.typical:
        scores = {"accuracy": Accuracy(), "loss": Loss(criterion)}
        evaluator = create_supervised_evaluator(model, scores, device=job.device)
        Accuracy(output_transform=lambda output: output[:2]).attach(engine, "accuracy")
        ProgressBar().attach(engine, output_transform=lambda output: {"loss": output[2].item()})
        val = job.loader("val")
        writer = TensorboardLogger(log_dir=log_folder(job))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(val))
        writer.attach_output_handler(
            engine,
            Events.ITERATION_COMPLETED(every=LOG_EVERY),
            tag="train",
            output_transform=lambda output: {"loss": output[2], "accuracy": accuracy(*output[:2])},
        )
        step = global_step_from_engine(engine)
        writer.attach_output_handler(
            evaluator,
            Events.EPOCH_COMPLETED,
            tag="val",
            metric_names="all",
            global_step_transform=step,
        )
        saver = Checkpoint(
            {"model": model, "optimizer": optimizer}, DiskSaver(job.folder, require_empty=False)
        )
        engine.add_event_handler(Events.EPOCH_COMPLETED, saver)
    engine.add_event_handler(Events.EPOCH_COMPLETED, watch.epoch_end)
    engine.run(job.loader("train"), max_epochs=EPOCHS)


def skorch(job: Job, watch: Watch) -> None:
    from skorch import NeuralNet
    from skorch.callbacks import Callback, Checkpoint, EpochScoring, ProgressBar
    from skorch.helper import predefined_split
    from torch.utils.data import TensorDataset

    class RoundEnds(Callback):
        def on_train_begin(self, net: Any, **kwargs: Any) -> None:
            watch.on(net.module_, net.optimizer_)

        def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
            if len(net.history) > 1:
                watch.epoch_end()

    class Writer(Callback):
        def initialize(self) -> Any:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(log_folder(job))
            self.step = 0
            return self

        def on_batch_end(
            self, net: Any, batch: Any, training: bool, loss: Tensor, y_pred: Tensor, **kwargs: Any
        ) -> None:
            self.step += training
            if training and self.step % LOG_EVERY == 0:
                correct = accuracy(y_pred, batch[1]).item()
                self.writer.add_scalar("train/loss", loss.item(), self.step)
                self.writer.add_scalar("train/accuracy", correct, self.step)

        def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
            for name in ("valid_loss", "valid_accuracy"):
                self.writer.add_scalar(name, net.history[-1, name], self.step)

    def score(net: Any, data: Any, targets: Any) -> float:
        outputs = torch.as_tensor(net.predict(data))
        return accuracy(outputs, job.tensors("val")[1]).item()

    callbacks: list[Any] = []
    settings: dict[str, Any] = {}
    if job.typical:
        callbacks = [
            EpochScoring(score, name="valid_accuracy", lower_is_better=False),
            Writer(),
            ProgressBar(),
            Checkpoint(dirname=job.folder, monitor=None),
        ]
        validation = predefined_split(TensorDataset(*job.tensors("val")))
        settings["train_split"] = validation
    else:
        settings["train_split"] = None
        settings["callbacks__print_log"] = None
    net = NeuralNet(
        job.model(),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=job.lr,
        batch_size=job.batch_size,
        max_epochs=EPOCHS,
        iterator_train__shuffle=True,
        iterator_valid__batch_size=256,
        callbacks=[*callbacks, RoundEnds()],
        device=job.device,
        verbose=int(job.typical),
        **settings,
    )
    net.fit(*job.tensors("train"))


def fastai(job: Job, watch: Watch) -> None:
    from fastai.basics import DataLoader, DataLoaders, Learner, OptimWrapper
    from fastai.callback.core import Callback, CancelValidException
    from fastai.callback.tracker import SaveModelCallback
    from fastai.metrics import accuracy as accuracy_metric
    from torch.utils.data import TensorDataset

    class RoundEnds(Callback):
        order = 100

        def before_epoch(self) -> None:
            if self.learn.epoch:
                watch.epoch_end()
            else:
                watch.on(self.learn.model, self.learn.opt.opt)

    class NoValidation(Callback):
        def before_validate(self) -> None:
            raise CancelValidException

    class Writer(Callback):
        order = 90  # after the recorder

        def before_fit(self) -> None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(log_folder(job))
            self.step = 0

        def after_batch(self) -> None:
            self.step += self.learn.training
            if self.learn.training and self.step % LOG_EVERY == 0:
                correct = accuracy(self.learn.pred, *self.learn.yb).item()
                self.writer.add_scalar("train/loss", self.learn.loss.item(), self.step)
                self.writer.add_scalar("train/accuracy", correct, self.step)

        def after_epoch(self) -> None:
            self.writer.add_scalar("val/loss", self.learn.recorder.values[-1][1], self.step)

    train = TensorDataset(*job.tensors("train"))
    val = TensorDataset(*job.tensors("val"))
    train_loader = DataLoader(train, bs=job.batch_size, shuffle=True, device=job.device)
    val_loader = DataLoader(val, bs=256, device=job.device)
    callbacks: list[Any] = [RoundEnds()]
    if job.typical:
        callbacks += [SaveModelCallback(every_epoch=True, with_opt=True), Writer()]
    else:
        callbacks.append(NoValidation())
    learner = Learner(
        DataLoaders(train_loader, val_loader, device=job.device),
        job.model(),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        lr=job.lr,
        metrics=[partial(accuracy_metric, axis=1)] if job.typical else [],
        cbs=callbacks,
        path=job.folder,
    )
    with contextlib.ExitStack() as quiet:
        if not job.typical:
            quiet.enter_context(learner.no_bar())
            quiet.enter_context(learner.no_logging())
        learner.fit(EPOCHS, job.lr)


def poutyne(job: Job, watch: Watch) -> None:
    from poutyne import Callback, Model, ModelCheckpoint, TensorBoardLogger
    from torch.utils.tensorboard import SummaryWriter

    class RoundEnds(Callback):
        def on_epoch_end(self, epoch_number: int, logs: dict[str, Any]) -> None:
            watch.epoch_end()

    network = job.model()
    optimizer = adamw(job, network)
    watch.on(network, optimizer)
    callbacks: list[Any] = []
    if job.typical:
        file = str(Path(job.folder, "checkpoint.pt"))
        callbacks = [TensorBoardLogger(SummaryWriter(log_folder(job))), ModelCheckpoint(file)]
    model = Model(
        network,
        optimizer,
        nn.CrossEntropyLoss(),
        batch_metrics=["accuracy"] if job.typical else [],
        device=job.device,
    )
    model.fit_generator(
        job.loader("train"),
        job.loader("val") if job.typical else None,
        epochs=EPOCHS,
        callbacks=[*callbacks, RoundEnds()],
        verbose=job.typical,
    )
