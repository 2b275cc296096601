"""Models and tasks that learn what the inputs are like: autoencoders, variational ones, adversarial networks."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework import (
    Activation,
    Batch,
    BuildError,
    Data,
    DataError,
    NonNegativeFloat,
    Norm,
    PositiveInt,
    Shape,
    Step,
    Target,
    Task,
    models,
    shapes,
    tasks,
)
from framework.contracts.alignment import same_shape
from framework.contracts.model import GenerativeModel
from framework.contracts.task import Phase, check_tensor_output

Network = Literal["mlp", "conv"]


def encoder(
    kind: Network, in_shape: Shape, outputs: int, widths: Sequence[int], activation: Activation
) -> nn.Module:
    """Return a network from an input to `outputs` numbers: hidden layers, or convolutions that each halve the image."""
    layers: list[nn.Module] = [] if kind == "conv" else [nn.Flatten()]
    features = in_shape[0] if kind == "conv" else prod(in_shape)
    if kind == "conv" and (
        len(in_shape) != 3 or any(size % 2 ** len(widths) for size in in_shape[1:])
    ):
        raise BuildError(
            f"network=conv halves images (C, H, W) {len(widths)} times (`widths`), not {in_shape}"
        )
    for width in widths:
        layer = (
            nn.Conv2d(features, width, 4, 2, 1) if kind == "conv" else nn.Linear(features, width)
        )
        layers += [layer, activation()]
        features = width
    body = nn.Sequential(*layers, nn.Flatten())
    return body.append(nn.Linear(shapes.output_shape(body, in_shape)[0], outputs))


def decoder(
    kind: Network,
    code: int,
    out_shape: Shape,
    widths: Sequence[int],
    activation: Activation,
    norm: Norm | None = None,
) -> nn.Sequential:
    """Return a network from a code to an output: the layers of `encoder` the other way round, with norms if wanted."""
    layers: list[nn.Module] = []
    shape: Shape = (code,)
    if kind == "conv":
        halved = 2 ** len(widths)
        if len(out_shape) != 3 or any(size % halved for size in out_shape[1:]):
            raise BuildError(
                f"network=conv doubles images {len(widths)} times (`widths`), not to {tuple(out_shape)}"
            )
        shape = (widths[-1], *(size // halved for size in out_shape[1:]))
        layers = [
            nn.Linear(code, prod(shape)),
            nn.Unflatten(1, shape),
            *after(shape, activation, norm),
        ]
    for width in [*reversed(widths[:-1]), out_shape[0]] if kind == "conv" else reversed(widths):
        if kind == "conv":
            layers.append(nn.ConvTranspose2d(shape[0], width, 4, 2, 1))
            shape = (width, *(2 * size for size in shape[1:]))
        else:
            layers.append(nn.Linear(shape[0], width))
            shape = (width,)
        layers += (
            after(shape, activation, norm) if kind == "mlp" or shape != tuple(out_shape) else []
        )
    if kind == "mlp":
        layers += [nn.Linear(shape[0], prod(out_shape)), nn.Unflatten(1, tuple(out_shape))]
    return nn.Sequential(*layers)


def after(shape: Shape, activation: Activation, norm: Norm | None) -> list[nn.Module]:
    return [*([] if norm is None else [norm(shape)]), activation()]


@models.register("autoencoder")
class Autoencoder(nn.Module):
    """An encoder to a short code, and a decoder from it to the output (Hinton and Salakhutdinov 2006)."""

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        code: PositiveInt = 32,
        network: Network = "mlp",
        widths: Sequence[PositiveInt] = (256,),
        activation: Activation = "relu",
    ):
        """Build both.

        Args:
            code: numbers in the code.
            network: mlp, or conv for images: each layer halves them, the decoder's doubles them.
            widths: features (channels) of the encoder's hidden layers; the decoder has them the other way round.
            activation: after each hidden layer.
        """
        super().__init__()
        self.code = code
        self.encode = encoder(network, in_shape, self.encoded, widths, activation)
        self.decode = decoder(network, code, out_shape, widths, activation)

    @property
    def encoded(self) -> int:
        """How many numbers the encoder gives."""
        return self.code

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@models.register("vae")
class Vae(Autoencoder):
    """Variational autoencoder: a Gaussian over codes for each input (Kingma and Welling 2014, arXiv:1312.6114).

    Called like any model it decodes the mean. `sample` decodes codes drawn from the prior, a standard normal.
    """

    @property
    def encoded(self) -> int:
        return 2 * self.code

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the variance of the code, each (batch, code)."""
        mean, log_variance = self.encode(x).chunk(2, 1)
        return mean, log_variance

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.posterior(x)[0])

    def sample(self, count: int) -> Tensor:
        return self.decode(torch.randn(count, self.code, device=next(self.parameters()).device))


