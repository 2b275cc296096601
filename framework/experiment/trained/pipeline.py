"""What an export contains: preprocessing, model and postprocessing, as one module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework.contracts.fields import Field, first_tensor
from framework.contracts.task import GeneratorTask, Task
from framework.data.dataset import Data, Loader, Scale, Split, splits_of
from framework.data.preparation import Preparation, RawInput, UnchangedInputs
from framework.errors import BuildError, short
from framework.errors.user_code import user_errors
from framework.runtime.batch import Batch

from .load import Trained, facts_that_fit

BATCH_SIZES = (1, 2, 7, 32)

Inputs = Tensor | dict[str, Tensor]
"""The inputs of a model: a tensor, or tensors by field if the task names several fields."""


class Pipeline(nn.Module):
    """The raw inputs through preprocessing, model and postprocessing, to a tuple of outputs.

    Args:
        preparation: preprocessing.
        model: the trained model.
        task: calls the model; its `exported` makes readable outputs.
        scale: of the targets, or None.
        fields: the fields of a batch that the task passes to the model; empty if a batch is
            (inputs, targets).
    """

    def __init__(
        self,
        preparation: Preparation,
        model: nn.Module,
        task: Task,
        scale: Scale | None = None,
        fields: Sequence[Field] = (),
    ):
        super().__init__()
        self.preparation = preparation
        self.model = model
        self.task = task
        self.scale = scale
        self.fields = list(fields)

    def forward(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in the order of `named_outputs`."""
        return tuple(self.named_outputs(self.preparation(*raw)).values())

    def named_outputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return the outputs by name for inputs of the model."""
        outputs = self.task.model_outputs(self.model, self.as_batch(inputs))
        if self.scale is not None:
            outputs = self.scale.inverse_transform(outputs)
        return self.task.exported(outputs)

    def as_batch(self, inputs: Inputs) -> Batch:
        """Return a batch of the task, without targets."""
        if isinstance(inputs, Tensor):
            return {self.fields[0]: inputs} if self.fields else (inputs,)
        return {field: inputs[str(field)] for field in self.fields}


class GeneratorPipeline(Pipeline):
    """Noise through a generator."""

    def named_outputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return the samples that the generator makes of noise."""
        return {"samples": self.model(inputs)}


class Noise(Preparation):
    """The inputs of a generator: numbers drawn from a standard normal distribution."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        text = "drawn from a standard normal distribution"
        self.shape = tuple(shape)
        self.raw = {"noise": RawInput(torch.float32, self.shape, text)}
        sizes = ", ".join(map(str, shape))
        self.example = "\n".join(
            [
                "count = int(file)  # the number of samples to generate",
                f"noise = np.random.default_rng().standard_normal((count, {sizes}))",
                'raw = {"noise": noise.astype("float32")}',
            ]
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Return the noise."""
        return noise

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the noise."""
        return (inputs,)

    def draw(self, count: int) -> Tensor:
        """Return the noise of some samples; the same for the same number."""
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, *self.shape, generator=generator)


def build_pipeline(trained: Trained, rows: Split) -> Pipeline:
    """Return preprocessing, model and postprocessing, in evaluation mode on the CPU.

    The model of the run is brought into this form, too, with weights that need no gradient.

    Args:
        trained: an open run.
        rows: a split of its data.
    """
    model = trained.model.eval().float().cpu().requires_grad_(False)
    task = trained.task
    if isinstance(task, GeneratorTask):
        generator, shape = task.generator(model)
        return GeneratorPipeline(Noise(shape), generator, task).eval()
    sample = take(rows, [0])
    fields = list(task.fields.select_inputs(sample)) if task.fields.named else []
    preparation = described_preparation(trained)
    if preparation is None:
        name = str(fields[0]) if fields else "inputs"
        preparation = UnchangedInputs(raw_inputs(model_inputs(task, sample), name))
    elif fields:
        with user_errors("describing the raw inputs", BuildError):
            preparation = preparation.select([str(field) for field in fields])
    return Pipeline(preparation, model, task, trained.scale, fields).eval()


def described_preparation(trained: Trained) -> Preparation | None:
    """Return how the data set of a run prepares raw inputs; None if it does not describe that."""
    part = trained.spec.parts["data"].entry.part
    describes = getattr(part, "preparation", None)
    if describes is None:
        return None
    with facts_that_fit(trained.run), user_errors("describing the raw inputs", BuildError):
        found: Preparation | None = describes(
            trained.facts.get("data", {}), tuple(trained.facts["in_shape"])
        )
        return found


def raw_inputs(inputs: Inputs, name: str) -> dict[str, RawInput]:
    """Return a description of inputs that the exported model takes as they are.

    Args:
        inputs: of the model.
        name: of a single tensor.
    """
    tensors = {name: inputs} if isinstance(inputs, Tensor) else inputs
    described = {}
    for key, each in tensors.items():
        shape = tuple(each.shape[1:])
        described[key] = RawInput(each.dtype, shape, "as the data set prepares it")
    return described


def real_batches(pipeline: Pipeline, rows: Split) -> list[Inputs]:
    """Return batches of inputs of several sizes, evenly spaced in a split; or of noise."""
    if isinstance(pipeline.preparation, Noise):
        return [pipeline.preparation.draw(size) for size in BATCH_SIZES]
    batches = []
    start = 0
    for size in BATCH_SIZES:
        numbers = range(start, start + size)
        start += size
        total = len(rows)
        batch = take(rows, [number * total // sum(BATCH_SIZES) for number in numbers])
        batches.append(model_inputs(pipeline.task, batch))
    return batches


def choose_split(data: Data) -> tuple[str, Split]:
    """Return the name and samples of the split on which an export is verified."""
    splits = splits_of(data)
    name = next(name for name in ("test", "val", "train") if name in splits)
    return name, splits[name]


def take(rows: Split, numbers: Sequence[int]) -> Batch:
    """Return some samples of a split as a batch."""
    with user_errors("reading samples to verify the export"):
        return Loader(rows).samples(torch.tensor(numbers))


def model_inputs(task: Task, batch: Batch) -> Inputs:
    """Return the inputs of the model in a batch.

    Raises:
        BuildError: the model takes something else than tensors.
    """
    if not task.fields.named:
        return first_tensor(batch)
    inputs = task.fields.select_inputs(batch)
    for field, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise BuildError(
                f"task.inputs={field}: expected a tensor with a row for each sample, got "
                f"{short(value)}, which cannot be exported"
            )
    values = list(inputs.values())
    return values[0] if len(values) == 1 else {str(name): each for name, each in inputs.items()}
