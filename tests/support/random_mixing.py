"""Steps of random models that combine different examples, or would at some sizes, as people do by mistake."""

from __future__ import annotations

from tests.support.random_layers import Step
from tests.support.random_writer import DoesNotFitError, Value, Writer


def along_examples(w: Writer) -> None:
    v = w.pick()
    a = v.axis
    hows = [
        f"{v.name} - {v.name}.mean({a}, keepdim=True)",
        f"{v.name}.softmax({a})",
        f"{v.name}.cumsum({a})",
        f"{v.name}.sort({a}).values",
        f"{v.name}.flip({a})",
        f"{v.name}.roll(1, {a})",
        f"{v.name} / (1 + {v.name}.norm(dim={a}, keepdim=True))",
        f"{v.name} - {v.name}.max()",
        f"{v.name} * {v.name}.mean()",
        f"{v.name} + {v.name}.detach().sum({a}, keepdim=True)",
        f"{v.name} - {v.name}.select({a}, 0).unsqueeze({a})",
        f"{v.name}{w.at(v.rank, a, f'[{w.n - 1}] + list(range({w.n - 1}))')}",
        f"{v.name}.gather({a}, {v.name}.argsort({a}))",
        f"torch.cat([{v.name}.narrow({a}, 1, {v.name}.shape[{a}] - 1), {v.name}.narrow({a}, 0, 1)], {a})",
        f"{v.name} * {v.name}.shape[{a}]",
        f"{v.name}.cummax({a}).values",
        f"torch.stack({v.name}.unbind({a})[::-1], {a})",
        f"torch.fft.rfft({v.name}, n=2 * {v.name}.shape[{a}] - 1, dim={a}).abs()",
        f"F.normalize({v.name}, dim={a})",
        f"{v.name} * ({v.name} == {v.name}.amax({a}, keepdim=True))",
        f"F.dropout({v.name}, 0.0) - {v.name}.var(correction=0)",
        f"torch.diff({v.name}, dim={a}, prepend={v.name}.narrow({a}, 0, 1))",
    ]
    w.emit(w.choice(hows), v)


def batch_norm(w: Writer) -> None:
    v = w.pick(lambda v: v.axis == 0 and v.rank in (2, 3))
    how = w.choice([f"{w.layer(f'nn.BatchNorm1d({v.sizes[1]})')}({v.name})"])
    w.emit(how, v)


def between_examples(w: Writer) -> None:
    v = w.pick(lambda v: v.rank >= 2 and v.axis == 0)
    flat = f"{v.name}.reshape({v.name}.shape[0], -1)"
    hows = [
        f"torch.softmax({flat} @ {flat}.t(), 1) @ {flat}",
        f"torch.softmax(torch.cdist({flat}, {flat}), 1) @ {flat}",
        f"F.scaled_dot_product_attention({flat}, {flat}, {flat})",
        f'torch.einsum("ni,mi,mj->nj", {flat}, {flat}, {flat})',
    ]
    w.emit(f"({w.choice(hows)}).reshape({v.name}.shape)", v)


def reshaped_not_transposed(w: Writer) -> None:
    """`reshape` where `transpose` was meant: right in shape, and wrong in all else."""
    v = w.pick(lambda v: v.plain and v.rank >= 2)
    other = w.choice(v.own)
    sizes = ["n" if i == v.axis else str(size) for i, size in enumerate(v.sizes)]
    sizes[v.axis], sizes[other] = sizes[other], sizes[v.axis]
    shape = list(v.sizes)
    shape[v.axis], shape[other] = shape[other], shape[v.axis]
    w.emit(f"{v.name}.reshape({', '.join(sizes)})", v, sizes=tuple(shape), axis=other)


def split_wrongly(w: Writer) -> None:
    """[n * T] taken for [T * n]."""
    v = w.pick(lambda v: not v.plain)
    parts = [str(v.after), "n", str(v.before)]
    sizes = [str(size) for size in v.sizes]
    sizes[v.axis : v.axis + 1] = parts
    shape = (*v.sizes[: v.axis], v.after, 1, v.before, *v.sizes[v.axis + 1 :])
    w.emit(f"{v.name}.reshape({', '.join(sizes)})", v, sizes=shape, axis=v.axis + 1, before=1, after=1)


