"""The strategy ddp: several processes give the result of one."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import framework as fw
from distributed_runs import run_in_processes
from fits import Record
from framework import Callback, Step, Task, TensorSplit, Trainer
from framework.errors import DataError, SettingError
from framework_plugins.layers.norms import FeatureBatchNorm

torch.manual_seed(7)
INPUTS = torch.randn(70, 6)
CLASSES = (INPUTS @ torch.randn(6, 3)).argmax(1)
SPLIT = TensorSplit(INPUTS, CLASSES)
VAL = TensorSplit(INPUTS[:21] + 0.1, CLASSES[:21])
ORDER = INPUTS[:, 0].argsort()
SORTED = [(INPUTS[ORDER], CLASSES[ORDER])]
DOUBLE_65 = TensorSplit(INPUTS[:65].double(), CLASSES[:65])
DOUBLE = TensorSplit(INPUTS.double(), CLASSES)


def mlp(norm=None):
    torch.manual_seed(3)
    norms = [] if norm is None else [norm]
    return nn.Sequential(nn.Linear(6, 16), *norms, nn.Tanh(), nn.Linear(16, 3))


def trained(data=SPLIT, model=None, *, task=None, **settings):
    """Fit a model in this process; return its weights and the logged values."""
    model = mlp() if model is None else model
    fit = {"batch_size": 16, "val": VAL}
    fit |= {key: settings.pop(key) for key in ("batch_size", "val", "metrics") if key in settings}
    record = Record()
    strategy = settings.pop("strategy", None) or fw.strategies.build("auto")
    # sqrt(eps) is large, since Adam would amplify rounding in gradients that are nearly 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=False)
    trainer = Trainer(
        **{"max_epochs": 3, "log_every": "1steps", "device": "cpu"} | settings,
        strategy=strategy,
        loggers=[record],
    )
    trainer.fit(model, data, task=task or nn.CrossEntropyLoss(), optimizer=optimizer, **fit)
    losses = {name: record.of(name) for name in ("train/loss", "val/loss")}
    return {"weights": dict(model.state_dict()), "losses": losses, "lines": record.lines}


class Center(nn.Module):
    """Subtracts a running mean, which is a buffer that a forward pass changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("mask", torch.ones(16, dtype=torch.bool))
        self.register_buffer("waves", torch.ones(3, dtype=torch.complex64), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean * self.mask


class HalfUsed(nn.Module):
    """Uses one layer for large first inputs only, and another one never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Linear(6, 3)
        self.sometimes = nn.Linear(6, 3)
        self.never = nn.Linear(6, 3)

    def forward(self, x):
        outputs = self.body(x)
        large = x[:, 0] > 1.0
        if large.any():
            outputs = outputs + self.sometimes(x) * large[:, None]
        return outputs


class NormOfSome(nn.Module):
    """Normalizes the rows with large first inputs, of which a process may have none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        outputs = self.body(x)
        large = x[:, 0] > INPUTS[:, 0].median()
        normal = torch.zeros_like(outputs).index_put((large,), self.norm(outputs[large]))
        return outputs + normal


def weighted_loss():
    return nn.CrossEntropyLoss(torch.tensor([0.2, 3.0, 1.0]), ignore_index=1)


def normal(kind, **settings):
    return lambda: mlp(kind(16, **settings))


CASES = {
    "plain": {},
    "accumulate": {"accumulate": 3},  # 5 batches: the last window and the last batch are smaller
    "one row more": {"data": TensorSplit(INPUTS[:65], CLASSES[:65])},  # a last batch of one row
    "small validation": {"val": TensorSplit(INPUTS[:1], CLASSES[:1])},
    "weights": {"task": weighted_loss, "accumulate": 2},
    "micro-batches": {"micro_batch": 3},
    "batch norm": {"model": normal(nn.BatchNorm1d)},
    "mean of all batches": {"model": normal(nn.BatchNorm1d, momentum=None, affine=False)},
    "feature norm": {"model": normal(FeatureBatchNorm)},
    "unused": {"model": HalfUsed},
    "sam": {"callbacks": ["sam"]},
    "sam, accumulate": {"callbacks": ["sam", "clip_gradients"], "accumulate": 2},
    "swa": {"callbacks": ["swa"], "model": normal(nn.BatchNorm1d)},
    "ema": {"callbacks": ["ema"]},
    "lookahead": {"callbacks": ["lookahead"]},
    "norm of some": {"model": NormOfSome, "data": SORTED},
    "double, one row more": {"data": DOUBLE_65, "val": DOUBLE, "model": lambda: mlp().double()},
    "double": {"data": DOUBLE, "val": DOUBLE, "model": lambda: mlp().double()},
    "a list": {"data": list(zip(INPUTS.split(9), CLASSES.split(9), strict=True))},
    "shuffled": {"data": "shuffled"},
    "iterable": {"data": "iterable"},
    "weighted sampling": {"data": {"sampling": "weighted", "shuffle": True}},
    "limit": {"data": {"limit": 2, "shuffle": True}},
    "workers": {"data": {"read": "workers", "workers": 2, "shuffle": True}},
    "checkpointing": {"model": normal(nn.BatchNorm1d), "callbacks": ["activation_checkpointing"]},
    "gradient penalty": {"model": normal(nn.BatchNorm1d), "task": "penalty"},
    "deterministic": {"deterministic": True},
    "profile": {"profile": True},
}


class Penalty(Task):
    """Penalizes the gradient of the outputs at the inputs."""

    def step(self, model, batch):
        inputs = batch[0].clone().requires_grad_()
        with torch.enable_grad():
            outputs = model(inputs)
            (slope,) = torch.autograd.grad(outputs.square().sum(), inputs, create_graph=True)
        loss = nn.functional.cross_entropy(outputs, batch[1])
        return Step(loss + 0.1 * slope.square().sum(1).mean(), outputs, batch[1])


class Rows(IterableDataset):
    def __iter__(self):
        return iter(zip(INPUTS, CLASSES, strict=True))


def loader(kind):
    data = TensorDataset(INPUTS, CLASSES)
    if kind == "shuffled":
        return DataLoader(data, batch_size=9, shuffle=True)
    return DataLoader(Rows(), batch_size=9)


def callback(name):
    settings = {"patterns": ["1"]} if name == "activation_checkpointing" else {}
    return fw.callbacks.build(name, **settings)


def result_of(name):
    settings = dict(CASES[name])
    if isinstance(settings.get("data"), str):
        settings["data"] = loader(settings["data"])
        settings["val"] = DataLoader(TensorDataset(INPUTS[:21], CLASSES[:21]), batch_size=5)
    if isinstance(settings.get("data"), dict):
        settings["data"] = fw.Loader(SPLIT, 16, **settings["data"])
    if "model" in settings:
        settings["model"] = settings["model"]()
    if "task" in settings:
        settings["task"] = Penalty() if settings["task"] == "penalty" else settings["task"]()
    if "callbacks" in settings:
        settings["callbacks"] = [callback(part) for part in settings["callbacks"]]
    return trained(**settings)


def all_results():
    fw.discover()
    return {name: result_of(name) for name in CASES}


# what only several processes can show


class Noise(Callback):
    """Adds random numbers to the gradients, which must be the same in all processes."""

    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.grad += 0.01 * torch.randn_like(parameter)


class Copies(Callback):
    """Copies the model in a step, and evaluates it."""

    def on_step_done(self, trainer):
        if trainer.state.step == 2:
            self.copy = copy.deepcopy(trainer.model)
            self.pickled = pickle.dumps(trainer.model)
            self.values = trainer.evaluate(VAL)


class FullMemory(nn.Module):
    """A layer that needs too much memory for more than four rows in process 1."""

    def forward(self, x):
        if self.training and len(x) > 4 and fw_rank() == 1:
            raise torch.OutOfMemoryError("simulated")
        return x


def fw_rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 1


class OtherLength(IterableDataset):
    """Has fewer batches in process 1."""

    def __iter__(self):
        count = 40 if fw_rank() == 1 else 70
        return iter(zip(INPUTS[:count], CLASSES[:count], strict=True))


class OwnBackward(Task):
    """Computes gradients in its step, and freezes their parameters."""

    def step(self, model, batch):
        with torch.enable_grad():
            model[0](batch[0]).square().mean().backward()
            model[0].requires_grad_(False)
            outputs = model(batch[0])
            return Step(nn.functional.cross_entropy(outputs, batch[1]), outputs, batch[1])


class Broken(Callback):
    def on_step_done(self, trainer):
        raise ValueError("broken")


def buffers_are_shared():
    return trained(model=mlp(Center()))["weights"]


def small_numbers(precision):
    model = mlp(nn.BatchNorm1d(16))
    return trained(model=model, precision=precision, callbacks=[fw.callbacks.build("ema")])[
        "weights"
    ]


def random_numbers_are_shared():
    noisy = nn.Sequential(nn.Dropout(0.5), *mlp())
    return trained(model=noisy, callbacks=[Noise()])["weights"]


def masks():
    """Return the dropout masks that this process has drawn."""
    drawn = []

    class Draw(nn.Module):
        def forward(self, x):
            if self.training:
                drawn.append(torch.rand(2))
            return x

    trained(model=mlp(Draw()), max_epochs=1)
    return torch.stack(drawn)


def memory_is_full():
    model = mlp(FullMemory())
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return trained(model=model, micro_batch="auto")["losses"]


def copies_of_the_model():
    callback = Copies()
    model = mlp(nn.BatchNorm1d(16))
    trained(model=model, callbacks=[callback])
    copied = callback.copy.train()
    torch.distributed.destroy_process_group()  # as in another program
    found = [copied(INPUTS), pickle.loads(callback.pickled).train()(INPUTS)]
    has_method = "forward" in vars(model[1])
    return has_method, found, callback.values


def batches_of_even_size():
    return list(zip(INPUTS[:64].split(8), CLASSES[:64].split(8), strict=True))


def own_batch_norm():
    """Return the weights with batch norms of each process: ours, and those of torch's DDP."""
    strategy = fw.strategies.build("ddp", sync_batch_norm=False)
    model = mlp(nn.BatchNorm1d(16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(max_epochs=1, device="cpu", strategy=strategy, micro_batch=4)
    trainer.fit(model, batches_of_even_size(), task=nn.CrossEntropyLoss(), optimizer=optimizer)

    plain = mlp(nn.BatchNorm1d(16))
    parallel = nn.parallel.DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for inputs, classes in batches_of_even_size():
        own = slice(4 * fw_rank(), 4 * fw_rank() + 4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(inputs[own]), classes[own]).backward()
        optimizer.step()
    return dict(model.state_dict()), dict(plain.state_dict())


def averaged_own_batch_norm():
    strategy = fw.strategies.build("ddp", sync_batch_norm=False)
    swa = fw.callbacks.build("swa", start=0)
    model = mlp(nn.BatchNorm1d(16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(max_epochs=1, device="cpu", strategy=strategy, callbacks=[swa])
    task = nn.CrossEntropyLoss()
    trainer.fit(model, SPLIT, task=task, optimizer=optimizer, batch_size=14)
    return dict(model.state_dict())


def nothing_is_left_after_an_error():
    model = mlp(nn.BatchNorm1d(16))
    with pytest.raises(ValueError, match="broken"):
        trained(model=model, callbacks=[Broken()])
    left = "forward" in vars(model[1])
    with pytest.raises(DataError):
        trained(model=model, batch_size=69)  # a last batch of one sample
    return left, "forward" in vars(model[1])


def one_strategy_for_two_trainers():
    strategy = fw.strategies.build("ddp")
    results = []
    model = mlp()
    for _ in range(2):
        trainer = Trainer(max_epochs=1, device="cpu", strategy=strategy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):  # two fits of one trainer
            trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer)
        results.append(trainer.evaluate(VAL)["test/loss"])
        results.append(trainer.predict(VAL))
    return results


def interrupted(make_data):
    """Return the weights of a fit, and of one that was interrupted inside of its last epoch."""
    weights = []
    for steps in ([18], [13, 18]):
        model = mlp()
        state = None
        for limit in steps:
            trainer = Trainer(max_steps=limit, device="cpu", strategy=fw.strategies.build("ddp"))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            task = nn.CrossEntropyLoss()
            trainer.fit(model, make_data(), task=task, optimizer=optimizer, resume=state)
            state = trainer.state_dict()
        weights.append(dict(model.state_dict()))
    return weights


def shuffled_by_unseeded_generators():
    """Return the mean loss of training, and that of evaluations, while the weights stay equal."""
    generator = torch.Generator()
    generator.seed()
    data = TensorDataset(INPUTS, CLASSES)
    batches = DataLoader(data, batch_size=9, shuffle=True, generator=generator)
    record = Record()
    trainer = Trainer(
        max_epochs=2,
        log_every="1epoch",
        device="cpu",
        loggers=[record],
        strategy=fw.strategies.build("ddp"),
    )
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer.fit(model, batches, task=nn.CrossEntropyLoss(), optimizer=optimizer)
    evaluations = [trainer.evaluate(each)["test/loss"] for each in (batches, SPLIT)]
    return record.of("train/loss"), evaluations


class StopsAtTheStart(Callback):
    def on_fit_start(self, trainer):
        if fw_rank() == 1:  # also the only process
            trainer.stop("test", "at the start")


def stopped_at_the_start():
    """Return the number of steps, and the reason."""
    trainer = Trainer(
        max_steps=2,
        device="cpu",
        callbacks=[StopsAtTheStart()],
        strategy=fw.strategies.build("auto"),
    )
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer)
    return state.step, str(state.stop)


def batches_in_order():
    return DataLoader(TensorDataset(INPUTS, CLASSES), batch_size=9)


class BadRow(torch.utils.data.Dataset):
    def __len__(self):
        return 70

    def __getitem__(self, index):
        if index == 5:
            raise OSError("damaged")
        return INPUTS[index], CLASSES[index]


def bad_samples_are_skipped():
    batches = fw.Loader(BadRow(), 16, on_bad_sample="skip", shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = trained(batches)["losses"]
    return losses, batches.skipped


def callbacks_that_read_batches(folder):
    """Fit with callbacks that read batches or files; return the logged values."""
    images = TensorSplit(torch.rand(33, 1, 4, 4), torch.arange(33) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    names = ["confusion", "timer", "learning_rate", "histograms", "augmented", "early_stop"]
    names += ["per_class", "embeddings", "speed", "health"]
    parts = [fw.callbacks.build(name) for name in names]
    parts.append(fw.callbacks.build("histograms", activations=True))
    parts.append(fw.callbacks.build("linear_probe", layer="0"))
    parts.append(fw.callbacks.build("checkpoint", monitor="train/samples_per_second", mode="max"))
    parts.append(fw.callbacks.build("non_finite", policy="rewind"))
    foreign = DataLoader(TensorDataset(*images.tensors), batch_size=8)
    trained(foreign, model, val=foreign, callbacks=parts, folder=folder)
    return count_pairs_of(foreign, model)


def count_pairs_of(foreign, model):
    confusion = fw.callbacks.build("confusion")
    table = Table()
    trainer = Trainer(
        max_epochs=1,
        device="cpu",
        callbacks=[confusion],
        loggers=[table],
        strategy=fw.strategies.build("ddp"),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(model, foreign, val=foreign, task=nn.CrossEntropyLoss(), optimizer=optimizer)
    return table.texts


def mistakes_of(strategy):
    """Fit with the callbacks of mistakes; return their last table, and the number of curves."""
    torch.manual_seed(3)
    split = TensorSplit(torch.randn(33, 4), torch.arange(33) % 3)
    model = nn.Linear(4, 3)
    logged = Table()
    callbacks = [fw.callbacks.build("worst", count=5), fw.callbacks.build("curves")]
    parts = {"callbacks": callbacks, "loggers": [logged], "strategy": strategy}
    trainer = Trainer(max_epochs=1, device="cpu", **parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"task": nn.CrossEntropyLoss(), "optimizer": optimizer, "batch_size": 7}
    trainer.fit(model, split, val=split, **settings)
    return logged.texts, logged.curves


class Table(Record):
    def __init__(self):
        super().__init__()
        self.texts = []
        self.curves = []

    def images(self, tag, images, step):
        pass

    def text(self, tag, text, step):
        self.texts.append(text)

    def pr_curve(self, tag, labels, scores, step):
        order = scores.argsort(stable=True)
        self.curves.append((tag, labels[order].tolist(), scores[order].tolist()))


class NanAt(Callback):
    """Makes the gradients of a step infinite in process 1 only, before they are summed."""

    def __init__(self, step):
        self.step = step

    def on_step_start(self, trainer):
        if trainer.state.step == self.step and trainer.strategy.rank == 1:
            hook = trainer.model[0].weight.register_hook(lambda gradient: gradient * torch.inf)
            self.hook = hook

    def on_gradients(self, trainer):
        if trainer.state.step == self.step and trainer.strategy.rank == 1:
            self.hook.remove()


def not_finite(folder, policy):
    parts = [NanAt(8), fw.callbacks.build("non_finite", policy=policy)]
    parts.append(fw.callbacks.build("checkpoint"))
    return trained(callbacks=parts, folder=folder)["weights"]


def compiled():
    """Return the weights after fits with compiled models and steps, by name."""
    fw.discover()
    weights = {}
    for mode in ("off", "model", "step"):
        for norm in (None, nn.BatchNorm1d(16)):
            name = f"{mode} {norm}"
            weights[name] = trained(model=mlp(norm), compile=mode, max_steps=4)["weights"]
    return weights


def refusals():
    """Return the error of each run that cannot work, which all processes must raise alike."""
    data = TensorDataset(INPUTS, CLASSES)

    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Whole(Task):
        splits_batches = False

        def step(self, model, batch):
            outputs = model(batch[0])
            return Step(outputs.square().mean(), outputs, batch[1])

    order = torch.randperm(70, generator=torch.Generator().manual_seed(fw_rank()))
    settings = {
        "small batch": {"batch_size": 1},
        "few samples": {"data": TensorSplit(INPUTS[:1], CLASSES[:1])},
        "last batch": {"model": mlp(nn.BatchNorm1d(16)), "batch_size": 23},
        "last batch of a list": {
            "model": mlp(nn.BatchNorm1d(16)),
            "data": [(INPUTS[:1], CLASSES[:1])],
        },
        "task": {"task": Whole(), "batch_size": 23},
        "micro-batch": {"model": mlp(nn.BatchNorm1d(16)), "micro_batch": 2},
        "norm of torch": {"model": mlp(nn.SyncBatchNorm(16)), "micro_batch": 2},
        "no statistics": {"model": mlp(nn.BatchNorm1d(16, track_running_stats=False))},
        "own forward": {"model": mlp(Own(16))},
        "sparse": {
            "model": nn.Sequential(nn.EmbeddingBag(9, 3, sparse=True)),
            "data": TensorSplit(CLASSES[:, None], CLASSES),
            "val": None,
        },
        "lazy": {"model": nn.Sequential(nn.LazyLinear(3)), "val": None},
        "compile=auto": {"compile": "auto"},
        "noise_scale": {"callbacks": [fw.callbacks.build("noise_scale")]},
        "sampler": {"data": DataLoader(data, 9, sampler=DistributedSampler(data))},
        "own order": {"data": [(INPUTS[order], CLASSES[order])]},
        "own part": {"data": [(INPUTS[fw_rank() :: 3], CLASSES[fw_rank() :: 3])]},
        "own validation": {"val": [(INPUTS[order], CLASSES[order])]},
        "own length": {"data": DataLoader(OtherLength(), batch_size=9)},
        "own list": {"data": batches_of_even_size()[: 8 - fw_rank()]},
        "frozen with a gradient": {"task": OwnBackward()},
        "one row each": {
            "model": mlp(nn.BatchNorm1d(16)),
            "data": TensorSplit(INPUTS[:67], CLASSES[:67]),
            "strategy": fw.strategies.build("ddp", sync_batch_norm=False),
        },
    }
    errors = {}
    for name, each in settings.items():
        try:
            trained(**each)
            errors[name] = "no error"
        except (DataError, SettingError) as error:
            errors[name] = str(error)
    return errors


def several_processes(folder):
    """Run everything of this part in one process of several."""
    fw.discover()
    folder = Path(folder)
    return {
        "buffers": buffers_are_shared(),
        "random": random_numbers_are_shared(),
        "bf16": small_numbers("bf16"),
        "fp16": small_numbers("fp16"),
        "masks": masks(),
        "memory": memory_is_full(),
        "own batch norm": own_batch_norm(),
        "swa of own batch norm": averaged_own_batch_norm(),
        "error": nothing_is_left_after_an_error(),
        "trainers": one_strategy_for_two_trainers(),
        "resumed": interrupted(batches_in_order),
        "bad": bad_samples_are_skipped(),
        "table": callbacks_that_read_batches(folder / "read"),
        "mistakes": mistakes_of(fw.strategies.build("ddp")),
        "skip": not_finite(folder / "skip", "skip"),
        "rewind": not_finite(folder / "rewind", "rewind"),
        "refused": refusals(),
        "copies": copies_of_the_model(),
        "unseeded": shuffled_by_unseeded_generators(),
        "stopped": stopped_at_the_start(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each case: of one process, and of two."""
    two = run_in_processes(all_results, 2, tmp_path_factory.mktemp("two"))
    return all_results(), *two


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_result_of_one(name, results):
    one, main, other = (each[name] for each in results)
    for key, expected in one["weights"].items():
        torch.testing.assert_close(main["weights"][key], expected, rtol=2e-5, atol=2e-6, msg=key)
        assert torch.equal(main["weights"][key], other["weights"][key]), key
    for tag, expected in one["losses"].items():
        assert main["losses"][tag] == pytest.approx(expected, rel=1e-5), tag
        assert len(expected) > 0
    assert not other["lines"], "only the main process logs"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of `several_processes` in two of them."""
    folder = tmp_path_factory.mktemp("several")
    return run_in_processes(several_processes, 2, folder, str(folder))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize(
    "name", ["buffers", "random", "skip", "rewind", "bf16", "fp16", "swa of own batch norm"]
)
def test_all_processes_have_the_same_weights_and_buffers(name, two):
    main, other = (each[name] for each in two)
    assert_same(main, other)
    assert all(tensor.isfinite().all() for tensor in main.values() if not tensor.is_complex())
    if name == "buffers":
        assert main["1.mean"].abs().max() > 0


def test_processes_draw_different_random_numbers_in_the_model(two):
    main, other = (each["masks"] for each in two)
    assert main.shape == other.shape
    assert not (main == other).any()


def test_a_process_whose_memory_is_full_repeats_its_part_alone(two, results):
    main, other = (each["memory"] for each in two)
    expected = results[0]["plain"]["losses"]
    assert main["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    assert not other["train/loss"]


def test_batch_norms_of_each_process_give_the_result_of_torch(two):
    for ours, expected in (each["own batch norm"] for each in two[:1]):  # the main process
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, msg=key)
    (main, _), (other, _) = (each["own batch norm"] for each in two)
    assert_same(main, other)


def test_an_error_leaves_the_batch_norms_as_they_were(two):
    for each in two:
        assert each["error"] == (False, False)


def test_several_trainers_and_fits_share_a_strategy(two):
    main, other = (each["trainers"] for each in two)
    assert main[0] == other[0]
    assert main[2] == other[2] < main[0]
    assert torch.equal(main[3], other[3])
    assert len(main[3]) == len(VAL)


def test_a_data_loader_resumes_inside_an_epoch(two):
    for each in two:
        assert_same(*each["resumed"])


def test_unseeded_generators_of_a_data_loader_give_all_processes_one_order(two):
    main, other = (each["unseeded"] for each in two)
    of_training, evaluations = main
    expected = nn.functional.cross_entropy(mlp()(INPUTS), CLASSES).item()
    assert of_training == pytest.approx([expected] * 2, rel=1e-5)
    assert evaluations == pytest.approx([expected] * 2, rel=1e-5)
    assert other[1] == evaluations


def test_a_stop_at_the_start_of_a_fit_takes_no_step(two):
    expected = (0, "test: at the start")
    assert [stopped_at_the_start(), *(each["stopped"] for each in two)] == [expected] * 3


def test_a_bad_sample_is_skipped_in_its_process(two):
    (main, skipped), (_, skipped_by_other) = (each["bad"] for each in two)
    assert skipped + skipped_by_other == 3  # once in each epoch
    assert len(main["train/loss"]) == 15


def test_the_confusion_matrix_counts_the_samples_of_all_processes(two):
    (table,) = two[0]["table"]
    rows = [line.split("|")[2:-1] for line in table.splitlines()[2:]]
    assert sum(int(cell) for row in rows for cell in row) == 33
    assert not two[1]["table"]


def test_the_worst_samples_and_curves_are_those_of_a_single_process(two):
    (table,), curves = two[0]["mistakes"]
    (expected,), expected_curves = mistakes_of(fw.strategies.build("single"))
    assert [row.split(" | ")[0] for row in table.splitlines()] == [
        row.split(" | ")[0] for row in expected.splitlines()
    ]
    assert len(table.splitlines()) == 2 + 5
    assert [tag for tag, _, _ in curves] == ["curves/0", "curves/1", "curves/2"]
    for (_, labels, scores), (_, own_labels, own_scores) in zip(
        curves, expected_curves, strict=True
    ):
        assert labels == own_labels
        assert scores == pytest.approx(own_scores, rel=1e-5)
    assert two[1]["mistakes"] == ([], [])


def test_copies_of_a_model_in_training_are_ordinary_models(two):
    for has_method, (copied, unpickled), values in (each["copies"] for each in two):
        assert not has_method
        assert torch.equal(copied, unpickled)
        assert values == two[0]["copies"][2]


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "small batch": "batch_size=1",
        "few samples": "1 samples",
        "last batch": "the last batch of an epoch has 1 of 70",
        "last batch of a list": "fewer samples than there are processes",
        "task": "compares the samples",
        "micro-batch": "micro_batch",
        "norm of torch": "micro_batch",
        "no statistics": "track_running_stats=False",
        "own forward": "(Own)",
        "sparse": "sparse=True",
        "lazy": "uninitialized",
        "compile=auto": "compile=auto",
        "noise_scale": "noise_scale",
        "sampler": "DistributedSampler",
        "own order": "data: process 1 reads other batches than process 0",
        "own part": "data: process 1 reads other batches than process 0",
        "own validation": "data: process 1 reads other batches than process 0",
        "own length": "different numbers of batches",
        "own list": "different numbers of batches",
        "frozen with a gradient": "requires_grad=False",
        "one row each": "batch_size=16 makes a batch of one sample in a process",
    }.items(),
)
def test_a_run_that_cannot_work_is_refused_in_all_processes(name, words, two):
    for each in two:
        assert words in each["refused"][name]


def first_losses():
    """Return the loss of each of the first 100 steps, of the MLP on digits."""
    fw.discover()
    data = fw.datasets.build("digits")
    torch.manual_seed(0)
    model = fw.models.build("mlp", data.in_shape, data.out_shape)
    optimizer = fw.optimizers.build("adamw", model.parameters())
    record = Record()
    trainer = Trainer(
        max_steps=100,
        log_every="1steps",
        device="cpu",
        loggers=[record],
        strategy=fw.strategies.build("auto"),
    )
    trainer.fit(model, data, task=nn.CrossEntropyLoss(), optimizer=optimizer)
    return record.of("train/loss")


@pytest.mark.parametrize("count", [2, 4])
def test_the_losses_of_digits_are_those_of_one_process(count, tmp_path):
    expected = first_losses()
    found = run_in_processes(first_losses, count, tmp_path)[0]
    assert len(found) == 100
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_compiled_steps_give_the_result_of_eager_ones(tmp_path):
    main, other = run_in_processes(compiled, 2, tmp_path)
    for name, weights in main.items():
        assert_same(weights, other[name])
        expected = main[f"off {name.partition(' ')[2]}"]
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)
