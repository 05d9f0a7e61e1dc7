"""Records of gradients for tests of optimizers, in which no gradient needs an exchange to count as compressed."""

from torch import Tensor

from dct_compile.state.gradient_use import GradientUse, Use


class Exchanging(GradientUse):
    """The records of parameters whose gradients are all exchanged."""

    def find(self, parameter: Tensor) -> Use | None:
        found = super().find(parameter)
        if found is not None:
            found.exchanged = True
        return found
