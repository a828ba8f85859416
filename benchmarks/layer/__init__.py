"""The MoE layer."""