def rows_joined(w: Writer) -> None:
    """Rows of `k` entries, whichever example they come from, and then something within each row."""
    v = w.pick(lambda v: v.axis == 0)
    k = w.choice([2, 3, w.n, 5, 15])
    within = w.choice(["softmax(-1)", "cumsum(-1)", "flip(-1)", "roll(1, -1)"])
    w.emit(f"{v.name}.reshape(-1, {k}).{within}.reshape({v.name}.shape)", v)


def broadcast_wrongly(w: Writer) -> None:
    """One number per example that meets an axis of its own, which happens to be as long."""
    given = w.choice([at for at, given in enumerate(w.inputs) if given.kind == "float" and not given.sizes])
    v = w.pick(lambda v: v.axis != v.rank - 1 and v.sizes[-1] in (1, w.n))
    sizes = (*v.sizes[:-1], w.n)
    w.emit(f"{v.name} {w.choice('*+')} x{given}", v, sizes=sizes)


def table_of_examples(w: Writer) -> None:
    """A table of positions, or numbers, along the examples."""
    v = w.pick(lambda v: v.plain)
    shape = tuple(w.n if i == v.axis else size for i, size in enumerate(v.sizes))
    long = tuple(20 if i == v.axis else size for i, size in enumerate(v.sizes))
    ones = ", ".join("-1" if i == v.axis else "1" for i in range(v.rank))
    tables = [
        w.buffer(f"torch.randn({list(shape)})"),
        w.parameter(*shape),
        f"{w.parameter(*long)}.narrow({v.axis}, 0, n)",
        f"{w.buffer(f'torch.randn({list(long)})')}.narrow({v.axis}, 0, {v.name}.shape[{v.axis}])",
        f"torch.arange(n).view({ones})",
        f"torch.linspace(0, 1, {w.n}).view({ones})",
    ]
    w.emit(f"{v.name} {w.choice('+*')} {w.choice(tables)}", v)


def fixed_number(w: Writer) -> None:
    """The number of examples, written down."""
    v = w.pick(lambda v: v.plain)
    sizes = [str(w.n) if i == v.axis else str(size) for i, size in enumerate(v.sizes)]
    joined = ", ".join(sizes)
    p = w.parameter(*(1 if i == v.axis else size for i, size in enumerate(v.sizes)))
    hows = [f"{v.name}.reshape({joined})", f"{v.name} + {p}.expand({joined})"]
    hows += [f"{v.name} * torch.ones({joined})", f"{v.name} + {p}.repeat({w.n}{', 1' * (v.rank - 1)})"]
    w.emit(w.choice(hows), v)


def sequence_of_examples(w: Writer) -> None:
    """Layers that take the axis of examples for that of time."""
    v = w.pick(lambda v: v.rank == 3 and v.axis in (0, 1) and v.plain)
    d, first = v.sizes[2], f"batch_first={v.axis == 1}"
    heads = w.choice([h for h in (1, 2) if d % h == 0])
    texts = [f"nn.LSTM({d}, {d}, {first})", f"nn.GRU({d}, {d}, {first})"]
    if w.chance(0.5):
        w.emit(f"{w.layer(w.choice(texts))}({v.name})[0]", v)
    elif w.chance(0.5):
        w.emit(f"{w.layer(f'nn.MultiheadAttention({d}, {heads}, {first})')}({v.name}, {v.name}, {v.name})[0]", v)
    else:
        options = f"dim_feedforward=4, dropout=0.0, {first}"
        w.emit(f"{w.layer(f'nn.TransformerEncoderLayer({d}, {heads}, {options})')}({v.name})", v)


def mean_of_squares(v: Value) -> str:
    return f"{v.name}.square().mean()"


