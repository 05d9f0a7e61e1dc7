"""What `pyproject.toml` cannot say: the source distribution keeps the links in `dct_compile`, by which an unpacked one works as it is."""

import os
from collections.abc import Sequence
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

LINKS = ("models", "passes", "triton_kernels")


class SdistWithLinks(sdist):
    """Puts the links beside the files; setuptools would leave them out."""

    def make_release_tree(self, base_dir: str, files: Sequence[str]) -> None:
        super().make_release_tree(base_dir, files)
        for name in LINKS:
            os.symlink(f"../{name}", Path(base_dir, "dct_compile", name))


setup(cmdclass={"sdist": SdistWithLinks})
