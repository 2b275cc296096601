"""The task of predicting the next token, its metrics, and how a model writes text."""

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
from framework.contracts.callback import Callback
from framework.contracts.model import CachedDecoder
from framework.contracts.state import Cadence
from framework.contracts.task import check_tensor_output, inputs_and_targets

IGNORED = -1  # the target of a token that only gives context


class TokenLoss(nn.Module):
    """-log p of each token, and 0 where the target is ignored.

    characters: how many characters each token stands for, where the data says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("characters", None, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


@tasks.register("language_modelling", aliases=["language_modeling"])
class LanguageModelling(Task):
    """The next token at each position: outputs (batch, T, vocabulary) logits, targets (batch, T) ids, -1 is ignored.

    For texts, metrics see outputs (tokens, 2), -log p and the number of characters of each token, so that bits per
    character are right for tokens of any length. For other sequences they see the logits.
    """

    criterion: TokenLoss

    def __init__(self) -> None:
        self.criterion = TokenLoss()

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs, targets = inputs_and_targets(batch)
        outputs = model(inputs)
        check_tensor_output(model, outputs)
        logits, targets = outputs.flatten(0, -2), targets.flatten()
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
        """Return the likeliest token after each input, and how likely it is."""
        last = outputs if outputs.ndim == 2 else outputs[:, -1]
        probability, token = last.float().softmax(1).max(1)
        return {"token": token, "probability": probability}

    def check(self, data: Data) -> None:
        characters = data.characters
        if characters is None and data.target != "class":
            raise DataError(
                f"data {type(data).__name__} holds no tokens: choose a text, such as data=stdlib_source"
            )
        self.criterion.characters = None if characters is None else characters.float()

    def generate(
        self, model: nn.Module, tokens: Tensor, context: int, **sampling: Any
    ) -> list[int]:
        """Return the tokens that the model puts after some; see `sample` for what can be said of how."""
        return sample(model, tokens.tolist(), context, **sampling)


class OfTexts(Metric):
    """A measure of outputs (tokens, 2): -log p in nats, and characters (see `LanguageModelling`)."""

    better = "lower"
    targets: ClassVar[tuple[str, ...]] = ("none",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack(
            [outputs[:, 0].double().sum(), outputs[:, 1].double().sum(), (targets != IGNORED).sum()]
        )


@metrics.register("bits_per_character")
class BitsPerCharacter(OfTexts):
    """-log₂ p of a text by its number of characters, whatever its tokens are."""

    name = "bits_per_character"

    def compute(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1] / math.log(2))


@metrics.register("token_perplexity")
class TokenPerplexity(OfTexts):
    """exp of the mean -log p of a token, logged as `perplexity`; comparable for the same tokens only."""

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
    """Return `length` tokens that the model puts after the given ones, without moving any global generator.

    A text longer than the context is seen through a window: each time it is full, it slides by half of the context.

    Args:
        tokens: what to go on with; without any, the unknown token (1).
        temperature: logits are divided by it; 0 takes the likeliest token each time.
        top_k: only the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833); None for all.
        top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2020, arXiv:1904.09751).
        seed: of the drawing.
        cached: keep keys and values of earlier tokens, if the model can; the tokens are the same without.
    """
    check_sampling(temperature, top_k, top_p)
    text, hop, draw = list(tokens) or [1], max(context // 2, 1), torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    cached = cached and isinstance(model, CachedDecoder)
    start = seen = 0
    cache: Any = None
    model.eval()
    with torch.no_grad():
        for _ in range(length):
            begin = max(-(-(len(text) - context) // hop) * hop, 0)
            if cache is None or begin != start:
                start, seen, cache = begin, begin, model.new_cache() if cached else ()  # type: ignore[operator]
            fresh = torch.tensor([text[seen if cached else start :]], device=device)
            logits = model(fresh, cache) if cached else model(fresh)
            seen = len(text)
            text.append(choose(logits[0, -1].float().cpu(), temperature, top_k, top_p, draw))
    model.train(modes[model])  # some modules do more in `train` than set a flag
    for module, mode in modes.items():
        module.training = mode
    return text[-length:] if length else []


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise SettingError for a value that means nothing."""
    if not 0 <= temperature < math.inf:
        raise SettingError(f"temperature {temperature:g} should be 0 or more")
    if top_k is not None and top_k < 1:
        raise SettingError(f"top_k {top_k} should be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise SettingError(f"top_p {top_p:g} should be in (0, 1]")


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    draw: torch.Generator | None,
) -> int:
    """Draw a token from logits (vocabulary,), by what `sample` says."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = (logits / temperature).sort(descending=True, stable=True)
    probabilities = values[:top_k].softmax(0)
    if top_p is not None:
        before = (
            probabilities.cumsum(0) - probabilities
        )  # of the likelier ones; the likeliest always stays
        probabilities = probabilities.where(before < top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=draw)])


@callbacks.register("text_samples")
class TextSamples(Callback):
    """Shows the loggers what a language model writes after a prompt, with the same draws each time."""

    changes_training = False

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
        """Say what to write, and how often.

        Args:
            every: how often.
            prompt: what it goes on with.
            length: tokens.
            temperature: logits are divided by it; 0 takes the likeliest token each time.
            top_k: only the k likeliest tokens; null for all.
            top_p: only the likeliest tokens that together have this probability; null for all.
            seed: of the drawing.
        """
        self.cadence, self.prompt = Cadence(every), prompt
        self.sampling = {
            "length": length,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }

    def on_step_end(self, trainer: Context) -> None:
        if self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0):
            self.show(trainer)

    def show(self, trainer: Context) -> None:
        split = trainer.train_batches.split
        if not isinstance(split, WindowSplit) or "tokenizer" not in split.facts:
            raise SettingError(
                "text_samples: the data is no text that a language model learns from"
            )
        tokenizer = split.facts["tokenizer"]
        made = sample(trainer.model, tokenizer.encode(self.prompt), split.length, **self.sampling)
        text = "".join(
            f"    {line}\n" for line in (self.prompt + tokenizer.decode(made)).splitlines()
        )
        for logger in trainer.loggers:
            logger.text("samples", text, trainer.state.step)