def scaled_by_all(w: Writer) -> None:
    """By a number made of all examples, in place, or read off a tensor."""
    v = w.pick()
    name = f"h{len(w.lines)}"
    w.line(f"{name} = {v.name}.clone()")
    part = w.at(v.rank, v.axis, "0")
    other = w.at(v.rank, v.axis, "-1")
    writes = [f"{name} /= 1 + {mean_of_squares(v)}", f"{name}.sub_({v.name}.mean({v.axis}, keepdim=True))"]
    writes += [f"{name}{part} += {name}{other}", f"{name}{part} = 0", f"{name}{part}.mul_(2)"]
    writes += [f"{name}.add_({v.name}.roll(1, {v.axis}))", f"{name}.copy_({v.name}.flip({v.axis}))"]
    w.line(w.choice(writes))
    w.emit(name, v)


def along_merged(w: Writer) -> None:
    """Along an axis that holds examples and something of theirs."""
    v = w.pick(lambda v: not v.plain)
    if v.rank == 1:
        raise DoesNotFitError
    a = v.axis
    hows = [f"softmax({a})", f"cumsum({a})", f"roll(1, {a})", f"flip({a})", f"sort({a}).values"]
    w.emit(f"{v.name}.{w.choice(hows)}", v)


def by_ids(w: Writer) -> None:
    """Examples looked up by what another example holds: the first, or the last, so that it works for one alone."""
    given = [at for at, given in enumerate(w.inputs) if given.kind in ("ids", "lengths")]
    at, v = w.choice(given), w.pick(lambda v: v.axis == 0 and v.rank >= 2 and v.plain)
    own = f"x{at}.reshape(n, -1)[:, 0]"
    first = w.choice([f"({own} * 0)", f"{own}.clamp(max=0)", f"({own} % {v.name}.shape[0])"])
    rows = f"{first}.view(-1{', 1' * (v.rank - 1)}).expand(-1, {', '.join(map(str, v.sizes[1:]))})"
    hows = [f"{v.name}[{first}]", f"{v.name}[{own}.sign() - 1]", f"{v.name}.index_select(0, {first})"]
    hows += [f"{v.name}.gather(0, {rows})", f"F.embedding({first}, {v.name}.flatten(1)).reshape({v.name}.shape)"]
    hows += [f"torch.zeros_like({v.name}).index_add(0, {first}, {v.name})"]
    hows += [f"torch.zeros_like({v.name}).scatter_add(0, {rows}, {v.name})"]
    hows += [f"{v.name}.index_put((torch.arange(n) * 0,), {v.name})", f"{v.name}[torch.arange(n - 1, -1, -1)]"]
    w.emit(w.choice(hows), v)


def with_its_transpose(w: Writer) -> None:
    """Two values whose examples are on different axes, which happen to be as long."""
    v = w.pick(lambda v: any(v.sizes[i] in (1, w.n, 3, 5) for i in v.own))
    other = w.choice([i for i in v.own if v.sizes[i] in (1, w.n, 3, 5)])
    turned = f"{v.name}.transpose({v.axis}, {other})"
    if v.sizes[other] == 1:
        hows = [
            f"({v.name} * {turned}).mean({other}, keepdim=True)",
            f"({v.name} - {turned}).abs().amax({other}, True)",
        ]
        hows += [f"torch.softmax({v.name} + {turned}, {other}).amin({other}, keepdim=True)"]
    else:
        hows = [f"{v.name} + {turned}", f"torch.where({turned} > 0, {v.name}, 0.0)", f"{v.name} * {turned}.detach()"]
    w.emit(w.choice(hows), v)


def rows_of_a_table(w: Writer) -> None:
    """Copies of a table for merged rows: in the right order, or in the other."""
    v = w.pick(lambda v: not v.plain and v.axis == 0)
    rest, ones = v.sizes[1:], ", 1" * (v.rank - 1)
    k = max(v.before, v.after)
    p = w.choice([w.parameter(k, *rest), w.buffer(f"torch.randn({[k, *rest]})")])
    copies = f"{v.name}.shape[0] // {k}"
    hows = [f"{p}.repeat({copies}{ones})", f"{p}.repeat_interleave({copies}, 0)"]
    sizes = ", ".join(map(str, rest)) or "1"
    hows += [f"{p}.expand({copies}, {k}, {sizes}).reshape({v.name}.shape)"]
    hows += [f"{p}.unsqueeze(1).expand({k}, {copies}, {sizes}).reshape({v.name}.shape)"]
    if not rest:
        raise DoesNotFitError
    w.emit(f"{v.name} {w.choice('+*')} {w.choice(hows)}", v)


