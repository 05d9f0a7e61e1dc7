"""Collectives that live outside of every graph: an integration puts the schemes in their place. This is the list of all."""

from dct_compile.integrations.ddp import DDPIntegration
from dct_compile.integrations.fsdp import FSDPIntegration
from dct_compile.integrations.interface import Integration
from dct_compile.integrations.pipeline import PipelineIntegration

INTEGRATIONS: tuple[Integration, ...] = (DDPIntegration(), FSDPIntegration(), PipelineIntegration())

__all__ = ["INTEGRATIONS", "Integration"]
