"""Generative models and their tasks: (variational) autoencoders and adversarial networks."""

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
) -> nn.Sequential:
    """Return a network from an input to a number of outputs.

    Args:
        kind: mlp: hidden layers; conv: convolutions that each halve the image.
        in_shape: of an input.
        outputs: number of outputs.
        widths: features or channels of each layer.
        activation: after each layer.
    """
    layers: list[nn.Module] = []
    if kind == "conv":
        check_image_shape(in_shape, widths)
        channels = in_shape[0]
        for width in widths:
            layers += [nn.Conv2d(channels, width, 4, 2, 1), activation()]
            channels = width
    else:
        layers.append(nn.Flatten())
        features = prod(in_shape)
        for width in widths:
            layers += [nn.Linear(features, width), activation()]
            features = width
    body = nn.Sequential(*layers, nn.Flatten())
    features = shapes.output_shape(body, in_shape)[0]
    return body.append(nn.Linear(features, outputs))


def decoder(
    kind: Network,
    code: int,
    out_shape: Shape,
    widths: Sequence[int],
    activation: Activation,
    norm: Norm | None = None,
) -> nn.Sequential:
    """Return a network from a code to an output: the layers of `encoder` in reverse order.

    Args:
        kind: mlp: hidden layers; conv: transposed convolutions that each double the image.
        code: number of inputs.
        out_shape: of an output.
        widths: features or channels of the layers of the encoder.
        activation: after each layer but the last.
        norm: before each activation, or None.
    """
    if kind == "conv":
        return conv_decoder(code, out_shape, widths, activation, norm)
    layers: list[nn.Module] = []
    features = code
    for width in reversed(widths):
        layers += [nn.Linear(features, width), *norm_and_activation((width,), activation, norm)]
        features = width
    layers += [nn.Linear(features, prod(out_shape)), nn.Unflatten(1, tuple(out_shape))]
    return nn.Sequential(*layers)


def conv_decoder(
    code: int, out_shape: Shape, widths: Sequence[int], activation: Activation, norm: Norm | None
) -> nn.Sequential:
    """Return the decoder for network=conv, see `decoder`."""
    check_image_shape(out_shape, widths)
    channels, height, width = out_shape
    divisor = 2 ** len(widths)
    shape = (widths[-1], height // divisor, width // divisor)
    layers = [
        nn.Linear(code, prod(shape)),
        nn.Unflatten(1, shape),
        *norm_and_activation(shape, activation, norm),
    ]
    for out_channels in reversed(widths[:-1]):
        layers.append(nn.ConvTranspose2d(shape[0], out_channels, 4, 2, 1))
        shape = (out_channels, 2 * shape[1], 2 * shape[2])
        layers += norm_and_activation(shape, activation, norm)
    layers.append(nn.ConvTranspose2d(shape[0], channels, 4, 2, 1))
    return nn.Sequential(*layers)


def check_image_shape(shape: Shape, widths: Sequence[int]) -> None:
    """Raise BuildError unless images of this shape can be halved once for each width."""
    divisor = 2 ** len(widths)
    if len(shape) != 3 or shape[1] % divisor or shape[2] % divisor:
        raise BuildError(
            f"network=conv halves images {len(widths)} times (`widths`): expected (C, H, W) "
            f"with H and W divisible by {divisor}, got {tuple(shape)}"
        )


def norm_and_activation(shape: Shape, activation: Activation, norm: Norm | None) -> list[nn.Module]:
    """Return a norm, unless it is None, and an activation for outputs of this shape."""
    if norm is None:
        return [activation()]
    return [norm(shape), activation()]


@models.register("autoencoder")
class Autoencoder(nn.Module):
    """An encoder to a short code and a decoder to the output (Hinton and Salakhutdinov 2006).

    Args:
        code: numbers in the code.
        network: mlp, or conv for images: encoder layers halve the image, decoder layers double
            it.
        widths: features (channels) of the encoder's hidden layers; the decoder reverses them.
        activation: after each hidden layer.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        code: PositiveInt = 32,
        network: Network = "mlp",
        widths: Sequence[PositiveInt] = (256,),
        activation: Activation = "relu",
    ):
        super().__init__()
        self.code = code
        self.encode = encoder(network, in_shape, self.encoder_outputs, widths, activation)
        self.decode = decoder(network, code, out_shape, widths, activation)

    @property
    def encoder_outputs(self) -> int:
        """Number of outputs of the encoder."""
        return self.code

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@models.register("vae")
class Vae(Autoencoder):
    """Variational autoencoder: a Gaussian over codes for each input.

    (Kingma and Welling 2014, arXiv:1312.6114.) The forward pass decodes the mean. `sample` decodes
    codes drawn from the prior, a standard normal.
    """

    @property
    def encoder_outputs(self) -> int:
        """Number of outputs of the encoder: mean and logarithm of the variance."""
        return 2 * self.code

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the variance of the code, each (batch, code)."""
        mean, log_variance = self.encode(x).chunk(2, 1)
        return mean, log_variance

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.posterior(x)[0])

    def sample(self, count: int) -> Tensor:
        """Return outputs for random codes."""
        device = next(self.parameters()).device
        return self.decode(torch.randn(count, self.code, device=device))