@models.register("gan")
class Gan(nn.Module):
    """A generator and a discriminator (Goodfellow et al. 2014, arXiv:1406.2661). Called, it judges inputs: logits.

    `sample` generates inputs from numbers drawn from a standard normal.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        latent: PositiveInt = 64,
        network: Network = "mlp",
        widths: Sequence[PositiveInt] = (256, 256),
        activation: Activation = "leaky_relu",
        norm: Norm | None = None,
        output: Activation | None = None,
    ):
        """Build both.

        Args:
            latent: numbers, drawn from a standard normal, that an input is generated from.
            network: mlp, or conv for images: each layer halves them, the generator's doubles them.
            widths: features (channels) of the discriminator's hidden layers; the generator's are the other way round.
            activation: after each hidden layer.
            norm: before each activation of the generator (Radford et al. 2016, arXiv:1511.06434); null for none.
            output: after the generator's last layer, such as sigmoid for inputs from 0 to 1; null for none.
        """
        super().__init__()
        self.latent = latent
        self.discriminator = encoder(network, in_shape, prod(out_shape), widths, activation)
        self.discriminator.append(nn.Unflatten(1, tuple(out_shape)))
        self.generator = decoder(network, latent, in_shape, widths, activation, norm)
        if output is not None:
            self.generator.append(output())

    def forward(self, x: Tensor) -> Tensor:
        return self.discriminator(x)

    def sample(self, count: int) -> Tensor:
        return self.generator(
            torch.randn(count, self.latent, device=next(self.parameters()).device)
        )


class OfInputs(Task):
    """A task whose targets are the inputs themselves; what else a batch holds is not looked at."""

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        return "value", tuple(data.in_shape)

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": outputs}

    def pictures(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Return what a person should see, rows of inputs' shape: here each input, and what became of it."""
        given = self.predict(model(inputs))["reconstruction"]
        shown = {"reconstructions": torch.stack([inputs, given], 1).flatten(0, 1)}
        if isinstance(model, GenerativeModel):
            shown["samples"] = self.predict(model.sample(len(inputs)))["reconstruction"]
        return shown


@tasks.register("reconstruction")
class Reconstruction(OfInputs):
    """Give the inputs back: the mean squared error of each number, or with noise that of a denoising autoencoder."""

    def __init__(self, noise: NonNegativeFloat = 0.0):
        """Say what stands in the way.

        Args:
            noise: standard deviation of what is added to the inputs in training (Vincent et al. 2008).
        """
        self.noise = noise
        self.row_size = 1  # numbers of an input, where the data says so

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs = batch[0]
        seen = (
            inputs + self.noise * torch.randn_like(inputs)
            if self.noise and model.training
            else inputs
        )
        outputs = model(seen)
        check_tensor_output(model, outputs)
        return Step(F.mse_loss(outputs, same_shape(outputs, inputs)), outputs, inputs)

    def count(self, batch: Batch) -> int | float:
        samples, rest = divmod(batch[0].numel(), self.row_size)
        return batch[0].numel() / self.row_size if rest else samples

    def check(self, data: Data) -> None:
        self.row_size = prod(data.in_shape)


