"""Fast attention and its neighbours as differentiable PyTorch functions, each with a reference that defines it."""

from fastattn import masks
from fastattn.kernels.attention.api import attention
from fastattn.kernels.norm.api import add_norm
from fastattn.op import Unsupported, explain, using

__version__ = "0.1.0"
__all__ = ["Unsupported", "add_norm", "attention", "explain", "masks", "using"]