@models.register("gan")
class Gan(nn.Module):
    """Generative adversarial network: a generator and a discriminator.

    (Goodfellow et al. 2014, arXiv:1406.2661.) The forward pass returns the discriminator's logits.
    `sample` generates inputs from latent numbers drawn from a standard normal.

    Args:
        latent: latent numbers of a generated input.
        network: mlp, or conv for images: discriminator layers halve the image, generator layers
            double it.
        widths: features (channels) of the discriminator's hidden layers; the generator reverses
            them.
        activation: after each hidden layer.
        norm: before each activation of the generator (Radford et al. 2016, arXiv:1511.06434);
            null for none.
        output: after the generator's last layer, such as sigmoid for inputs from 0 to 1; null
            for none.
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
        """Return generated inputs."""
        device = next(self.parameters()).device
        return self.generator(torch.randn(count, self.latent, device=device))


class OfInputs(Task):
    """Base of tasks whose targets are the inputs; other tensors of a batch are ignored."""

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        return "value", tuple(data.in_shape)

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": outputs}

    def pictures(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Return each input before its reconstruction, and samples of a generative model."""
        reconstructions = self.predict(model(inputs))["reconstruction"]
        rows = {"reconstructions": torch.stack([inputs, reconstructions], 1).flatten(0, 1)}
        if isinstance(model, GenerativeModel):
            rows["samples"] = self.predict(model.sample(len(inputs)))["reconstruction"]
        return rows


@tasks.register("reconstruction")
class Reconstruction(OfInputs):
    """Reconstructs the inputs: the loss is the mean squared error of each number.

    With noise it is the task of a denoising autoencoder.

    Args:
        noise: standard deviation of the noise added to inputs in training (Vincent et al.
            2008).
    """

    def __init__(self, noise: NonNegativeFloat = 0.0):
        self.noise = noise
        self.row_size = 1  # numbers of an input; known after `check`

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs = batch[0]
        noisy = inputs
        if self.noise and model.training:
            noisy = inputs + self.noise * torch.randn_like(inputs)
        outputs = model(noisy)
        check_tensor_output(model, outputs)
        return Step(F.mse_loss(outputs, same_shape(outputs, inputs)), outputs, inputs)

    def count(self, batch: Batch) -> int | float:
        numbers = batch[0].numel()
        if numbers % self.row_size:
            return numbers / self.row_size
        return numbers // self.row_size

    def check(self, data: Data) -> None:
        self.row_size = prod(data.in_shape)


