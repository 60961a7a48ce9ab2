"""Fast attention and its neighbours as differentiable PyTorch functions, each with a reference that defines it."""

from fastattn import masks
from fastattn.choice import PROCESS, explain, using
from fastattn.kernels.attention.api import attention
from fastattn.kernels.norm.api import add_norm
from fastattn.op import Unsupported

__version__ = "0.1.0"
__all__ = ["Unsupported", "add_norm", "attention", "explain", "masks", "using"]

PROCESS.check()
del PROCESS


def __dir__() -> list[str]:
    """What users use: the modules that make it up are no part of the package's face."""
    return sorted({*__all__, "__version__", "testing"} & globals().keys())
