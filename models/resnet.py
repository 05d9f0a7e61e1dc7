"""The ResNet for small images, in plain PyTorch (He et al., CVPR 2016, section 4.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut. With ``stride`` 2, the image is halved.

    Where the shapes differ, the shortcut takes every second pixel and adds channels of zeros ("option A", without parameters).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs
        self.first, self.first_norm = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return torch.relu(y + shortcut)


class ResNet(nn.Module):
    """Classifies images of one channel in three stages of ``blocks`` blocks each, that is ``6 * blocks + 2`` layers.

    Args:
        blocks: Blocks per stage.
        width: Channels of the first stage; each stage has twice the channels of the one before.
        classes: The number of classes.
    """

    def __init__(self, blocks: int = 1, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                stages.append(Block(channels, outputs, stride=2 if stage and not block else 1))
                channels = outputs
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """``images`` float32 [batch, 1, height, width] -> logits [batch, classes]."""
        x = self.stages(torch.relu(self.stem_norm(self.stem(images))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits
