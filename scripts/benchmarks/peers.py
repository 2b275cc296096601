"""Loops of other frameworks, each as its documentation writes it. They run in an environment of theirs, not in ours.

In the typical mode each logs loss and accuracy to TensorBoard every 50 steps (poutyne's logger: every epoch, which is
less), validates and saves each epoch and shows its bar. In the bare mode all of that is switched off.
"""

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
            self.model, self.criterion = job.model(), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.look("train", batch, on_step=True)

        def validation_step(self, batch: Any, index: int) -> Tensor:
            return self.look("val", batch, on_step=False)

        def look(self, split: str, batch: Any, on_step: bool) -> Tensor:
            outputs = self.model(batch[0])
            loss = self.criterion(outputs, batch[1])
            if job.typical:
                values = {f"{split}/loss": loss, f"{split}/accuracy": accuracy(outputs, batch[1])}
                self.log_dict(values, on_step=on_step, on_epoch=not on_step, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = adamw(job, self)
            watch.on(self.model, optimizer)
            return optimizer

    class RoundEnds(L.Callback):
        def on_train_epoch_start(
            self, trainer: Any, module: Any
        ) -> None:  # when the epoch before is wholly done
            if trainer.current_epoch:
                watch.epoch_end()

    L.Trainer(
        max_epochs=EPOCHS,
        logger=TensorBoardLogger(job.folder) if job.typical else False,
        callbacks=[RoundEnds(), *([ModelCheckpoint(job.folder)] if job.typical else [])],
        enable_checkpointing=job.typical,
        enable_progress_bar=job.typical,
        enable_model_summary=False,
        log_every_n_steps=LOG_EVERY,
        num_sanity_val_steps=0,
        devices=1,
    ).fit(Module(), job.loader("train"), job.loader("val") if job.typical else None)


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
    criterion, step = nn.CrossEntropyLoss(), 0
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
    outputs, targets = (torch.cat(each) for each in zip(*found, strict=True))
    loss = nn.functional.cross_entropy(outputs, targets)
    return {"val/loss": loss.item(), "val/accuracy": accuracy(outputs, targets).item()}


def transformers(job: Job, watch: Watch) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.criterion = job.model(), nn.CrossEntropyLoss()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = self.model(inputs)
            return {"loss": self.criterion(outputs, labels), "logits": outputs}

    class RoundEnds(TrainerCallback):
        def on_epoch_begin(self, *given: Any, optimizer: Any = None, **others: Any) -> None:
            if watch.loss is None:
                watch.on(module.model, optimizer)
            else:
                watch.epoch_end()

    def rows(split: str) -> list[dict[str, Tensor]]:
        return [{"inputs": x, "labels": y} for x, y in zip(*job.tensors(split), strict=True)]

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
    Trainer(
        module,
        arguments,
        train_dataset=rows("train"),
        eval_dataset=rows("val"),
        compute_metrics=lambda seen: {
            "accuracy": float((seen.predictions.argmax(1) == seen.label_ids).mean())
        },
        callbacks=[RoundEnds()],
    ).train()


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

    model, criterion = job.model(), nn.CrossEntropyLoss()
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
        val, writer = job.loader("val"), TensorboardLogger(log_dir=log_folder(job))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(val))
        writer.attach_output_handler(
            *(engine, Events.ITERATION_COMPLETED(every=LOG_EVERY)),
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
        def on_train_begin(self, net: Any, **given: Any) -> None:
            watch.on(net.module_, net.optimizer_)

        def on_epoch_begin(
            self, net: Any, **given: Any
        ) -> None:  # when the callbacks of the epoch before are done
            if len(net.history) > 1:
                watch.epoch_end()

    class Writer(Callback):
        def initialize(self) -> Any:
            from torch.utils.tensorboard import SummaryWriter

            self.writer, self.step = SummaryWriter(log_folder(job)), 0
            return self

        def on_batch_end(
            self, net: Any, batch: Any, training: bool, loss: Tensor, y_pred: Tensor, **given: Any
        ) -> None:
            self.step += training
            if training and self.step % LOG_EVERY == 0:
                self.writer.add_scalar("train/loss", loss.item(), self.step)
                self.writer.add_scalar(
                    "train/accuracy", accuracy(y_pred, batch[1]).item(), self.step
                )

        def on_epoch_end(self, net: Any, **given: Any) -> None:
            for name in ("valid_loss", "valid_accuracy"):
                self.writer.add_scalar(name, net.history[-1, name], self.step)

    def score(net: Any, data: Any, targets: Any) -> float:
        return float(
            (torch.as_tensor(net.predict(data)).argmax(1) == job.tensors("val")[1]).float().mean()
        )

    extras = [
        EpochScoring(score, name="valid_accuracy", lower_is_better=False),
        Writer(),
        ProgressBar(),
    ]
    NeuralNet(
        job.model(),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=job.lr,
        batch_size=job.batch_size,
        max_epochs=EPOCHS,
        train_split=predefined_split(TensorDataset(*job.tensors("val"))) if job.typical else None,
        iterator_train__shuffle=True,
        iterator_valid__batch_size=256,
        callbacks=[
            *([*extras, Checkpoint(dirname=job.folder, monitor=None)] if job.typical else []),
            RoundEnds(),
        ],
        **({} if job.typical else {"callbacks__print_log": None}),
        device=job.device,
        verbose=int(job.typical),
    ).fit(*job.tensors("train"))


def fastai(job: Job, watch: Watch) -> None:
    from fastai.basics import DataLoader, DataLoaders, Learner, OptimWrapper
    from fastai.callback.core import Callback, CancelValidException
    from fastai.callback.tracker import SaveModelCallback
    from fastai.metrics import accuracy as accuracy_metric
    from torch.utils.data import TensorDataset

    class RoundEnds(Callback):
        order = 100

        def before_epoch(self) -> None:  # when the callbacks of the epoch before are done
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

            self.writer, self.step = SummaryWriter(log_folder(job)), 0

        def after_batch(self) -> None:
            self.step += self.learn.training
            if self.learn.training and self.step % LOG_EVERY == 0:
                self.writer.add_scalar("train/loss", self.learn.loss.item(), self.step)
                self.writer.add_scalar(
                    "train/accuracy", accuracy(self.learn.pred, *self.learn.yb).item(), self.step
                )

        def after_epoch(self) -> None:
            self.writer.add_scalar("val/loss", self.learn.recorder.values[-1][1], self.step)

    train, val = (TensorDataset(*job.tensors(name)) for name in ("train", "val"))
    loaders = [DataLoader(train, bs=job.batch_size, shuffle=True, device=job.device)]
    loaders += [DataLoader(val, bs=256, device=job.device)]
    extras = (
        [SaveModelCallback(every_epoch=True, with_opt=True), Writer()]
        if job.typical
        else [NoValidation()]
    )
    learner = Learner(
        DataLoaders(*loaders, device=job.device),
        job.model(),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        lr=job.lr,
        metrics=[partial(accuracy_metric, axis=1)] if job.typical else [],
        cbs=[RoundEnds(), *extras],
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
        def on_epoch_end(self, epoch_number: int, logs: dict) -> None:
            watch.epoch_end()

    network = job.model()
    optimizer = adamw(job, network)
    watch.on(network, optimizer)
    extras = []
    if job.typical:
        file = str(Path(job.folder, "checkpoint.pt"))
        extras = [TensorBoardLogger(SummaryWriter(log_folder(job))), ModelCheckpoint(file)]
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
        callbacks=[*extras, RoundEnds()],
        verbose=job.typical,
    )
