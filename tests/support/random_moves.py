"""Steps of random models that move, cut, join and reduce what examples have for themselves."""

from __future__ import annotations

import math

from tests.support.random_layers import Step
from tests.support.random_writer import DoesNotFitError, Value, Writer


def without(v: Value, axis: int) -> dict[str, object]:
    """What changes when an axis of its own goes away."""
    sizes = v.sizes[:axis] + v.sizes[axis + 1 :]
    return {"sizes": sizes, "axis": v.axis - (axis < v.axis)}


def resized(v: Value, axis: int, size: int) -> dict[str, object]:
    return {"sizes": (*v.sizes[:axis], size, *v.sizes[axis + 1 :])}


def pointwise(w: Writer) -> None:
    v = w.pick()
    hows = "torch.tanh({}) {}.sin() F.relu({}) F.gelu({}) {}*0.5 -{} {}+1 F.softplus({}) {}.clone() {}.contiguous()"
    hows += " nn.functional.dropout({},0.0) torch.sigmoid({}) {}.square().add(1).rsqrt() {}.clamp(min=-0.5)"
    w.emit(w.choice(hows.split()).format(v.name), v)


def transpose(w: Writer) -> None:
    v = w.pick(lambda v: v.rank >= 2)
    order = list(range(v.rank))
    if w.chance(0.6):
        i, j = w.choice(order), w.choice(order)
        order[i], order[j] = order[j], order[i]
        how = w.choice([f"transpose({i}, {j})", f"swapaxes({i - v.rank}, {j})"])
    else:
        w.random.shuffle(order)
        how = f"permute({', '.join(map(str, order))})"
    w.emit(f"{v.name}.{how}", v, sizes=tuple(v.sizes[i] for i in order), axis=order.index(v.axis))


def merge(w: Writer) -> None:
    """[n, T, D] to [n * T, D], or [T, n, D] to [T * n, D], or two axes of its own."""
    v = w.pick(lambda v: v.rank >= 2)
    i = w.choice(range(v.rank - 1))
    sizes = [w.written(v, j) for j in range(v.rank)]
    sizes[i : i + 2] = [w.choice([f"{sizes[i]} * {sizes[i + 1]}", "-1"])]
    how = w.choice([f"flatten({i}, {i + 1})", f"reshape({', '.join(sizes)})"])
    before, after = v.before, v.after
    if v.axis == i:
        after *= v.sizes[i + 1]
    elif v.axis == i + 1:
        before *= v.sizes[i]
    merged = (*v.sizes[:i], v.sizes[i] * v.sizes[i + 1], *v.sizes[i + 2 :])
    axis = v.axis - (v.axis > i)
    w.emit(f"{v.name}.{how}", v, sizes=merged, axis=axis, before=before, after=after)


def split_axis(w: Writer, v: Value) -> Value:
    """[before * n * after] to [before, n, after]."""
    parts = [(str(v.before), v.before), ("n", 1), (str(v.after), v.after)]
    kept = [part for part in parts if part[0] == "n" or part[1] > 1 or w.chance(0.2)]
    sizes = [w.written(v, j) for j in range(v.rank)]
    sizes[v.axis : v.axis + 1] = [text for text, _ in kept]
    shape = (*v.sizes[: v.axis], *(size for _, size in kept), *v.sizes[v.axis + 1 :])
    axis = v.axis + [text for text, _ in kept].index("n")
    if w.chance(0.3):
        how = f"unflatten({v.axis}, ({', '.join(text for text, _ in kept)},))"
    else:
        how = f"reshape({', '.join(sizes)})"
    return w.emit(f"{v.name}.{how}", v, sizes=shape, axis=axis, before=1, after=1)


def unmerge(w: Writer) -> None:
    split_axis(w, w.pick(lambda v: not v.plain))


