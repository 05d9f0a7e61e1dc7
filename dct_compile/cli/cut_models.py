"""Models cut as parallelisms cut them, for ``dct bench accuracy``: two simulated ranks in one process, each exchange with a codec."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dct_compile.bench.activation_codecs import Codec, coded
from dct_compile.models.dlrm import DLRM
from dct_compile.models.gpt import GPT, Block

PARTS = 2


class Column(nn.Module):
    """A column-parallel layer: each part sees all of the input, so the gradients of the parts are added up.

    ``gathers``: whether the input was sharded along the sequence, and is gathered first.
    """

    def __init__(self, layer: nn.Linear, codec: Codec, gathers: bool) -> None:
        super().__init__()
        self.layer, self.codec, self.gathers = layer, codec, gathers

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.layer.weight.chunk(PARTS), self.layer.bias.chunk(PARTS)
        inputs = [coded(x, self.codec, forward=self.gathers) for _ in range(PARTS)]
        return torch.cat([F.linear(part, weight, bias) for part, weight, bias in zip(inputs, weights, biases, strict=True)], -1)


class Row(nn.Module):
    """A row-parallel layer: the partial results of the parts are added up, and scattered along the sequence if ``scatters``."""

    def __init__(self, layer: nn.Linear, codec: Codec, scatters: bool) -> None:
        super().__init__()
        self.layer, self.codec, self.scatters = layer, codec, scatters

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(x.chunk(PARTS, -1), self.layer.weight.chunk(PARTS, 1), strict=True)
        partial = [coded(F.linear(part, weight), self.codec, backward=self.scatters) for part, weight in parts]
        return torch.stack(partial).sum(0) + self.layer.bias


class Experts(nn.Module):
    """A mixture of feed-forward experts: each token goes to one, and its result comes back, weighed by the router."""

    def __init__(self, width: int, codec: Codec, experts: int = 4) -> None:
        super().__init__()
        self.codec, self.router = codec, nn.Linear(width, experts)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight, choice = self.router(rows).softmax(-1).max(-1)
        sent, back = coded(rows, self.codec), torch.zeros_like(rows)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            own = (choice == number).nonzero().squeeze(1)
            back = back.index_add(0, own, down(F.gelu(up(sent[own]))))
        result: Tensor = (coded(back, self.codec) * weight.unsqueeze(1)).view(x.shape)
        return result


class Gathered(nn.Module):
    """What follows a module, once it has been sent."""

    def __init__(self, module: nn.Module, codec: Codec) -> None:
        super().__init__()
        self.module, self.codec = module, codec

    def forward(self, *inputs: Tensor) -> Tensor:
        return coded(self.module(*inputs), self.codec)


class ReluGathered(nn.Module):
    """A feed-forward part with a ReLU, whose columns are gathered behind it. It stands in the place of ``down``, behind a GELU."""

    def __init__(self, layer: nn.Linear, codec: Codec) -> None:
        super().__init__()
        self.layer, self.codec = layer, codec

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(coded(x.relu(), self.codec))
        return out


def _blocks(model: GPT) -> Iterator[Block]:
    return (block for block in model.blocks if isinstance(block, Block))


def _tensor_parallel(sequence: bool) -> Callable[[GPT, Codec], None]:
    def cut(model: GPT, codec: Codec) -> None:
        for block in _blocks(model):
            column, row = (block.qkv, block.up), (block.out, block.down)
            block.qkv, block.up = (Column(layer, codec, sequence) for layer in column)  # type: ignore[assignment]
            block.out, block.down = (Row(layer, codec, sequence) for layer in row)  # type: ignore[assignment]

    return cut


def _experts(model: GPT, codec: Codec) -> None:
    for block in _blocks(model):
        block.up, block.down = nn.Identity(), Experts(block.out.in_features, codec)  # type: ignore[assignment]


def _pipeline(model: GPT, codec: Codec) -> None:
    half = len(model.blocks) // 2
    model.blocks[half - 1] = Gathered(model.blocks[half - 1], codec)


def _relu(model: GPT, codec: Codec) -> None:
    for block in _blocks(model):
        block.down = ReluGathered(block.down, codec)  # type: ignore[assignment]


def _embeddings(model: DLRM, codec: Codec) -> None:
    model.embeddings = Gathered(model.embeddings, codec)  # type: ignore[assignment]


def _mlps(model: DLRM, codec: Codec) -> None:
    model.bottom_wide, model.top_wide = Gathered(model.bottom_wide, codec), Gathered(model.top_wide, codec)  # type: ignore[assignment]


CUTS: dict[str, tuple[str, int, Callable[..., None]]] = {
    "tensor parallel": ("gpt", 96, _tensor_parallel(False)),
    "sequence parallel": ("gpt", 96, _tensor_parallel(True)),
    "experts": ("gpt", 96, _experts),
    "pipeline": ("gpt", 96, _pipeline),
    "behind a ReLU, gathered": ("gpt", 384, _relu),
    "embeddings": ("dlrm", 16, _embeddings),
    "MLPs, behind a ReLU": ("dlrm", 256, _mlps),
}
"""Model, width of a row, and the function that cuts the model in place, by what is cut."""
