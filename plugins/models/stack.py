"""A model as a list of blocks and a head, each built for the output shape of the one before it."""

from torch import Tensor, nn

from framework import Block, Head, Shape, models, shapes


@models.register("stack", aliases=["sequential"])
class Stack(nn.Module):
    """A sequence of blocks, each built for the output shape of the one before it, then a head.

    Each part is run once on zeros when the model is built.

    Args:
        blocks: the hidden blocks in order; without blocks, the class head is a linear model.
        head: maps the output of the last block to the outputs of the task.

    Raises:
        BuildError: a block or the head does not take its input shape, such as "block 4 (conv2d)
            expects (C, H, W), gets (128,)".
    """

    def __init__(
        self, in_shape: Shape, out_shape: Shape, blocks: list[Block] = (), head: Head = "class"
    ):
        super().__init__()
        modules, shape = shapes.build_chain(blocks, in_shape)
        self.blocks = nn.Sequential(*modules)
        self.head = head(shape, out_shape)
        name = shapes.maker_name(head)
        with shapes.run_errors(f"head ({name})", name, shape):
            shapes.output_shape(self.head, shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))