def one_by_one(w: Writer) -> None:
    """A loop over the examples, or one in which each sees the one before."""
    v = w.pick(lambda v: v.axis == 0 and v.rank >= 2 and v.plain)
    p = w.parameter(*v.sizes[1:])
    rows = w.choice([f"{v.name}.unbind(0)", f"[{v.name}[i] for i in range({w.n})]", f"{v.name}.split(1)"])
    if w.chance(0.5):
        w.emit(f"torch.stack([row.reshape({list(v.sizes[1:])}) * {p} for row in {rows}])", v)
        return
    name = f"h{len(w.lines)}"
    w.line(f"{name} = [{v.name}[0]]")
    w.line(
        f"for i in range(1, {w.choice([str(w.n), 'n'])}):\n            {name}.append({name}[-1] * {p} + {v.name}[i])"
    )
    w.emit(f"torch.stack({name})", v)


def kept(w: Writer) -> None:
    """A buffer that one example leaves and another reads."""
    v = w.pick(lambda v: v.plain)
    shape = [1 if i == v.axis else size for i, size in enumerate(v.sizes)]
    c = w.buffer(f"torch.zeros({shape})")
    writes = [
        f"{c}.add_({v.name}.detach().mean({v.axis}, keepdim=True))",
        f"{c}.copy_({v.name}.narrow({v.axis}, 0, 1))",
    ]
    w.line(f"with torch.no_grad():\n            {w.choice(writes)}")
    w.emit(f"{v.name} - {c}", v)


def weights_of_examples(w: Writer) -> None:
    """Examples where a layer has its weights."""
    v = w.pick(lambda v: v.rank == 2 and v.axis == 0)
    d = v.sizes[1]
    hows = [f"F.linear({v.name}, {v.name})", f"F.layer_norm({v.name}, [{d}], {v.name}[0])"]
    hows += [f"F.linear({v.name}, {w.parameter(d, d)} * {v.name}.mean())", f"{v.name} @ ({v.name}.t() @ {v.name})"]
    hows += [f"F.linear({v.name}, {w.parameter(d, d)}, {v.name}.sum(0))"]
    hows += [f"F.conv1d({v.name}.unsqueeze(0), {v.name}.unsqueeze(2).expand(-1, {v.name}.shape[0], 1))[0]"]
    how = w.choice(hows)
    if how == hows[0]:
        how = f"({how}).softmax(1) @ {v.name}"
    w.emit(how, v)


def counted(w: Writer) -> None:
    """By the number of examples, or by each one's own number."""
    v = w.pick(lambda v: v.plain)
    ones = ", ".join("-1" if i == v.axis else "1" for i in range(v.rank))
    p = w.parameter(7)
    hows = [f"{v.name} / n", f"{v.name} * {p}[n]", f"{v.name} * {p}[torch.arange(n)].view({ones})"]
    hows += [f"{v.name} * (n % 2)", f"{v.name} * {p}[:n].sum()", f"{v.name} * {p}.repeat(n).sum()"]
    hows += [f"torch.where(torch.arange(n).view({ones}) > 0, {v.name}, 0.0)", f"{v.name} + {p}.expand(n, 7).sum()"]
    hows += [
        f"{v.name} * torch.eye(n, dtype={v.name}.dtype).mean(0).view({ones})",
        f"{v.name} * {p}.mean().expand(n).sum()",
    ]
    hows += [f"{v.name} * torch.tril(torch.ones(n, n, dtype={v.name}.dtype)).sum(1).view({ones})"]
    w.emit(w.choice(hows), v)


MIXING: dict[Step, int] = {
    by_ids: 2,
    with_its_transpose: 3,
    rows_of_a_table: 3,
    one_by_one: 1,
    kept: 2,
    weights_of_examples: 2,
    counted: 3,
    along_examples: 5,
    batch_norm: 1,
    between_examples: 2,
    reshaped_not_transposed: 4,
    split_wrongly: 3,
    rows_joined: 3,
    broadcast_wrongly: 4,
    table_of_examples: 3,
    fixed_number: 2,
    sequence_of_examples: 2,
    scaled_by_all: 2,
    along_merged: 3,
}
