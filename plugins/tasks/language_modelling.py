"""Language modelling: the task, its metrics, and text generation."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework import (
    Batch,
    Context,
    Data,
    DataError,
    Every,
    Fraction,
    Metric,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SettingError,
    Step,
    Task,
    WindowSplit,
    callbacks,
    metrics,
    tasks,
)
from framework.contracts.model import CachedDecoder
from framework.contracts.periodic_callback import PeriodicCallback
from framework.contracts.task import check_tensor_output, inputs_and_targets

IGNORED = -1  # the target of a token that is context only


class TokenLoss(nn.Module):
    """-log p of each token; 0 for ignored targets.

    Attributes:
        characters: number of characters of each token of the vocabulary; None if unknown.
    """

    characters: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("characters", None, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


@tasks.register("language_modelling", aliases=["language_modeling"])
class LanguageModelling(Task):
    """Predicts the next token at each position.

    Outputs are logits (batch, T, vocabulary), targets ids (batch, T); -1 is ignored. For texts,
    metrics get outputs (tokens, 2): -log p and the number of characters of each token, so that bits
    per character are correct for tokens of any length. For other sequences they get the logits.
    """

    criterion: TokenLoss

    def __init__(self) -> None:
        self.criterion = TokenLoss()

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs, targets = inputs_and_targets(batch)
        outputs = model(inputs)
        check_tensor_output(model, outputs)
        logits = outputs.flatten(0, -2)
        targets = targets.flatten()
        losses = self.criterion(logits, targets)
        kept = targets != IGNORED
        loss = losses.sum() / kept.sum().clamp_min(1)  # 0 where all are ignored
        if self.criterion.characters is None:
            return Step(loss, logits, targets)
        characters = self.criterion.characters[targets.clamp_min(0)] * kept
        return Step(loss, torch.stack([losses, characters], 1), targets)

    def count(self, batch: Batch) -> int | Tensor:
        return (batch[1] != IGNORED).sum()

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        """Return the most likely token after each input, and its probability."""
        last = outputs if outputs.ndim == 2 else outputs[:, -1]
        probability, token = last.float().softmax(1).max(1)
        return {"token": token, "probability": probability}

    def exported(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the logits of the next token at each position."""
        return {"logits": outputs}

    def check(self, data: Data) -> None:
        characters = data.characters
        if characters is None and data.target != "class":
            name = type(data).__name__
            raise DataError(
                f"data {name} contains no tokens; choose a text, such as data=stdlib_source"
            )
        self.criterion.characters = None if characters is None else characters.float()

    def generate(
        self, model: nn.Module, tokens: Tensor, context: int, **sampling: Any
    ) -> list[int]:
        """Return tokens that continue `tokens`; `sample` describes the arguments."""
        return sample(model, tokens.tolist(), context, **sampling)


