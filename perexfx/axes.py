"""How tensor operations treat the example axis, at the level of aten.

Promises: given where each argument carries its examples, `propagate` says where the result does, or raises `Mixing`
where a result would depend on several examples. Operations that only move elements are followed exactly, by running
them on tags (which example does each element belong to?); the others have a rule. An operation without a rule is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perexfx.ir.layout import Layout
from perexfx.tags import Mixing, Unknown, layout_of, tags_of


@dataclass(frozen=True)
class OpCall:
    """One aten call, as recorded with fake tensors.

    Attributes:
        func: The overload called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
        layouts: Where each tensor argument carries examples, by `id`; absent where it carries none.
        n: Number of examples in the recorded run.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    layouts: dict[int, Layout]
    n: int

    @property
    def name(self) -> str:
        """Name of the operation without namespace and overload."""
        return self.func._schema.name.split("::")[1]

    def layout(self, value: Any) -> Layout | None:
        """Where a tensor argument carries its examples."""
        return self.layouts.get(id(value))

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
        for at, parameter in enumerate(self.func._schema.arguments):
            if parameter.name == name:
                if at < len(self.args):
                    return self.args[at]
                if name in self.kwargs:
                    return self.kwargs[name]
                return parameter.default_value if parameter.has_default_value() else default
        return default


Result = Layout | None | list[Layout | None]


AxisRule = Callable[[OpCall], Result]


