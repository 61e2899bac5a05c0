"""Kernels: what multiplies, below all nouns: C++ of our own, and the faster of torch's libraries.

In come tensors; out go products, norms and sums, or None where a kernel is not for them. Open `tensors.py` first, then
the binding of a kind (`convolutions.py`, `products.py`, ...); their C++ is in `cpp/`, which `loading.py` loads.
`gemm.py` knows which of torch's libraries multiplies, `lstm_workspace.py` where oneDNN keeps an LSTM's gates.
Promises: a kernel finds what the Python code in its place finds, up to rounding. They are built with the package, where
there is a compiler for them; without them, for tensors that they are not made for, and under whoever traces, that
Python code runs. `PEREXFX_KERNELS=0` leaves them out.
"""

from perexfx.kernels.convolutions import MOST_AXES, kernel_gradients, kernel_sum, shifted_squares
from perexfx.kernels.loading import DTYPES
from perexfx.kernels.normalization import group_norm, group_norm_back
from perexfx.kernels.products import gram, gram_norms, product_gradients, weighted_sum
from perexfx.kernels.recurrent import LANES, lstm_steps_back
from perexfx.kernels.tensors import are_built, are_for, for_sizes, level

__all__ = [
    "DTYPES",
    "LANES",
    "MOST_AXES",
    "are_built",
    "are_for",
    "for_sizes",
    "gram",
    "gram_norms",
    "group_norm",
    "group_norm_back",
    "kernel_gradients",
    "kernel_sum",
    "level",
    "lstm_steps_back",
    "product_gradients",
    "shifted_squares",
    "weighted_sum",
]
