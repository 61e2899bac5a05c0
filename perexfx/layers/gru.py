"""`gru`, as torch defines it: the reset gate acts after the product with `weight_hh`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perexfx.ir.recurrent import gru_layer
from perexfx.ir.rule import Backward
from perexfx.kernels.gemm import linear_by
from perexfx.layers.recurrent import GateGradients, Recurrent, all_times, arriving, before, tanh_, times_back

_sigmoid_backward = torch.ops.aten.sigmoid_backward


@dataclass(frozen=True)
class GRU(Recurrent):
    """`n = tanh(x_n + r h_n)` and `h = n + z (h' - n)`: the gates' gradients are slopes times that of `h`.

    What the hidden state adds to the gate `n` is multiplied by `r`, so that side has a gradient of its own.
    """

    kind = "gru"
    shares_gates = False
    targets = (gru_layer,)

    def steps_back(self, call: Backward) -> GateGradients:
        """`g W_hh` goes to the time before, and so does `z` times the gradient of `h`."""
        given, reverse = call.arguments, call.arguments["reverse"]
        previous = before(call.residuals[0], reverse)
        of_input = all_times(given["input"], given["weight_ih"], given["bias_ih"])
        of_hidden = all_times(previous, given["weight_hh"], given["bias_hh"])
        update, slope_new = _slopes(of_input, of_hidden, previous)
        grads, rows = arriving(call)
        views = (of_hidden.unflatten(2, (3, -1)), of_hidden, update)
        through_time = linear_by(given["weight_hh"].t().contiguous(), of_hidden)
        for (grad, earlier), (split, gates, kept) in times_back(rows, views, reverse):
            split.mul_(grad.unsqueeze(1))
            earlier.addcmul_(kept, grad).add_(through_time(gates))
        of_input.copy_(of_hidden)
        torch.mul(slope_new, grads, out=of_input.unflatten(2, (3, -1))[:, :, 2])
        return GateGradients(of_input, of_hidden, previous, {"h0": rows[-1]})


def _slopes(of_input: Tensor, of_hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The gates of all times at once; on the hidden side they are overwritten by their slopes.

    Returns: The update gate, and the slope of the gate `n` on the input's side. `[T, B, H]` each.
    """
    r, z, n = of_input.unflatten(2, (3, -1)).unbind(2)
    hidden_r, hidden_z, hidden_n = of_hidden.unflatten(2, (3, -1)).unbind(2)
    r.add_(hidden_r).sigmoid_()
    z.add_(hidden_z).sigmoid_()
    tanh_(n.addcmul_(r, hidden_n))
    slope_new = torch.ops.aten.tanh_backward(1 - z, n)
    _sigmoid_backward.grad_input(slope_new * hidden_n, r, grad_input=hidden_r)
    _sigmoid_backward.grad_input(previous - n, z, grad_input=hidden_z)
    torch.mul(slope_new, r, out=hidden_n)
    return z, slope_new
