"""Activation checkpointing that keeps every routing decision: a recomputed block can never route differently."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def _keep_routing(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    ops = torch.ops.vmoe
    kept = (ops.router, ops.assign_slots, ops.assign_rows, ops.assign_dropless_slots)
    return CheckpointPolicy.MUST_SAVE if op in [each.default for each in kept] else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_block(block: nn.Module) -> None:
    """Makes a block recompute its activations in the backward, all but its routing."""
    forward = block.forward
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_routing)

    # A function: the compiler passes by a module whose forward is a partial.
    def recomputed(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    block.forward = recomputed