class TextMetric(Metric):
    """Base of metrics of outputs (tokens, 2): -log p in nats, and characters."""

    better = "lower"
    targets: ClassVar[tuple[str, ...]] = ("none",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sums of -log p and of characters, and the number of tokens."""
        nats = outputs[:, 0].double().sum()
        characters = outputs[:, 1].double().sum()
        tokens = (targets != IGNORED).sum()
        return torch.stack([nats, characters, tokens])


@metrics.register("bits_per_character")
class BitsPerCharacter(TextMetric):
    """-log₂ p of a text divided by its number of characters; comparable for any tokens."""

    name = "bits_per_character"

    def compute(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1] / math.log(2))


@metrics.register("token_perplexity")
class TokenPerplexity(TextMetric):
    """exp of the mean -log p of a token, logged as `perplexity`.

    It is comparable for the same tokens only.
    """

    name = "perplexity"

    def compute(self, sums: Tensor) -> float:
        return float((sums[0] / sums[2]).clamp(max=700).exp())


def sample(
    model: nn.Module,
    tokens: Sequence[int],
    context: int,
    length: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cached: bool = True,
) -> list[int]:
    """Return `length` tokens that continue a text, without changing any global generator.

    If the text is longer than the context, the model sees the last tokens: when the context is
    full, its oldest half is dropped.

    Args:
        model: returns logits (batch, T, vocabulary).
        tokens: of the text to continue; if empty, the unknown token (1).
        context: maximum number of tokens that the model takes.
        length: number of new tokens.
        temperature: divides the logits; 0 selects the most likely token.
        top_k: draw from the k most likely tokens (Fan et al. 2018, arXiv:1805.04833); None: all.
        top_p: draw from the most likely tokens that together have this probability (Holtzman et al.
            2020, arXiv:1904.09751); None: all.
        seed: of the draws.
        cached: cache keys and values of earlier tokens, if the model can; the tokens are the same.

    Raises:
        SettingError: temperature, top_k or top_p is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    text = list(tokens) or [1]
    half = max(context // 2, 1)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    cached = cached and isinstance(model, CachedDecoder)
    cache: Any = None
    window_start = 0
    cached_until = 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        for _ in range(length):
            start = max(math.ceil((len(text) - context) / half) * half, 0)
            if cached and (cache is None or start != window_start):
                cache = model.new_cache()  # type: ignore[operator]
                cached_until = start
            window_start = start
            if cached:
                logits = model(torch.tensor([text[cached_until:]], device=device), cache)
                cached_until = len(text)
            else:
                logits = model(torch.tensor([text[start:]], device=device))
            last = logits[0, -1].float().cpu()
            text.append(draw_token(last, temperature, top_k, top_p, generator))
    model.train(modes[model])  # some modules do more in `train` than set a flag
    for module, mode in modes.items():
        module.training = mode
    return text[-length:] if length else []


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise SettingError for a value out of range."""
    if not 0 <= temperature < math.inf:
        raise SettingError(f"temperature={temperature:g}: expected 0 or more")
    if top_k is not None and top_k < 1:
        raise SettingError(f"top_k={top_k}: expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise SettingError(f"top_p={top_p:g}: expected a number in (0, 1]")


def draw_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> int:
    """Draw a token from logits (vocabulary,); `sample` describes the arguments."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = (logits / temperature).sort(descending=True, stable=True)
    probabilities = values[:top_k].softmax(0)
    if top_p is not None:
        # 0 for the most likely token, which therefore always remains
        probability_before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities.where(probability_before < top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


@callbacks.register("text_samples")
class TextSamples(PeriodicCallback):
    """Logs text that a language model generates after a prompt, with the same draws each time.

    Args:
        every: how often to generate text.
        prompt: text to continue.
        length: number of generated tokens.
        temperature: divides the logits; 0 selects the most likely token.
        top_k: draw from the k most likely tokens; null for all.
        top_p: draw from the most likely tokens that together have this probability; null for
            all.
        seed: of the draws.
    """

    def __init__(
        self,
        every: Every = "1epoch",
        prompt: str = "\n",
        length: PositiveInt = 400,
        temperature: NonNegativeFloat = 0.8,
        top_k: PositiveInt | None = None,
        top_p: Fraction | None = None,
        seed: NonNegativeInt = 0,
    ):
        super().__init__(every)
        self.prompt = prompt
        self.sampling: dict[str, Any] = {
            "length": length,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }

    def cost(self) -> str:
        return f"generates {self.sampling['length']:,} tokens, {self.cadence}"

    def on_fit_start(self, trainer: Context) -> None:
        text_split(trainer)

    def on_step_end(self, trainer: Context) -> None:
        self.show_if_due(trainer)

    def show(self, trainer: Context) -> None:
        """Generate a text and pass it to the loggers as a markdown code block."""
        split = text_split(trainer)
        tokenizer = split.facts["tokenizer"]
        prompt = tokenizer.encode(self.prompt)
        tokens = sample(trainer.model, prompt, split.length, **self.sampling)
        text = self.prompt + tokenizer.decode(tokens)
        block = "".join(f"    {line}\n" for line in text.splitlines())
        for logger in trainer.loggers:
            logger.text("samples", block, trainer.state.step)


def text_split(trainer: Context) -> WindowSplit:
    """Return the training split, with the tokenizer in its facts.

    Raises:
        SettingError: it is no text of a language model.
    """
    split = trainer.train_batches.split
    if not isinstance(split, WindowSplit) or "tokenizer" not in split.facts:
        raise SettingError("callbacks.text_samples: expected the text data of a language model")
    return split
