"""The descriptions of parameters come from docstrings."""

import pytest
import torch
from torch import nn

from framework.cli.parts.tables import tidy
from framework.registry.signatures import first_sentence, parameter_docs


def test_arguments_are_documented_in_the_class_its_init_or_its_base_class():
    class Parent:
        """A parent.

        Args:
            width: of the parent.
        """

        def __init__(self, width=1): ...

    class Child(Parent):
        """A child."""

    class Other(Parent):
        """Another.

        Args:
            width: of the other.
        """

        def __init__(self, width=1, depth=2):
            """Make it.

            Args:
                depth: of the other.
            """

    assert parameter_docs(Child) == {"width": "of the parent"}
    assert parameter_docs(Other) == {"width": "of the other", "depth": "of the other"}


def test_docstrings_of_torch_are_read():
    docs = parameter_docs(torch.optim.AdamW)
    assert docs["lr"] == "learning rate"
    assert docs["betas"].startswith("coefficients used for computing running averages")
    assert parameter_docs(nn.ELU)["alpha"] == "the alpha value for the ELU formulation"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (r"A loss of indices, :math:`0 \leq y \leq \text{x.size}(1)-1`.", "0 ≤ y ≤ x.size(1)-1"),
        (r"Size :math:`(N \times C)` of :class:`Tensor`.", "(N × C) of Tensor"),
        (r"An input, :math:`x \in X`.", "x in X"),
    ],
)
def test_a_formula_in_a_docstring_of_torch_is_shown_as_text(docstring, expected):
    assert expected in first_sentence(docstring)
    assert expected in tidy(docstring)
