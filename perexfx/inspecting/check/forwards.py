"""The two forwards that are compared: the transformed module's and the reference's.

Promises: both read the same tensors, which are none of the module's own, and are in the same modes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from perexfx.inspecting.check.compare import change
from perexfx.inspecting.check.reference import Call, Stateless, output_tensors
from perexfx.runtime import PerExample, Runtime


class Forwards:
    """A transformed module and its reference.

    Attributes:
        runtime: What stands behind `gm.perexfx`.
        trained: Trainable parameter name -> the tensor that both read in its place.
        reference: What the reference is, in words.
        transformed: The transformed module.
        plain: The reference.
    """

    def __init__(self, gm: fx.GraphModule, runtime: Runtime, model: nn.Module | None) -> None:
        self.gm, self.runtime, self.model = gm, runtime, model
        self.reference = "the captured graph" if model is None else "the model"
        leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in gm.named_parameters()}
        self.trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        self._by_id = {id(own): leaves[name] for name, own in gm.named_parameters()}
        self._by_name = {**leaves, **dict(gm.named_buffers())}
        self._renew()

    def _renew(self) -> None:
        """The reference in the modes of the transformed module; a copied graph has copies of its flags."""
        if self.model is None:
            plain = fx.GraphModule(self.gm, copy.deepcopy(self.runtime.captured.graph))
        else:
            plain = self.model
            flags = {path: module.training for path, module in self.gm.named_modules(remove_duplicate=False)}
            for path, module in plain.named_modules(remove_duplicate=False):
                module.training = flags.get(path, module.training)
        self.transformed = Stateless(self.gm, self._by_id, self._by_name)
        self.plain = Stateless(plain, self._by_id, self._by_name)

    @property
    def mode(self) -> str:
        """The mode that the modules are in."""
        flags = {module.training for module in self.gm.modules() if not isinstance(module, PerExample)}
        return "as set" if len(flags) > 1 else "train" if flags == {True} else "eval"

    def settle(self, call: Call, tolerance: float) -> dict[str, float] | None:
        """How far apart equal calls of the reference are, by output, in eval mode if the modes as set are random.

        Returns: None where the forward is random in both.
        """
        state = torch.get_rng_state()
        noise = self._noise(call)
        draws = not torch.equal(state, torch.get_rng_state())  # two calls may draw the same by chance
        holds_for_eval = not any(self.runtime.captured.fixed_modes.values())
        is_random = draws or max(noise.values(), default=0.0) > tolerance
        if is_random and holds_for_eval and self.mode != "eval":
            self.gm.eval()
            self._renew()
            noise = self._noise(call)
        return None if max(noise.values(), default=0.0) > tolerance else noise

    def _noise(self, call: Call) -> dict[str, float]:
        first, second = self.outputs(call), self.outputs(call)
        return {name: float(change(value.reshape(1, -1), second[name].reshape(1, -1))) for name, value in first.items()}

    def outputs(self, call: Call) -> dict[str, Tensor]:
        """What the reference returns, without gradients."""
        with torch.no_grad():
            return output_tensors(self.plain(call))
