"""The fused kernel for optimizers whose user has left the choice to torch."""

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import framework as fw
from fits import SPLIT, At, X, Y, network, same, smooth_network
from framework import TensorSplit, Trainer
from framework.runtime import seeds

MAKERS = {
    "adam": lambda params, **more: optim.Adam(params, lr=0.01, **more),
    "adamw, amsgrad": lambda params, **more: optim.AdamW(params, lr=0.01, amsgrad=True, **more),
    "adamw": lambda params, **more: optim.AdamW(params, lr=0.01, weight_decay=0.1, **more),
    "sgd": lambda params, **more: optim.SGD(params, lr=0.1, **more),
    "sgd, momentum": lambda params, **more: optim.SGD(params, lr=0.1, momentum=0.9, **more),
    "adagrad": lambda params, **more: optim.Adagrad(params, lr=0.1, **more),
}


def groups(model):
    """Return two groups with different settings."""
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 0.02}, {"params": rest}]


def by_hand(optimizer, model, epochs=2):
    torch.manual_seed(seeds.derive(0, "train"))
    model.train()
    for epoch in range(epochs):
        for rows in seeds.order(0, epoch, len(X)).split(16):
            F.cross_entropy(model(X[rows]), Y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def trained(optimizer, model, epochs=2, callbacks=(), **settings):
    trainer = Trainer(max_epochs=epochs, device="cpu", callbacks=callbacks, **settings)
    trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=16)
    return trainer


@pytest.mark.parametrize("name", MAKERS)
def test_the_fused_kernel_is_used_and_the_optimizer_is_returned_as_it_was(name):
    model = network()
    optimizer = MAKERS[name](groups(model))
    before = [dict(group, params=None) for group in optimizer.param_groups]
    seen = []
    look = At(3, lambda trainer: seen.extend(g["fused"] for g in trainer.optimizer.param_groups))
    trained(optimizer, model, callbacks=[look])
    assert seen == [True, True]
    fused_model = network()
    assert same(model, by_hand(MAKERS[name](groups(fused_model), fused=True), fused_model))
    after = [dict(group, params=None) for group in optimizer.param_groups]
    assert [{k: v for k, v in group.items() if k in before[0]} for group in after] == before
    assert optimizer.defaults["fused"] is None


@pytest.mark.parametrize("name", MAKERS)
def test_fused_false_keeps_the_choice_of_torch(name):
    model = network()
    trained(MAKERS[name](groups(model)), model, fused=False)
    plain_model = network()
    assert same(model, by_hand(MAKERS[name](groups(plain_model)), plain_model))


@pytest.mark.parametrize("name", MAKERS)
def test_the_results_differ_by_rounding_only(name):
    models = []
    for fused in (True, False):
        model = smooth_network().double()
        split = TensorSplit(X.double(), Y)
        trainer = Trainer(max_epochs=4, device="cpu", fused=fused)
        optimizer = MAKERS[name](model.parameters())
        trainer.fit(model, split, task=nn.CrossEntropyLoss(), optimizer=optimizer)
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(models[0], models[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_fit_equals_an_uninterrupted_one(name, fused):
    def run(max_steps, resume=None):
        model = network()
        trainer = Trainer(max_steps=max_steps, device="cpu", fused=fused)
        trainer.fit(
            model,
            SPLIT,
            task=nn.CrossEntropyLoss(),
            optimizer=MAKERS[name](groups(model)),
            schedule=lambda step: 1 / (1 + step),
            batch_size=16,
            resume=resume,
        )
        return trainer

    state = run(7).state_dict()
    assert same(run(12, state).model, run(12).model)


@pytest.mark.parametrize("first", [True, False])
def test_the_setting_may_change_when_a_fit_resumes(first):
    """The state of both implementations is the same, so each takes the other's."""

    def run(max_steps, fused, resume=None, callbacks=()):
        model = smooth_network()
        trainer = Trainer(max_steps=max_steps, device="cpu", fused=fused, callbacks=callbacks)
        trainer.fit(
            model,
            SPLIT,
            task=nn.CrossEntropyLoss(),
            optimizer=MAKERS["adamw"](model.parameters()),
            batch_size=16,
            resume=resume,
        )
        return trainer

    seen = []
    look = At(9, lambda trainer: seen.append(trainer.optimizer.param_groups[0]["fused"]))
    resumed = run(12, not first, run(7, first).state_dict(), [look])
    assert seen == [None if first else True]
    whole = run(12, first).model
    for parameter, other in zip(whole.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)


class Subclass(optim.AdamW):
    """May have another `step`."""


@pytest.mark.parametrize(
    "make",
    [
        lambda params: optim.AdamW(params, lr=0.01, fused=False),
        lambda params: optim.AdamW(params, lr=0.01, foreach=True),
        lambda params: optim.AdamW(params, lr=torch.tensor(0.01)),
        lambda params: optim.RMSprop(params, lr=0.01),
        lambda params: Subclass(params, lr=0.01),
    ],
    ids=["fused=False", "foreach=True", "lr is a tensor", "rmsprop", "subclass"],
)
def test_other_optimizers_are_left_alone(make):
    model = network()
    optimizer = make(model.parameters())
    seen = []
    look = At(3, lambda trainer: seen.append(trainer.optimizer.param_groups[0].get("fused")))
    trained(optimizer, model, callbacks=[look])
    assert seen[0] in (None, False)
    plain = network()
    assert same(model, by_hand(make(plain.parameters()), plain))


def test_a_failed_fit_returns_the_optimizer_as_it_was():
    def fail(trainer):
        raise ValueError("planned")

    model = network()
    optimizer = MAKERS["adamw"](model.parameters())
    with pytest.raises(ValueError, match="planned"):
        trained(optimizer, model, callbacks=[At(2, fail)])
    assert optimizer.param_groups[0]["fused"] is None


def test_a_group_that_a_callback_adds_is_fused_too():
    model = network()
    extra = nn.Parameter(torch.ones(3))
    optimizer = MAKERS["adamw"](model.parameters())
    seen = []

    def add(trainer):
        trainer.optimizer.add_param_group({"params": [extra]})
        seen.append(trainer.optimizer.param_groups[1]["fused"])

    trained(optimizer, model, callbacks=[At(2, add)])
    assert seen == [True]
    assert [group["fused"] for group in optimizer.param_groups] == [None, None]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # by Adagrad of torch
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_sparse_gradients_are_updated_without_the_fused_kernel(name, by_name):
    def sparse_model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))

    inputs = torch.arange(120).view(40, 3) % 10
    targets = torch.arange(40) % 3
    model = sparse_model()
    optimizer = MAKERS[name](model.parameters())
    if by_name:
        optimizer = fw.optimizers.build(name, model.parameters(), lr=0.1)
    trainer = Trainer(max_epochs=2, device="cpu")
    trainer.fit(
        model, TensorSplit(inputs, targets), task=nn.CrossEntropyLoss(), optimizer=optimizer
    )
    plain = sparse_model()
    plain_optimizer = MAKERS[name](plain.parameters())
    for epoch in range(2):
        for rows in seeds.order(0, epoch, 40).split(32):
            F.cross_entropy(plain(inputs[rows]), targets[rows]).backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
    assert same(model, plain)


