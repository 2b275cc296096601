"""Steps as CUDA graphs.

Without a GPU, `FakeGraph` replaces a graph: it runs the step again and copies the results into the
same memory.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Trainer
from framework.errors import SettingError
from framework.training.acceleration import cuda_graph

DATA = fw.TensorSplit(
    torch.randn(64, 5, generator=torch.Generator().manual_seed(3)), torch.arange(64) % 3
)
fw.discover()


class Small(nn.Sequential):
    def __init__(self, norm=False):
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(5, 8, bias=not norm),
            nn.BatchNorm1d(8) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Linear(8, 3),
        )


def fit(
    *callbacks, model=None, optimizer="adamw", mode="off", device="cpu", resume=None, **settings
):
    model = Small() if model is None else model
    if isinstance(optimizer, str):
        built = fw.optimizers.build(optimizer, list(model.parameters()))
    else:
        built = optimizer(model)
    trainer = Trainer(
        callbacks=callbacks, **({"max_steps": 30, "seed": 5, "device": device} | settings)
    )
    trainer.cuda_graph = mode  # on a CPU, the constructor sets it to off
    FakeGraph.trainer = trainer
    trainer.fit(
        model,
        DATA,
        task=nn.CrossEntropyLoss(),
        optimizer=built,
        batch_size=24,
        metrics=[fw.metrics.build("accuracy")],
        schedule=lambda step: 0.9**step,
        resume=resume,
    )
    return trainer


def fused(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def fused_late(model):
    """Return an optimizer with a hook, which is updated outside of the graph."""
    optimizer = fused(model)
    optimizer.register_step_post_hook(lambda *arguments: None)
    return optimizer


def fused_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)


def name_of(optimizer):
    return getattr(optimizer, "__name__", optimizer)


def whole_step(trainer):
    """Return the graphs of steps with their update."""
    return trainer._training_step.forward_backward.single_call.graphed


def gradients(trainer):
    """Return the graphs of forward and backward only."""
    return trainer._training_step.forward_backward.gradients


def assert_close(one, other, tolerance=1e-6):
    for a, b in zip(
        one.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert one.state.metrics["train/loss"] == pytest.approx(
        other.state.metrics["train/loss"], rel=1e-4
    )


class FakeGraph:
    """Runs a recorded function again, and copies the results into the tensors of the first run."""

    def __init__(self, run):
        tensors = self.tensors()
        before = [tensor.detach().clone() for tensor in tensors]
        random = torch.get_rng_state()
        self.run = run
        self.result = run()
        self.leaves = [p for p in tensors if p.is_leaf and p.requires_grad]
        self.gradients = [p.grad for p in self.leaves]
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(random)

    @staticmethod
    def tensors():
        """Return every tensor that a step writes: those of the model and of the optimizer."""
        trainer = FakeGraph.trainer
        tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
        for state in trainer.optimizer.state.values():
            tensors += state.values()
        return tensors

    def replay(self):
        for p in self.leaves:
            p.grad = None
        result = self.run()
        with torch.no_grad():
            for old, new in zip(self.result[:3], result[:3], strict=True):
                old.copy_(new)
            for p, static in zip(self.leaves, self.gradients, strict=True):
                if static is not None:
                    static.copy_(p.grad)


@pytest.fixture
def recorded(monkeypatch):
    """Replace CUDA graphs; return the list of the recorded ones."""
    graphs = []

    def record_graph(run):
        graphs.append(FakeGraph(run))
        return graphs[-1], graphs[-1].result

    monkeypatch.setattr(cuda_graph, "record_graph", record_graph)
    monkeypatch.setattr(cuda_graph, "side_stream", torch.enable_grad)
    return graphs


@pytest.mark.parametrize("optimizer", [fused, fused_sgd, "lion"], ids=name_of)
def test_the_step_with_its_update_is_replayed(recorded, optimizer):
    replayed = fit(mode="on", optimizer=optimizer, model=Small(norm=True))
    assert_close(replayed, fit(optimizer=optimizer, model=Small(norm=True)))
    assert len(whole_step(replayed).captured) == 2, "also one for the last batch of an epoch"
    assert sum(whole_step(replayed).seen.values()) == 29, "all steps but the first"
    assert not gradients(replayed).captured


def test_learning_rates_are_numbers_in_a_checkpoint(recorded):
    saved = fit(mode="on", optimizer=fused).state_dict()
    lr = saved["optimizer"]["param_groups"][0]["lr"]
    assert type(lr) is float
    assert lr == pytest.approx(0.01 * 0.9**29)
    assert not saved["optimizer"]["param_groups"][0]["capturable"]


def test_a_run_with_graphs_resumes_with_and_without_them(recorded):
    saved = fit(mode="on", optimizer=fused, max_steps=20).state_dict()
    for mode in ("on", "off"):
        assert_close(fit(mode=mode, optimizer=fused, resume=deepcopy(saved)), fit(optimizer=fused))


def test_clipping_is_a_part_of_the_graph(recorded):
    def clip():
        return fw.callbacks.build("clip_gradients", norm=0.05)

    replayed = fit(clip(), mode="on", optimizer=fused)
    assert len(whole_step(replayed).captured) == 2
    eager = fit(clip(), optimizer=fused)
    assert_close(replayed, eager)
    norms = [trainer.state.metrics["train/gradient_norm"] for trainer in (replayed, eager)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(
    "names", [["noise_scale"], ["non_finite"], ["clip_gradients", "histograms"]]
)
def test_with_callbacks_in_python_only_forward_and_backward_are_replayed(names, recorded):
    def callbacks():
        return [fw.callbacks.build(name) for name in names]

    replayed = fit(*callbacks(), mode="on", optimizer=fused)
    assert not whole_step(replayed).seen
    assert len(gradients(replayed).captured) == 2
    assert_close(replayed, fit(*callbacks(), optimizer=fused))


def test_an_optimizer_that_may_count_in_python_is_updated_outside_of_the_graph(recorded):
    replayed = fit(mode="on", optimizer="rmsprop")
    assert not whole_step(replayed).seen
    assert len(gradients(replayed).captured) == 2
    assert_close(replayed, fit(optimizer="rmsprop"))


def test_accumulated_steps_are_eager(recorded):
    assert_close(fit(mode="on", optimizer=fused, accumulate=2), fit(optimizer=fused, accumulate=2))
    assert len(recorded) == 1, "the last batch of an epoch is a step alone"


class Change(Callback):
    """Changes the model or the optimizer after step 16, when steps are replayed."""

    recordable = True

    def __init__(self, change):
        self.change = change

    def needs_gradients(self, trainer):
        return False

    def on_step_end(self, trainer):
        if trainer.state.step == 16:
            self.change(trainer.model, trainer.optimizer)


def new_layer(model, optimizer):
    torch.manual_seed(1)
    model[3] = nn.Linear(8, 3)
    group = optimizer.param_groups[0]
    group["params"] = [*group["params"][:-2], *model[3].parameters()]


def new_layer_outside_the_optimizer(model, optimizer):
    torch.manual_seed(1)
    model[0] = nn.Linear(5, 8)


def moved(model, optimizer):
    """Move all parameters into one tensor."""
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 0.9, model.parameters())


def new_state(model, optimizer):
    for state in optimizer.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])


def other_order(model, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def evaluation_mode(model, optimizer):
    model[1].eval()


@pytest.mark.parametrize(
    "change",
    [new_layer, new_layer_outside_the_optimizer, moved, new_state, other_order, evaluation_mode],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("optimizer", [fused, fused_late], ids=["whole step", "gradients"])
def test_the_graph_is_captured_again_after_a_change(recorded, change, optimizer):
    replayed = fit(Change(change), mode="on", optimizer=optimizer, model=Small(norm=True))
    in_graph = change is not new_state or optimizer is fused
    assert (len(recorded) > 2) == in_graph, "two forms of a batch, and the usual one again"
    assert_close(replayed, fit(Change(change), optimizer=optimizer, model=Small(norm=True)))


@pytest.mark.parametrize(("quick", "chosen"), [("replayed", "as a graph"), ("eager", "eager")])
def test_auto_times_some_steps_and_prints_its_choice(recorded, monkeypatch, capsys, quick, chosen):
    seconds = {"eager": 2e-3, "replayed": 2e-3, quick: 1e-3}
    clock = [0.0]
    replay_or_run = cuda_graph.Graphed._replay_or_run

    def timed(self, batch, settings):
        result, kind = replay_or_run(self, batch, settings)
        clock[0] += seconds.get(kind, 5.0)
        return result, kind

    monkeypatch.setattr(cuda_graph, "synchronized_time", lambda: clock[0])
    monkeypatch.setattr(cuda_graph.Graphed, "_replay_or_run", timed)
    model = fit(mode="auto", optimizer=fused, max_steps=80)
    printed = capsys.readouterr().err
    assert printed.count("cuda_graph=auto: the whole step takes") == 1
    assert f"1 ms {'as a graph' if quick == 'replayed' else 'eager'}" in printed
    assert f": {chosen} from now on" in printed
    assert whole_step(model).times is None, "later steps are not timed"
    assert_close(model, fit(optimizer=fused, max_steps=80))


def test_cuda_graph_on_needs_a_cuda_device_and_no_compiled_step():
    for settings in ({"device": "cpu"}, {"device": "cpu", "compile": "step"}):
        with pytest.raises(SettingError, match="cuda_graph=on: expected a CUDA device"):
            Trainer(max_steps=1, cuda_graph="on", **settings)
    assert Trainer(max_steps=1, cuda_graph="auto", device="cpu").cuda_graph == "off"


# on a GPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
REAL = [
    {},
    {"precision": "fp16"},
    {"precision": "bf16"},
    {"accumulate": 2},
    {"max_steps": 80, "cuda_graph": "auto"},
]


@needs_gpu
@pytest.mark.parametrize("optimizer", [fused, fused_sgd, "lion", "rmsprop"], ids=name_of)
@pytest.mark.parametrize("settings", REAL, ids=str)
def test_a_cuda_graph_equals_the_eager_step(settings, optimizer):
    def run(mode):
        names = ("non_finite", "clip_gradients", "gradient_norm")
        callbacks = [fw.callbacks.build(name) for name in names]
        own = dict(settings)
        own["cuda_graph"] = settings.get("cuda_graph", "on") if mode == "on" else "off"
        parts = {"device": "cuda", "optimizer": optimizer, "model": Small(norm=True)}
        return fit(*callbacks, mode=own["cuda_graph"], **parts, **own)

    replayed = run("on")
    eager = run("off")
    assert_close(replayed, eager, 1e-4 if "precision" not in settings else 1e-2)
    if not settings:
        graphs = whole_step(replayed) if optimizer in (fused, fused_sgd) else gradients(replayed)
        assert graphs.captured
        assert not graphs.refused


@needs_gpu
def test_a_step_with_dropout_is_replayed():
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    losses = fit(
        model=model, device="cuda", mode="on", optimizer=fused, log_every="1steps"
    ).state.metrics
    assert 0 < losses["train/loss"] < 2


@needs_gpu
def test_a_step_that_cannot_be_captured_gives_a_warning_and_runs():
    class Reads(Small):
        def forward(self, inputs):
            return super().forward(inputs) * (1 if inputs.sum().item() < 1e9 else 2)

    with pytest.warns(UserWarning, match=r"cannot be captured.*inputs.sum\(\).item\(\)"):
        replayed = fit(model=Reads(), mode="on", device="cuda", optimizer=fused)
    assert_close(replayed, fit(device="cuda", optimizer=fused))
