"""Expert parallelism, applied to a finished model from outside: DeviceMesh, DTensor, FSDP2, all-to-all."""

from vmoe_torch.parallel.clip import clip_grad_norm
from vmoe_torch.parallel.exchange import ExpertExchange
from vmoe_torch.parallel.mesh import build_mesh
from vmoe_torch.parallel.parallelize import parallelize, parameter_groups

__all__ = ["ExpertExchange", "build_mesh", "clip_grad_norm", "parallelize", "parameter_groups"]
