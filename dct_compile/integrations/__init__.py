"""Collectives that live outside of every graph: an integration puts the schemes in their place. This is the list of all."""

from dct_compile.integrations.ddp import DDPIntegration
from dct_compile.integrations.fsdp import FSDPIntegration
from dct_compile.integrations.interface import Integration

INTEGRATIONS: tuple[Integration, ...] = (DDPIntegration(), FSDPIntegration())

__all__ = ["INTEGRATIONS", "Integration"]
