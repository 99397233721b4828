"""torch.compile of the blocks that a transformer repeats: a kind of block is compiled once, whatever their number."""

import torch
from torch import nn

GRAPHS = 64
"""Compiled forms of one kind of block that a process may hold. It differs inside a transformer (attention over visual
tokens alone, the last one without text), with the adapter on or off and with a gradient or without. Beyond torch's own
limit of 8 the rest would run uncompiled."""


def compile_blocks(module: nn.Module) -> None:
    """Compile the repeated blocks of a transformer, or of a truncated one, at their first forward.

    Names and parameters stay as they are; weights may be overwritten in place. Sizes are symbols from the start, so
    that a smaller last batch takes the same graph, and a number does not depend on which sizes came before.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in repeated_blocks(module):
        block.compile(dynamic=True)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """What diffusers' transformers keep in lists. (Their own `compile_repeated_blocks` knows none of SD3's.)"""
    return [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
