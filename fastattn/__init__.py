"""Fast attention and its neighbours as differentiable PyTorch functions, each with a reference that defines it."""

from fastattn import bias, masks
from fastattn.choice import PROCESS, explain, using
from fastattn.groups import Groups
from fastattn.kernels.attention.api import attention, attention_varlen
from fastattn.kernels.attention.columns import attention_importance, column_attention
from fastattn.kernels.attention.grouped import grouped_attention
from fastattn.kernels.attention.topk import topk_attention
from fastattn.kernels.decode.api import attention_decode
from fastattn.kernels.norm.api import add_norm
from fastattn.merge import merge_attention
from fastattn.op import Unsupported

__version__ = "0.1.0"
__all__ = [
    "Groups",
    "Unsupported",
    "add_norm",
    "attention",
    "attention_decode",
    "attention_importance",
    "attention_varlen",
    "bias",
    "column_attention",
    "explain",
    "grouped_attention",
    "masks",
    "merge_attention",
    "topk_attention",
    "using",
]

PROCESS.check()
del PROCESS


def __dir__() -> list[str]:
    """What users use: the modules that make it up are no part of the package's face."""
    return sorted({*__all__, "__version__", "testing"} & globals().keys())