def unflatten(w: Writer) -> None:
    v = w.pick(lambda v: any(v.sizes[i] > 1 for i in v.own))
    axis = w.choice(v.own)
    size = v.sizes[axis]
    first = w.choice([f for f in range(1, size + 1) if size % f == 0])
    pair = f"({first}, {size // first})"
    shape = (*v.sizes[:axis], first, size // first, *v.sizes[axis + 1 :])
    w.emit(f"{v.name}.unflatten({axis}, {pair})", v, sizes=shape, axis=v.axis + (axis < v.axis))


def reshape_own(w: Writer) -> None:
    """All axes after the examples into others."""
    v = w.pick(lambda v: v.axis == 0 and v.rank >= 2)
    count = math.prod(v.sizes[1:])
    first = w.choice([f for f in range(1, count + 1) if count % f == 0])
    shape = w.choice([(first, count // first), (count,)])
    written = [w.written(v, 0), *map(str, shape)]
    if w.chance(0.3):
        written[-1] = "-1"
    w.emit(f"{v.name}.reshape({', '.join(written)})", v, sizes=(v.sizes[0], *shape))


def axes_of_one(w: Writer) -> None:
    v = w.pick()
    if w.chance(0.5):
        axis = w.choice(range(v.rank + 1))
        shape = (*v.sizes[:axis], 1, *v.sizes[axis:])
        w.emit(f"{v.name}.unsqueeze({axis})", v, sizes=shape, axis=v.axis + (axis <= v.axis))
        return
    ones = [i for i in v.own if v.sizes[i] == 1]
    if len(ones) == 1 and w.chance(0.2):
        w.emit(f"{v.name}.squeeze()", v, **without(v, ones[0]))
    else:
        axis = w.choice(ones)
        w.emit(f"{v.name}.squeeze({axis})", v, **without(v, axis))


def cut(w: Writer) -> None:
    v = w.pick(lambda v: v.rank >= 2)
    axis = w.choice(v.own)
    size = v.sizes[axis]
    start = w.choice(range(size))
    stop = w.choice(range(start + 1, size + 1))
    some = [w.choice(range(size)) for _ in range(w.choice([1, 2, 3]))]
    listed = w.at(v.rank, axis, str(some))
    ways = [
        (f"{v.name}{w.at(v.rank, axis, f'{start}:{stop}')}", resized(v, axis, stop - start)),
        (f"{v.name}.narrow({axis}, {start}, {stop - start})", resized(v, axis, stop - start)),
        (f"{v.name}{w.at(v.rank, axis, str(start))}", without(v, axis)),
        (f"{v.name}.select({axis}, {start})", without(v, axis)),
        (f"{v.name}{w.at(v.rank, axis, '::2')}", resized(v, axis, (size + 1) // 2)),
        (f"{v.name}{listed}", resized(v, axis, len(some))),
        (f"{v.name}.index_select({axis}, {w.buffer(f'torch.tensor({some})')})", resized(v, axis, len(some))),
        (f"{v.name}.chunk({size}, {axis})[{start}]", resized(v, axis, 1)),
        (f"{v.name}.split(1, {axis})[{start}]", resized(v, axis, 1)),
        (f"{v.name}.unbind({axis})[{start}]", without(v, axis)),
    ]
    how, changes = w.choice(ways)
    w.emit(how, v, **changes)


def along(w: Writer) -> None:
    """Along an axis of its own, its size unchanged."""
    v = w.pick(lambda v: v.rank >= 2)
    axis = w.choice(v.own)
    d = w.choice([axis, axis - v.rank])
    hows = ["softmax({d})", "cumsum({d})", "roll(1, {d})", "flip({d})", "sort({d}).values", "log_softmax(dim={d})"]
    hows += ["diff(dim={d}, prepend={v}.narrow({d}, 0, 1))", "cummax({d}).values", "cumprod({d})"]
    hows += ["gather({d}, {v}.argsort({d}))", "softmax({d}) * {v}.mean({d}, keepdim=True)"]
    w.emit(f"{v.name}.{w.choice(hows).format(d=d, v=v.name)}", v)


def reduced(w: Writer) -> None:
    v = w.pick(lambda v: v.rank >= 2)
    axis = w.choice(v.own)
    hows = ["sum({})", "mean({})", "amax({})", "max({}).values", "logsumexp({})", "sum(dim={}) * 0.5"]
    w.emit(f"{v.name}.{w.choice(hows).format(axis)}", v, **without(v, axis))


def grown(w: Writer) -> None:
    v = w.pick(lambda v: v.rank >= 2)
    axis = w.choice(v.own)
    times = w.choice([2, 3])
    repeats = ", ".join(str(times) if i == axis else "1" for i in range(v.rank))
    if v.sizes[axis] == 1 and w.chance(0.5):
        k = w.size()
        expanded = ", ".join(str(k) if i == axis else "-1" for i in range(v.rank))
        w.emit(f"{v.name}.expand({expanded})", v, **resized(v, axis, k))
        return
    ways = [
        (f"{v.name}.repeat({repeats})", v.sizes[axis] * times),
        (f"{v.name}.repeat_interleave({times}, {axis})", v.sizes[axis] * times),
        (f"F.pad({v.name}, ({'0, 0, ' * (v.rank - 1 - axis)}1, 0))", v.sizes[axis] + 1),
        (f"torch.cat([{v.name}, {w.partner(v)}], {axis})", v.sizes[axis] * 2),
    ]
    how, size = w.choice(ways)
    w.emit(how, v, **resized(v, axis, size))


def stacked(w: Writer) -> None:
    v = w.pick()
    axis = w.choice(range(v.rank + 1))
    shape = (*v.sizes[:axis], 2, *v.sizes[axis:])
    w.emit(f"torch.stack([{v.name}, {w.partner(v)}], {axis})", v, sizes=shape, axis=v.axis + (axis <= v.axis))


def more_rows(w: Writer) -> None:
    """Several rows per example: repeated, or all examples once more after all."""
    v = w.pick(lambda v: v.before * v.after <= 4)
    sizes = resized(v, v.axis, v.sizes[v.axis] * 2)
    times = ", ".join("2" if i == v.axis else "1" for i in range(v.rank))
    how = w.choice(["cat", "repeat", "interleave"])
    if how == "interleave":
        w.emit(f"{v.name}.repeat_interleave(2, {v.axis})", v, **sizes, after=v.after * 2)
    elif how == "repeat":
        w.emit(f"{v.name}.repeat({times})", v, **sizes, before=v.before * 2)
    else:
        w.emit(f"torch.cat([{v.name}, {w.partner(v)}], {v.axis})", v, **sizes, before=v.before * 2)


def in_place(w: Writer) -> None:
    v = w.pick()
    name = f"h{len(w.lines)}"
    made = [f"{v.name}.clone()", f"{v.name} * 1", f"torch.zeros_like({v.name})"]
    shape = ", ".join("n" if i == v.axis else str(size) for i, size in enumerate(v.sizes))
    if v.plain:
        made += [f"torch.zeros({shape}, dtype={v.name}.dtype)", f"{v.name}.new_ones({shape})"]
    w.line(f"{name} = {w.choice(made)}")
    writes = [f"{name} += {w.partner(v)}", f"{name}.mul_(0.5)", f"{name}.tanh_()", f"{name}.add_({w.partner(v)})"]
    if v.own:
        axis = w.choice(v.own)
        part = w.at(v.rank, axis, str(w.choice(range(v.sizes[axis]))))
        writes += [f"{name}{part} = {v.name}{part} * 2", f"{name}{part} += 1", f"{name}{part}.mul_(3)"]
        writes += [f"{name}.select({axis}, 0).copy_({v.name}.sin().select({axis}, 0))"]
        writes += [f"{name}{w.at(v.rank, axis, ':1')} += {w.parameter(*w.broadcast(v, 0))}"]
    view = f"view{len(w.lines)}"
    w.line(f"{view} = {name}[...]")
    for _ in range(w.choice([1, 1, 2])):
        w.line(w.choice(writes))
    w.emit(w.choice([name, name, view]), v)


def pooled(w: Writer) -> None:
    v = w.pick(lambda v: v.axis == 0 and v.rank == 3 and v.sizes[2] >= 2)
    n, c, t = v.sizes
    ways = [
        ("F.max_pool1d({}, 2)", t // 2),
        ("F.avg_pool1d({}, 2, stride=1)", t - 1),
        ("F.adaptive_avg_pool1d({}, 2)", 2),
    ]
    ways += [("F.interpolate({}, scale_factor=2)", 2 * t)]
    how, size = w.choice(ways)
    if size < 1:
        raise DoesNotFitError
    w.emit(how.format(v.name), v, sizes=(n, c, size))


MOVES: dict[Step, int] = {
    pointwise: 4,
    transpose: 5,
    merge: 4,
    unmerge: 4,
    unflatten: 2,
    reshape_own: 3,
    axes_of_one: 2,
    cut: 4,
    along: 3,
    reduced: 2,
    grown: 3,
    stacked: 2,
    more_rows: 2,
    in_place: 3,
    pooled: 1,
}