def test_a_dataloader_and_an_optimizer_of_the_user_train_as_in_a_loop_written_by_hand():
    def loader():
        return DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)

    model = network()
    trainer = Trainer(max_epochs=2, device="cpu")
    optimizer = MAKERS["adamw"](model.parameters())
    trainer.fit(model, loader(), task=nn.CrossEntropyLoss(), optimizer=optimizer)
    assert trainer.state.reading == "DataLoader, in memory, one gather per batch"
    other = network().train()
    optimizer = MAKERS["adamw"](other.parameters(), fused=True)
    torch.manual_seed(seeds.derive(0, "train"))
    batches = loader()
    for _ in range(2):
        for inputs, targets in batches:
            F.cross_entropy(other(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(model, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_counters_of_an_optimizer_follow_the_implementation():
    model = network().cuda()
    optimizer = MAKERS["adamw"](model.parameters())
    trainer = Trainer(max_epochs=1, device="cuda")
    for _ in range(2):
        trainer.fit(model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer)
        assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())


class Transposed(fw.Callback):
    """Replaces gradients by equal ones in another order of memory."""

    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            if parameter.ndim == 2:
                parameter.grad = parameter.grad.t().contiguous().t()


def test_a_gradient_of_other_strides_gives_the_same_update():
    models = []
    for callbacks in ([Transposed()], []):
        model = smooth_network()
        trained(MAKERS["adamw"](model.parameters()), model, callbacks=callbacks)
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("name", ["adamw", "sgd, momentum"])
def test_the_memory_format_may_change_between_two_fits(name):
    images = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    data = TensorSplit(images, torch.arange(32) % 3)
    models = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
        optimizer = MAKERS[name](model.parameters())
        trainer = Trainer(max_epochs=1, device="cpu", fused=fused)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            model.to(memory_format=memory_format)
            trainer.fit(model, data, task=nn.CrossEntropyLoss(), optimizer=optimizer)
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(models[0], models[1], rtol=1e-4, atol=1e-6)


def test_a_fit_that_cannot_start_returns_the_optimizer_as_it_was():
    class Broken(fw.Logger):
        def open(self, folder, step, metrics):
            raise ValueError("planned")

    model = network()
    optimizer = MAKERS["adamw"](model.parameters())
    with pytest.raises(ValueError, match="planned"):
        trained(optimizer, model, loggers=[Broken()])
    assert optimizer.param_groups[0]["fused"] is None


def test_a_resumed_optimizer_keeps_its_own_implementation():
    def run(max_steps, resume=None, **more):
        model = smooth_network()
        seen = []
        look = At(9, lambda trainer: seen.append(trainer.optimizer.param_groups[0]["fused"]))
        trainer = Trainer(max_steps=max_steps, device="cpu", callbacks=[look])
        optimizer = MAKERS["adamw"](model.parameters(), **more)
        task = nn.CrossEntropyLoss()
        trainer.fit(model, SPLIT, task=task, optimizer=optimizer, batch_size=16, resume=resume)
        return trainer, seen

    states = []
    save = At(4, lambda trainer: states.append(trainer.state_dict()))
    model = smooth_network()
    trained(MAKERS["adamw"](model.parameters()), model, callbacks=[save])
    assert states[0]["optimizer"]["param_groups"][0]["fused"] is None
    state = run(7)[0].state_dict()
    for choice in ({"foreach": True}, {"foreach": False}, {"fused": False}):
        assert run(12, state, **choice)[1] == [choice.get("fused")]