@tasks.register("variational")
class Variational(OfInputs):
    """Minimizes the negative evidence lower bound, in nats per sample.

    (Kingma and Welling 2014, equation 10, with one draw of the code.) Evaluation draws the same
    codes each time, from its own generator. The two terms of the loss, `reconstruction` and
    `divergence`, are logged too.

    Args:
        beta: weight of the divergence (Higgins et al. 2017); 1 gives the bound.
        likelihood: bernoulli takes inputs from 0 to 1 and outputs as logits; gaussian takes any
            inputs, with variance 1.
    """

    def __init__(
        self,
        beta: NonNegativeFloat = 1.0,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
    ):
        self.beta = beta
        self.likelihood = likelihood

    def check(self, data: Data) -> None:
        first = torch.as_tensor(data.train[0][0]).float()
        if self.likelihood == "bernoulli" and (first.min() < 0 or first.max() > 1):
            raise DataError(
                "task.likelihood=bernoulli takes inputs from 0 to 1: data.normalize=false, "
                "or task.likelihood=gaussian"
            )

    def check_model(self, model: nn.Module) -> None:
        check_has(model, "posterior", "decode", "model=vae")

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs = batch[0]
        mean, log_variance = model.posterior(inputs)  # type: ignore[operator]
        generator = None if model.training else torch.Generator(mean.device).manual_seed(0)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        code = mean + noise * (log_variance / 2).exp()
        outputs = model.decode(code)  # type: ignore[operator]
        targets = same_shape(outputs, inputs)
        reconstruction = self.negative_log_likelihood(outputs, targets) / len(inputs)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2 / len(inputs)
        loss = reconstruction + self.beta * divergence
        values = {"reconstruction": reconstruction, "divergence": divergence}
        return Step(loss, self.predict(outputs)["reconstruction"], inputs, values)

    def negative_log_likelihood(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Return the sum over all numbers; the Gaussian one without its constant."""
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(outputs, inputs, reduction="sum")
        return (outputs - inputs).square().sum() / 2

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": outputs.sigmoid() if self.likelihood == "bernoulli" else outputs}


@tasks.register("adversarial")
class Adversarial(Task):
    """Trains a generator and a discriminator in turn.

    (Goodfellow et al. 2014, the non-saturating loss.) A training step has one or more phases of the
    discriminator, each with fresh samples, and one phase of the generator. It logs
    `discriminator_loss`, `generator_loss`, and the mean probability of being real that the
    discriminator gives to inputs (`real`) and samples (`fake`); with a penalty also `slope`, the
    mean squared norm of the discriminator's gradient. train/loss is the mean over the phases.
    Evaluation measures the discriminator without the penalty.

    Args:
        loss: logistic, or hinge (Lim and Ye 2017, arXiv:1705.02894).
        critic_steps: updates of the discriminator for each update of the generator.
        penalty: γ in γ/2 E ‖∇D(x)‖², which keeps the discriminator flat at the inputs (R1:
            Mescheder et al. 2018, arXiv:1801.04406, section 4.1); 0: none.
    """

    def __init__(
        self,
        loss: Literal["logistic", "hinge"] = "logistic",
        critic_steps: PositiveInt = 1,
        penalty: NonNegativeFloat = 0.0,
    ):
        self.loss = loss
        self.penalty = penalty
        discriminator = Phase("discriminator", ["discriminator.*"])
        generator = Phase("generator", ["generator.*"])
        self.phases = [discriminator] * critic_steps + [generator]

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        return "labels", (1,)

    def check_model(self, model: nn.Module) -> None:
        check_has(model, "generator", "discriminator", "model=gan")

    def phase(self, name: str, model: nn.Module, batch: Batch) -> Step:
        if name == "discriminator":
            return self.step(model, batch)
        logits = model.discriminator(model.sample(len(batch[0])))  # type: ignore[operator]
        loss = F.softplus(-logits).mean() if self.loss == "logistic" else -logits.mean()
        return Step(loss, logits, torch.ones_like(logits), {"generator_loss": loss})

    def step(self, model: nn.Module, batch: Batch) -> Step:
        penalized = self.penalty > 0 and model.training
        inputs = batch[0].detach().requires_grad_(penalized)
        with torch.no_grad():
            samples = model.sample(len(inputs)).to(inputs.dtype)  # type: ignore[operator]
        real = model.discriminator(inputs)  # type: ignore[operator]
        fake = model.discriminator(samples)  # type: ignore[operator]
        if self.loss == "logistic":
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        else:
            loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        outputs = torch.cat([real, fake])
        targets = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
        values = {
            "discriminator_loss": loss,
            "real": real.sigmoid().mean(),
            "fake": fake.sigmoid().mean(),
        }
        if penalized:
            (gradient,) = torch.autograd.grad(real.sum(), inputs, create_graph=True)
            values["slope"] = gradient.flatten(1).square().sum(1).mean()
            loss = loss + self.penalty / 2 * values["slope"]
        return Step(loss, outputs, targets, values)

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"real": outputs.float().sigmoid().flatten(1)[:, 0]}

    def generator(self, model: nn.Module) -> tuple[nn.Module, Shape]:
        """Return the generator, for an export; the discriminator is of no use after training."""
        return model.generator, (model.latent,)  # type: ignore[return-value]

    def pictures(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Return generated inputs."""
        return {"samples": model.sample(len(inputs))}  # type: ignore[operator]


def check_has(model: nn.Module, first: str, second: str, advice: str) -> None:
    """Raise BuildError unless the model has both attributes."""
    if not (hasattr(model, first) and hasattr(model, second)):
        name = type(model).__name__
        raise BuildError(f"{name} has no `{first}` and `{second}`, which this task calls: {advice}")