@tasks.register("variational")
class Variational(OfInputs):
    """Minus the evidence lower bound, in nats a sample (Kingma and Welling 2014, equation 10, one draw of the code).

    Evaluation draws its codes from a generator of its own, the same each time.
    Logged beside the loss: `reconstruction` and `divergence`, the two terms.
    """

    def __init__(
        self,
        beta: NonNegativeFloat = 1.0,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
    ):
        """Say what is weighed.

        Args:
            beta: weight of the divergence (Higgins et al. 2017); 1 is the bound.
            likelihood: bernoulli takes inputs from 0 to 1 and outputs as logits; gaussian any, with variance 1.
        """
        self.beta, self.likelihood = beta, likelihood

    def check(self, data: Data) -> None:
        first = torch.as_tensor(data.train[0][0]).float()
        if self.likelihood == "bernoulli" and (first.min() < 0 or first.max() > 1):
            raise DataError(
                "task.likelihood=bernoulli takes inputs from 0 to 1: data.normalize=false, or task.likelihood=gaussian"
            )

    def check_model(self, model: nn.Module) -> None:
        needs(model, "posterior", "decode", "model=vae")

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs = batch[0]
        mean, log_variance = model.posterior(inputs)  # type: ignore[operator]
        generator = None if model.training else torch.Generator(mean.device).manual_seed(0)
        drawn = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        code = mean + drawn * (log_variance / 2).exp()
        outputs = model.decode(code)  # type: ignore[operator]
        reconstruction = self.surprise(outputs, same_shape(outputs, inputs)) / len(inputs)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2 / len(inputs)
        shown = outputs.sigmoid() if self.likelihood == "bernoulli" else outputs
        values = {"reconstruction": reconstruction, "divergence": divergence}
        return Step(reconstruction + self.beta * divergence, shown, inputs, values)

    def surprise(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Return minus the logarithm of the likelihood of all numbers, summed; the Gaussian's without its constant."""
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(outputs, inputs, reduction="sum")
        return (outputs - inputs).square().sum() / 2

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": outputs.sigmoid() if self.likelihood == "bernoulli" else outputs}


@tasks.register("adversarial")
class Adversarial(Task):
    """A generator against a discriminator, which are updated in turn (Goodfellow et al. 2014, the non-saturating form).

    A training step is some phases of the discriminator, each with fresh samples, and one of the generator; logged are
    `discriminator_loss`, `generator_loss`, and how the discriminator judges (`real`, `fake`: probabilities that an
    input is real; with a penalty `slope`, the mean squared norm of its gradient). train/loss is the mean over the
    phases. Evaluation measures the discriminator, without the penalty.
    """

    def __init__(
        self,
        loss: Literal["logistic", "hinge"] = "logistic",
        critic_steps: PositiveInt = 1,
        penalty: NonNegativeFloat = 0.0,
    ):
        """Say how they play.

        Args:
            loss: logistic, or hinge (Lim and Ye 2017, arXiv:1705.02894).
            critic_steps: updates of the discriminator for one of the generator.
            penalty: γ in γ/2 E |∇D(x)|², by which the discriminator stays flat at the inputs (R1: Mescheder et al.
                2018, arXiv:1801.04406, section 4.1); 0: none.
        """
        self.loss, self.penalty = loss, penalty
        self.phases = [Phase("discriminator", ["discriminator.*"])] * critic_steps + [
            Phase("generator", ["generator.*"])
        ]

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        return "labels", (1,)

    def check_model(self, model: nn.Module) -> None:
        needs(model, "generator", "discriminator", "model=gan")

    def phase(self, name: str, model: nn.Module, batch: Batch) -> Step:
        if name == "discriminator":
            return self.step(model, batch)
        judged = model.discriminator(model.sample(len(batch[0])))  # type: ignore[operator]
        loss = F.softplus(-judged).mean() if self.loss == "logistic" else -judged.mean()
        return Step(loss, judged, torch.ones_like(judged), {"generator_loss": loss})

    def step(self, model: nn.Module, batch: Batch) -> Step:
        penalised = self.penalty > 0 and model.training
        inputs = batch[0].detach().requires_grad_(penalised)
        with torch.no_grad():
            made = model.sample(len(inputs)).to(inputs.dtype)  # type: ignore[operator]
        real, fake = model.discriminator(inputs), model.discriminator(made)  # type: ignore[operator]
        if self.loss == "logistic":
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        else:
            loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        outputs, targets = (
            torch.cat([real, fake]),
            torch.cat([torch.ones_like(real), torch.zeros_like(fake)]),
        )
        values = {
            "discriminator_loss": loss,
            "real": real.sigmoid().mean(),
            "fake": fake.sigmoid().mean(),
        }
        if penalised:
            (gradient,) = torch.autograd.grad(real.sum(), inputs, create_graph=True)
            values["slope"] = gradient.flatten(1).square().sum(1).mean()
            loss = loss + self.penalty / 2 * values["slope"]
        return Step(loss, outputs, targets, values)

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"real": outputs.float().sigmoid().flatten(1)[:, 0]}

    def pictures(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Return what a person should see: generated inputs."""
        return {"samples": model.sample(len(inputs))}  # type: ignore[operator]


def needs(model: nn.Module, first: str, second: str, advice: str) -> None:
    if not (hasattr(model, first) and hasattr(model, second)):
        raise BuildError(
            f"{type(model).__name__} has no `{first}` and `{second}`, which this task calls: {advice}"
        )