def propagate(call: OpCall) -> list[Layout | None]:
    """Where each tensor of the result carries its examples.

    Raises:
        Mixing: The result of one example depends on others.
        Unknown: No rule covers the operation.
    """
    results = [leaf for leaf in pytree.tree_leaves(call.result) if isinstance(leaf, Tensor)]
    if not results or not any(call.layout(leaf) for leaf in pytree.tree_leaves((call.args, call.kwargs))):
        return [None] * len(results)
    rule = RULES.get(call.name) or RULES.get(call.name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in call.func.tags:
        rule = _pointwise
    if rule is None:
        raise Unknown(f"perexfx does not know how `{call.func._schema.name}` treats the example axis")
    found = rule(call)
    return found if isinstance(found, list) else [found] * len(results)


def _tensors(call: OpCall) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def axis_from_front(axis: int, rank: int) -> int:
    """A non-negative axis: negative ones count from the end."""
    return axis + rank if axis < 0 else axis


def _axes(axes: int | Sequence[int] | None, rank: int) -> set[int]:
    if axes is None or (not isinstance(axes, int) and len(axes) == 0):
        return set(range(rank))
    return {axis_from_front(axis, rank) for axis in ([axes] if isinstance(axes, int) else axes)}


def _from_right(layout: Layout, rank: int, result_rank: int) -> Layout:
    return Layout(layout.axis - rank + result_rank, layout.before, layout.after)


def _agree(layouts: Sequence[Layout | None]) -> Layout | None:
    """The one layout that all values with examples share."""
    found = {layout for layout in layouts if layout is not None}
    if len(found) > 1:
        described = "; ".join(sorted(str(layout) for layout in found))
        raise Mixing(f"it combines values that carry their examples differently ({described})")
    return found.pop() if found else None


def _pointwise(call: OpCall) -> Result:
    """Broadcasting from the right; every value with examples must have them in the same place."""
    result = next(leaf for leaf in pytree.tree_leaves(call.result) if isinstance(leaf, Tensor))
    tensors = [tensor for tensor in _tensors(call) if call.layout(tensor)]
    rank = result.dim()
    layout = _agree([_from_right(call.layouts[id(t)], t.dim(), rank) for t in tensors])
    if layout is None:
        return None
    for tensor in tensors:
        at = layout.axis - rank + tensor.dim()
        if tensor.shape[at] != result.shape[layout.axis]:
            raise Mixing("it broadcasts one example's values over others")
    for tensor in _tensors(call):
        at = layout.axis - rank + tensor.dim()
        if not call.layout(tensor) and at >= 0 and tensor.shape[at] not in (1, result.shape[layout.axis]):
            raise Mixing("it broadcasts the example axis")
    return layout


def _loss(call: OpCall) -> Result:
    """Losses between values of one shape; only those that are not reduced keep examples apart."""
    if call.argument("reduction") != 0:
        raise Mixing("it reduces over the example axis")
    return _pointwise(call)


def _reduce(call: OpCall) -> Result:
    """Sums and the like over `dim`."""
    value = call.argument("self")
    layout = call.layout(value)
    if layout is None:
        raise Unknown(f"`{call.name}` reads examples in an argument that is not its first")
    axes = _axes(call.argument("dim"), value.dim())
    if layout.axis in axes:
        raise Mixing("it reduces over the example axis")
    if call.argument("keepdim", False):
        return layout
    return Layout(layout.axis - sum(axis < layout.axis for axis in axes), layout.before, layout.after)


def _along(call: OpCall) -> Result:
    """Softmax, cumulative sums, sorting: along one axis, all others untouched."""
    value = call.argument("self")
    layout = call.layout(value)
    if layout is not None and layout.axis == axis_from_front(call.argument("dim", -1), value.dim()):
        raise Mixing("it runs along the example axis")
    return layout


def _on_last(axes: int) -> AxisRule:
    """Works within the last axes: pooling, padding, resampling, transforms."""

    def rule(call: OpCall) -> Result:
        value = _tensors(call)[0]
        layout = _agree([call.layout(tensor) for tensor in _tensors(call)])
        if layout is not None and layout.axis >= value.dim() - axes:
            raise Mixing("it works within the example axis")
        return layout

    return rule


def _matrix_product(left_name: str, right_name: str) -> AxisRule:
    """`[.., m, k] @ [.., k, n]`, with a bias that broadcasts from the right where there is one."""

    def rule(call: OpCall) -> Result:
        left, right = call.argument(left_name), call.argument(right_name)
        result = call.result
        layouts: list[Layout | None] = []
        for value, contracted, spread in ((left, 1, 2), (right, min(2, right.dim()), 1)):
            layout = call.layout(value)
            if layout is None:
                continue
            from_end = value.dim() - layout.axis
            if from_end == contracted:
                raise Mixing("it sums products over the example axis")
            gone = value is left and right.dim() == 1
            other = right if value is left else left
            if from_end == spread and other.dim() >= 2 and call.layout(other) is not None:
                raise Mixing("it multiplies every example with every other")
            axis = result.dim() - from_end + (1 if gone else 0)
            layouts.append(Layout(axis, layout.before, layout.after))
        bias = call.argument("self") if left_name != "self" else None
        if bias is not None and (layout := call.layout(bias)):
            layouts.append(_from_right(layout, bias.dim(), result.dim()))
        return _agree(layouts)

    return rule


def _convolution(call: OpCall) -> Result:
    value = call.argument("input")
    if call.layout(call.argument("weight")) or call.layout(call.argument("bias")):
        raise Unknown("a convolution whose kernel depends on the examples")
    layout = call.layout(value)
    if layout is not None and layout.axis != 0:
        raise Mixing("it convolves over the example axis")
    return layout


def _embedding(call: OpCall) -> Result:
    if call.layout(call.argument("weight")):
        raise Unknown("a lookup in a table that depends on the examples")
    return call.layout(call.argument("indices"))


def _norm_over(axes_of: Callable[[OpCall, Tensor], set[int]]) -> AxisRule:
    """Normalisations: (result, mean, deviation), statistics over some axes."""

    def rule(call: OpCall) -> Result:
        value = call.argument("input")
        layout = call.layout(value)
        if any(call.layout(call.argument(name)) for name in ("weight", "bias", "running_mean", "running_var")):
            raise Unknown("a normalisation whose scale depends on the examples")
        if layout is not None and layout.axis in axes_of(call, value):
            raise Mixing("it normalises over the example axis")
        statistics = [leaf for leaf in pytree.tree_leaves(call.result)[1:] if isinstance(leaf, Tensor)]
        assert layout is not None
        return [layout] + [layout if t.dim() > layout.axis else None for t in statistics]

    return rule


def _layer_norm_axes(call: OpCall, value: Tensor) -> set[int]:
    rank = len(call.argument("normalized_shape"))
    return set(range(value.dim() - rank, value.dim()))


def _batch_norm_axes(call: OpCall, value: Tensor) -> set[int]:
    uses_batch = call.argument("training") or call.name == "_native_batch_norm_legit"
    return set(range(value.dim())) - {1} if uses_batch else set()


def _batch_norm(call: OpCall) -> Result:
    value, layout = call.argument("input"), call.layout(call.argument("input"))
    if layout is not None and layout.axis in _batch_norm_axes(call, value):
        raise Mixing("it normalises over the example axis")
    return [layout, None, None, None, None][: len(pytree.tree_leaves(call.result))]


def _attention(call: OpCall) -> Result:
    """`[.., heads, positions, features]`: everything happens within the last two axes."""
    tensors = [call.argument(name) for name in ("query", "key", "value")]
    mask = call.argument("attn_mask") if call.argument("attn_mask") is not None else call.argument("attn_bias")
    layouts = [call.layout(tensor) for tensor in tensors]
    rank = tensors[0].dim()
    if isinstance(mask, Tensor) and (layout := call.layout(mask)):
        layouts.append(_from_right(layout, mask.dim(), rank))
    layout = _agree(layouts)
    if layout is not None and layout.axis >= rank - 2:
        raise Mixing("it attends over the example axis")
    return [layout if isinstance(leaf, Tensor) and leaf.dim() > 1 else None for leaf in pytree.tree_leaves(call.result)]


def _like_first(call: OpCall) -> Result:
    """The result has the first tensor's shape and reads nothing else of it."""
    return call.layout(_tensors(call)[0])


def _no_examples(call: OpCall) -> Result:
    """The result reads no values, only sizes; where it has an example axis its size says so."""
    return None


def _index(call: OpCall) -> Result:
    """Advanced indexing by constant positions along axes that carry no examples."""
    value, indices = call.argument("self"), call.argument("indices")
    layout = call.layout(value)
    if layout is None or any(call.layout(index) for index in indices if index is not None):
        raise Unknown("perexfx does not follow indexing by positions that depend on the examples")
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if layout.axis in used:
        raise Mixing("it picks examples by position")
    rank = max(indices[axis].dim() for axis in used)
    if used != list(range(used[0], used[-1] + 1)):  # torch puts the indexed axes first
        axis = rank + layout.axis - sum(at < layout.axis for at in used)
    elif layout.axis > used[0]:
        axis = layout.axis - len(used) + rank
    else:
        axis = layout.axis
    return Layout(axis, layout.before, layout.after)


def _diagonal(call: OpCall) -> Result:
    """The entries along two axes at once."""
    value = call.argument("self")
    layout = call.layout(value)
    axes = {axis_from_front(call.argument(name), value.dim()) for name in ("dim1", "dim2")}
    if layout is None or layout.axis in axes:
        raise Mixing("it takes another entry of each example")
    return Layout(layout.axis - sum(axis < layout.axis for axis in axes), layout.before, layout.after)


def _changes_shape(call: OpCall) -> Result:
    raise Unknown("it changes a value's shape in place")


def _select_positions(call: OpCall) -> Result:
    """`index_select` by constant positions."""
    if call.layout(call.argument("index")):
        raise Unknown("perexfx does not follow indexing by positions that depend on the examples")
    return _along(call)


def _gather(call: OpCall) -> Result:
    value, index = call.argument("self"), call.argument("index")
    axis = axis_from_front(call.argument("dim"), value.dim())
    layout = _agree([call.layout(value), call.layout(index)])
    if layout is not None and layout.axis == axis:
        raise Mixing("it gathers from the example axis")
    if layout is not None and index.shape[layout.axis] != value.shape[layout.axis]:
        raise Mixing("it gathers from a part of the example axis")
    return layout


def _moved(call: OpCall) -> Result:
    """Elements are only moved: run the operation on tags."""

    def tagged(value: Any) -> Any:
        return tags_of(call.layout(value), value.shape, call.n) if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(tagged, (call.args, call.kwargs))
    func = call.func
    if call.name in ("view", "_unsafe_view", "_reshape_alias"):
        func, args = torch.ops.aten.reshape.default, args[:2]
    elif call.name == "constant_pad_nd":
        args, kwargs = args[:2], {}  # whatever it pads with belongs to no example
    moved = func(*args, **kwargs)
    leaves = [leaf for leaf in pytree.tree_leaves(moved) if isinstance(leaf, Tensor)]
    return [layout_of(leaf, call.n) for leaf in leaves]


def _table() -> dict[str, AxisRule]:
    table: dict[str, AxisRule] = {}

    def add(rule: AxisRule, names: str) -> None:
        table.update(dict.fromkeys(names.split(), rule))

    add(
        _moved,
        "view _unsafe_view reshape _reshape_alias unsqueeze squeeze permute transpose t expand slice select unbind "
        "split split_with_sizes chunk stack cat flip roll repeat alias unfold narrow movedim swapaxes "
        "constant_pad_nd unflatten tile pixel_shuffle pixel_unshuffle channel_shuffle unsafe_split "
        "unsafe_split_with_sizes squeeze_copy",
    )
    add(_index, "index")
    add(
        _like_first,
        "clone detach contiguous lift_fresh _to_copy to alias_copy native_dropout bernoulli",
    )
    add(_pointwise, "hardswish hardsigmoid mish log_sigmoid_forward floor_divide rrelu_with_noise exponential")
    add(
        _loss,
        "mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss",
    )
    add(_pointwise, "where masked_fill copy _conj fill zero dropout addcmul addcdiv lerp")
    add(
        _no_examples,
        "zeros_like ones_like full_like rand_like randn_like empty_like new_zeros new_ones new_full new_empty",
    )
    add(
        _reduce,
        "sum mean amax amin prod var std var_mean std_mean logsumexp norm linalg_vector_norm any all argmax argmin",
    )
    add(_reduce, "max min median nansum nanmean")
    add(
        _along,
        "_softmax _safe_softmax _log_softmax softmax log_softmax "
        "cumsum cumprod logcumsumexp sort topk cummax cummin glu",
    )
    add(_matrix_product("self", "mat2"), "mm bmm")
    add(_matrix_product("self", "other"), "matmul")
    add(_matrix_product("self", "vec"), "mv")
    add(_matrix_product("mat1", "mat2"), "addmm")
    add(_matrix_product("batch1", "batch2"), "baddbmm")
    add(_convolution, "convolution _convolution")
    add(_embedding, "embedding")
    add(_norm_over(_layer_norm_axes), "native_layer_norm _fused_rms_norm")
    add(_norm_over(lambda _call, value: set(range(1, value.dim()))), "native_group_norm")
    add(_batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training")
    add(
        _attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_attention_math_for_mps _scaled_dot_product_fused_attention_overrideable",
    )
    for rank in (1, 2, 3):
        add(
            _on_last(rank),
            f"max_pool{rank}d_with_indices avg_pool{rank}d _adaptive_avg_pool{rank}d adaptive_avg_pool{rank}d "
            f"adaptive_max_pool{rank}d reflection_pad{rank}d replication_pad{rank}d upsample_nearest{rank}d "
            f"_upsample_nearest_exact{rank}d max_pool{rank}d",
        )
    add(_on_last(1), "upsample_linear1d")
    add(
        _on_last(2),
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa im2col col2im grid_sampler_2d triu tril",
    )
    add(_on_last(3), "upsample_trilinear3d grid_sampler_3d")
    add(_diagonal, "diagonal")
    add(_changes_shape, "unsqueeze_ squeeze_ transpose_ t_ swapaxes_ swapdims_ resize_ set_ as_strided_ detach_")
    add(_gather, "gather")
    add(_select_positions, "index_select")
    return table


RULES = _table()
