import copy

import pytest
import torch
from torch import nn

import framework as fw
from framework.contracts.optimizer import implementation
from framework.errors import BuildError, SettingError
from framework.runs import checkpoint

NAMES = fw.optimizers.names()


def small_model(double: bool = False) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 3),
        nn.Flatten(),
        nn.Linear(24, 6),
        nn.LayerNorm(6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    return model.double() if double else model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> torch.Tensor:
    """Return all parameters after some steps on one batch."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(16, 1, 8, generator=generator).to(dtype)
    targets = torch.randint(3, (16,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_implementation_gives_the_weights_of_the_plain_one(name):
    fast_model = small_model(double=True)
    slow_model = small_model(double=True)
    fast = fw.optimizers.maker(name, lr=0.01)(fast_model.parameters())
    slow = fw.optimizers.build(name, slow_model.parameters(), lr=0.01)
    for group in slow.param_groups:
        group.update({flag: False for flag in ("fused", "foreach") if flag in group})
    expected = train(slow_model, slow)
    torch.testing.assert_close(train(fast_model, fast), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_goes_on_after_a_restart_and_can_be_copied(name):
    maker = fw.optimizers.maker(name)
    model = small_model()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = maker(model.parameters())
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    resumed = maker(twin.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    end = train(model, optimizer, 3)
    assert not torch.equal(start, end)
    torch.testing.assert_close(train(twin, resumed, 3), end, rtol=0, atol=0)
    copy.deepcopy(optimizer).step()  # the framework measures an optimizer's memory on a copy


@pytest.mark.parametrize("entry", fw.optimizers, ids=lambda entry: entry.name)
def test_only_the_rule_itself_is_configured_and_its_defaults_are_in_range(entry):
    assert (
        not {"maximize", "capturable", "differentiable", "foreach", "fused"} & entry.settings.keys()
    )
    for setting in entry.settings.values():
        setting.convert(setting.default)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adam", {"lr": 0}, r"lr: expected float in \(0, inf\)"),
        ("adamw", {"betas": [0.9, 1.0]}, "betas: expected"),
        ("sgd", {"momentum": 1.0}, "momentum: expected"),
        ("adam", {"momentum": 0.9}, "no setting 'momentum'"),
    ],
)
def test_a_wrong_setting_is_an_error_with_the_expected_values(name, settings, message):
    with pytest.raises(SettingError, match=message):
        fw.optimizers.maker(name, **settings)


class TestImplementation:
    def test_fused_is_chosen_where_a_step_of_it_runs(self):
        params = [nn.Parameter(torch.ones(2))]
        assert implementation(torch.optim.AdamW, params) == {"fused": True}
        assert implementation(torch.optim.AdamW, [{"params": params}, {"params": params[0]}]) == {
            "fused": True
        }
        assert implementation(torch.optim.AdamW, [("weight", params[0])]) == {"fused": True}
        assert implementation(torch.optim.RMSprop, params) == {}
        assert (
            implementation(
                torch.optim.AdamW, [*params, nn.Parameter(torch.ones(2, dtype=torch.cfloat))]
            )
            == {}
        )

    def test_a_class_that_only_names_fused_is_left_alone(self):
        class Claims(torch.optim.SGD):
            def __init__(self, params, fused: bool = False):
                super().__init__(params)
                if fused:
                    raise RuntimeError("not on this device")

        assert implementation(Claims, [nn.Parameter(torch.ones(2))]) == {}

    def test_the_maker_stays_as_it_was_and_names_its_part_in_errors(self):
        maker = fw.optimizers.maker("sgd", nesterov=True)
        with pytest.raises(BuildError, match="optimizer/sgd"):
            maker([nn.Parameter(torch.ones(2))])
        assert maker.entry is fw.optimizers.get("sgd")

    def test_groups_keep_their_settings(self):
        first = nn.Parameter(torch.ones(2))
        second = nn.Parameter(torch.ones(2))
        groups = [{"params": [first], "weight_decay": 0.0}, {"params": [second]}]
        optimizer = fw.optimizers.maker("adamw", weight_decay=0.3)(groups)
        settings = [(group["weight_decay"], group["fused"]) for group in optimizer.param_groups]
        assert settings == [(0, True), (0.3, True)]


def test_lion_takes_the_papers_steps():
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = fw.optimizers.build("lion", [weight], lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)
    expected = weight.detach().clone()
    momentum = torch.zeros(3)
    for gradient in torch.randn(5, 3):
        weight.grad = gradient.clone()
        optimizer.step()
        direction = (0.8 * momentum + 0.2 * gradient).sign()
        expected -= 0.1 * (direction + 0.5 * expected)
        momentum = 0.9 * momentum + 0.1 * gradient
    torch.testing.assert_close(weight.detach(), expected)


class TestMuon:
    def test_hidden_matrices_are_orthogonalized_and_all_others_use_adamw(self):
        model = small_model()
        optimizer = fw.optimizers.build("muon", model.named_parameters())
        hidden, rest = optimizer.param_groups
        assert hidden["param_names"] == ["0.weight", "2.weight"]
        assert rest["param_names"] == [
            "0.bias",
            "2.bias",
            "3.weight",
            "3.bias",
            "5.weight",
            "5.bias",
        ]
        twin = small_model()
        names = dict(twin.named_parameters())
        adamw = torch.optim.AdamW([names[name] for name in rest["param_names"]], lr=1e-3)
        ours = fw.optimizers.build("muon", list(model.parameters()), lr=1e-3, weight_decay=0.01)
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for _ in range(3):
            ours.step()
            adamw.step()
        for name in rest["param_names"]:
            torch.testing.assert_close(dict(model.named_parameters())[name], names[name])

    @pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 2, 3, 3)])
    def test_singular_values_take_five_steps_of_the_quintic(self, shape):
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        head = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        weight.grad = torch.randn(shape, dtype=torch.float64)
        options = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "adjust_lr": "original"}
        fw.optimizers.build("muon", [weight, head], **options).step()
        gradient = weight.grad.flatten(1)
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        s = s / gradient.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        rows, columns = gradient.shape
        expected = -(max(1, rows / columns) ** 0.5) * u @ torch.diag(s) @ v
        torch.testing.assert_close(weight.detach().flatten(1), expected)

    @pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
    def test_it_is_torchs_muon_but_for_the_rounding_of_bfloat16(self, adjust_lr):
        ours, torchs = (nn.Parameter(torch.ones(8, 5)) for _ in range(2))
        head = nn.Parameter(torch.zeros(2, 8))
        mine = fw.optimizers.build(
            "muon", [ours, head], lr=0.1, weight_decay=0.1, adjust_lr=adjust_lr
        )
        theirs = torch.optim.Muon([torchs], lr=0.1, weight_decay=0.1, adjust_lr_fn=adjust_lr)
        for _ in range(3):
            ours.grad = torch.randn(8, 5)
            torchs.grad = ours.grad.clone()
            mine.step()
            theirs.step()
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0.005)

    def test_an_embedding_and_a_single_matrix_use_adamw(self):
        table, hidden, head = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
        groups = fw.optimizers.build(
            "muon", [table, hidden, head], embedding=True, adamw_lr=0.5
        ).param_groups
        assert [(len(group["params"]), group["hidden"], group["lr"]) for group in groups] == [
            (1, True, 5e-3),
            (2, False, 0.5),
        ]
        assert [group["hidden"] for group in fw.optimizers.build("muon", [head]).param_groups] == [
            False
        ]


def test_a_model_in_another_memory_format_resumes_exactly_from_its_checkpoint(tmp_path):
    images = fw.TensorSplit(
        torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 5
    )

    def run(steps, resume=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)).to(
            memory_format=torch.channels_last
        )
        trainer = fw.Trainer(max_steps=steps, device="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        trainer.fit(
            model,
            images,
            task=nn.CrossEntropyLoss(),
            optimizer=optimizer,
            batch_size=16,
            resume=resume,
        )
        return trainer

    state = run(4).state_dict()
    weights = state.pop("model")
    loaded, training = checkpoint.load(checkpoint.save(tmp_path, weights, state, 4))
    whole = run(8)
    resumed = run(8, training | {"model": loaded})
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
def test_an_optimizer_built_by_name_is_fused_as_on_the_command_line(name):
    parameters = [nn.Parameter(torch.ones(2))]
    optimizer = fw.optimizers.build(name, parameters, lr=0.1)
    assert [group["fused"] for group in optimizer.param_groups] == [True]
    complex_parameters = [nn.Parameter(torch.ones(2, dtype=torch.cfloat))]
    assert not fw.optimizers.build(name, complex_parameters, lr=0.1).defaults["fused"]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_implementation_gives_the_weights_of_a_loop_for_each_dtype(name, dtype):
    """The fused SGD of torch 2.13 omits half of the update of bf16 and fp16 parameters on a CPU."""
    results = []
    for fused in (True, False):
        parameter = nn.Parameter(torch.linspace(-0.1, 0.1, 48, dtype=dtype))
        optimizer = fw.optimizers.build(name, [parameter], lr=0.1)
        if not fused:
            optimizer.param_groups[0].update(fused=False, foreach=False)
        for _ in range(3):
            parameter.grad = torch.linspace(0.2, 0.4, 48, dtype=dtype)
            optimizer.step()
        results.append(parameter.detach().double())
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=2e-3)


def test_parameters_that_share_memory_with_gaps_are_not_fused():
    weights = torch.zeros(4, 8)
    part = nn.Parameter(weights[:, :4])
    assert not fw.optimizers.build("sgd", [part], lr=0.1).defaults["fused"]
    columns = nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last))
    assert fw.optimizers.build("sgd", [columns], lr=0.1).defaults["fused"]


def test_a_group_may_hold_an_iterator():
    model = nn.Linear(2, 2)
    optimizer = fw.optimizers.build("adamw", [{"params": model.parameters()}], lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 2
