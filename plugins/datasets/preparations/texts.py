"""The preparation of texts: token ids."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from framework import Axis, Preparation, RawInput
from framework_plugins.datasets.readers.tokenizers import load_tokenizer

SHORTEST = 8
"""Tokens of the shortest text that an exported model takes; torch.export treats 0 and 1 apart, also
for what remains of a text without its first tokens."""
NEXT_TOKEN = """\
logits = np.asarray(outputs[0])[0, len(ids[0]) - 1]  # of the token after the text
most_likely = logits.argsort()[::-1][:5].tolist()
print(json.dumps({"most_likely": most_likely}))"""


class Tokens(Preparation):
    """Token ids of texts. The tokenizer is not part of the graph, but a file next to it.

    Args:
        facts: "tokenizer" and "learned".
        length: maximum number of tokens.
        classifies: whether a text is a line of a file, cut to its first tokens and padded;
            otherwise the file is one text, of which a language model continues the end.
    """

    imports = ("re",)

    def __init__(self, facts: Mapping[str, Any], length: int, classifies: bool):
        super().__init__()
        length = int(length)
        shortest = min(SHORTEST, length)
        axis = length if shortest == length else Axis("length", shortest, length)
        text = f"token ids, {shortest} to {length}, 0 for padding at the end"
        self.raw = {"tokens": RawInput(torch.int64, (axis,), text)}
        if "learned" not in facts:  # a column of token ids
            self.example = 'raw = {"tokens": np.load(file)}  # a .npy file'
            return
        tokenizer = load_tokenizer(facts)
        self.files = tokenizer.files()
        self.metadata = {"tokenizer": facts["tokenizer"]}
        if not tokenizer.example:
            self.example = 'raw = {"tokens": np.load(file)}  # ids of the tokenizer, a .npy file'
            return
        lines = [tokenizer.example]
        if classifies:
            lines.append('texts = open(file, encoding="utf-8").read().splitlines()')
            lines.append(f"ids = [encode(text)[:{length}] or [1] for text in texts]")
        else:
            lines.append('ids = [encode(open(file, encoding="utf-8").read())]')
            lines.append(f"ids = [each[-{length}:] for each in ids]  # the end of a long text")
            self.result = NEXT_TOKEN
        lines.append("longest = max(about['inputs']['tokens']['smallest'][0], *map(len, ids))")
        lines.append("tokens = [each + [0] * (longest - len(each)) for each in ids]")
        lines.append('raw = {"tokens": np.array(tokens)}')
        self.example = "\n".join(lines)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        missing = max(0, SHORTEST - inputs.shape[1])
        return (F.pad(inputs.long(), (0, missing)) if missing else inputs.long(),)
