"""Quantized linears with LoRA branches, on the GPU or without one; needs torch, which is imported with this package.

Two operators do the work, by the same names everywhere (:mod:`lorafmt.runtime.ops`): hand-written CUDA kernels where
the library of ``cuda/`` is there and has code for the GPU, and compositions of torch everywhere else.
:func:`status` says in a line which of the two and why.
"""

from __future__ import annotations

import torch

from ..exceptions import UnsupportedError

if not hasattr(torch.library, "register_fake"):
    _error = UnsupportedError(f"lorafmt.runtime needs torch 2.4 or newer, this is {torch.__version__}")
    _error.code, _error.hint = "torch-too-old", "pip install -U torch"
    raise _error

from .adapters import Adapters, Loaded
from .checkpoint import load_quantized
from .library import status
from .linear import BranchLinear, FusedLinear
from .methods import AdapterMethods, adaptable
from .models import quantize_
from .quantize import quantize_weight
from .writing import quantize_checkpoint

__all__ = [
    "AdapterMethods",
    "Adapters",
    "BranchLinear",
    "FusedLinear",
    "Loaded",
    "adaptable",
    "load_quantized",
    "quantize_",
    "quantize_checkpoint",
    "quantize_weight",
    "status",
]
