"""A model as data: a list of blocks and a head, shapes threaded from one to the next."""

from torch import Tensor, nn

from framework import Block, BuildError, Head, Shape, models, shapes


@models.register("stack", aliases=["sequential"])
class Stack(nn.Module):
    """Blocks in a row, each built for the shape that the one before it gives, then a head.

    Raises BuildError at the first block that cannot take its shape: "block 4 (conv2d) expects (C, H, W), gets (128,)".
    """

    def __init__(
        self, in_shape: Shape, out_shape: Shape, blocks: list[Block] = (), head: Head = "class"
    ):
        """Build and run every part once on zeros.

        Args:
            blocks: the hidden blocks in order; none makes a linear model of the class head.
            head: what makes the task's outputs of what the last block gives.
        """
        super().__init__()
        modules, shape = shapes.build_chain(blocks, in_shape)
        self.blocks = nn.Sequential(*modules)
        self.head = head(shape, out_shape)
        try:
            shapes.output_shape(self.head, shape)
        except Exception as error:
            raise BuildError(f"the head cannot take {shape}: {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))
