"""Steps of random models that use parameters: layers, products with raw parameters, ties, expressions."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.support.random_writer import DoesNotFitError, Value, Writer

Step = Callable[[Writer], None]
LETTERS = "abcde"


def matrix(w: Writer, rows: int, columns: int) -> str:
    """A matrix of parameters, bare or an expression, as people write them; perhaps one that is used already."""

    def bare() -> str:
        return w.parameter(rows, columns)

    ways: list[Callable[[], str]] = [
        bare,
        bare,
        bare,
        lambda: w.parameter(columns, rows) + w.choice([".t()", ".T", ".transpose(0, 1)", ".mT"]),
        lambda: f"({bare()} * {w.buffer(f'(torch.rand({rows}, {columns}) > 0.3).float()')})",
        lambda: f"({w.parameter(rows, (k := w.size()))} @ {w.parameter(k, columns)})",
        lambda: f"{w.parameter(rows + 2, columns)}[{[w.random.randrange(rows + 2) for _ in range(rows)]}]",
        lambda: f"{w.parameter(rows + 1, columns)}[:{rows}]",
        lambda: f"({bare()} + {bare()})",
        lambda: f"torch.tanh({bare()})",
        lambda: f"{w.parameter(rows * columns)}.view({rows}, {columns})",
        lambda: f"({bare()} / {bare()}.norm())",
        lambda: f"torch.softmax({bare()}, {w.choice([0, 1])})",
        lambda: f"torch.cat([{w.parameter(rows, columns)}, {w.parameter(1, columns)}])[1:]",
        lambda: f"({bare()} - {w.parameter(rows, columns)}.mean(1, keepdim=True))",
        lambda: f"{bare()}.detach()",
        lambda: f"{w.parameter(rows, 1)}.expand({rows}, {columns})",
        lambda: f"F.normalize({bare()}, dim={w.choice([0, 1])})",
        lambda: f"torch.where({bare()} > 0, {bare()}, 0.1)",
        lambda: f"{bare()}.flip({w.choice([0, 1])})",
        lambda: f"{w.parameter(1, columns)}.repeat({rows}, 1)",
        lambda: f"torch.outer({w.parameter(rows)}, {w.parameter(columns)})",
    ]
    return w.choice(ways)()


def linear(w: Writer) -> None:
    v = w.pick(lambda v: v.axis != v.rank - 1)
    out, bias = w.size(), w.choice(["", ", bias=False"])
    weights = {"weight": (out, v.sizes[-1])}
    layer = w.layer(f"nn.Linear({v.sizes[-1]}, {out}{bias})", **weights)
    w.emit(f"{layer}({v.name})", v, sizes=(*v.sizes[:-1], out))


def parametrized(w: Writer) -> None:
    v = w.pick(lambda v: v.axis != v.rank - 1)
    out = w.size()
    how = w.choice(
        [
            "nn.utils.parametrizations.weight_norm(nn.Linear({}, {}))",
            "nn.utils.parametrizations.orthogonal(nn.Linear({}, {}))",
        ]
    )
    layer = w.layer(how.format(v.sizes[-1], out))
    w.emit(f"{layer}({v.name})", v, sizes=(*v.sizes[:-1], out))


def f_linear(w: Writer) -> None:
    v = w.pick(lambda v: v.axis != v.rank - 1)
    out = w.size()
    bias = f", {w.parameter(out)}" if w.chance(0.4) else ""
    w.emit(f"F.linear({v.name}, {matrix(w, out, v.sizes[-1])}{bias})", v, sizes=(*v.sizes[:-1], out))


def product(w: Writer) -> None:
    v = w.pick(lambda v: v.rank >= 2)
    out = w.size()
    if v.axis != v.rank - 1 and w.chance(0.6):
        m = matrix(w, v.sizes[-1], out)
        how = w.choice([f"{v.name} @ {m}", f"torch.matmul({v.name}, {m})"])
        w.emit(how, v, sizes=(*v.sizes[:-1], out))
    elif v.axis != v.rank - 2:
        m = matrix(w, out, v.sizes[-2])
        w.emit(f"torch.matmul({m}, {v.name})", v, sizes=(*v.sizes[:-2], out, v.sizes[-1]))
    else:
        raise DoesNotFitError


def added_product(w: Writer) -> None:
    v = w.pick(lambda v: v.rank == 2 and v.axis == 0)
    out = w.size()
    scales = w.choice(["", ", beta=0.5", ", alpha=2.0", ", beta=2, alpha=0.5"])
    m = matrix(w, v.sizes[-1], out)
    how = w.choice([f"torch.addmm({w.parameter(out)}, {v.name}, {m}{scales})", f"torch.mm({v.name}, {m})"])
    w.emit(how, v, sizes=(v.sizes[0], out))


def batched_product(w: Writer) -> None:
    v = w.pick(lambda v: v.images(3) and v.plain)
    out, rows = w.size(), v.sizes[1]
    p = w.parameter(v.sizes[2], out)
    copies = [f"{p}.expand(n, {v.sizes[2]}, {out})", f"{p}.repeat(n, 1, 1)", f"{p}[None].repeat_interleave(n, 0)"]
    m = w.choice([*copies, f"{p}.repeat(n, 1).view(n, {v.sizes[2]}, {out})"])
    addend = w.parameter(*w.choice([(rows, out), (1, out), (1, rows, out)]))
    how = w.choice(
        [f"torch.baddbmm({addend}, {v.name}, {m}{w.choice(['', ', beta=0.5'])})", f"torch.bmm({v.name}, {m})"]
    )
    w.emit(how, v, sizes=(v.sizes[0], rows, out))


def einsum(w: Writer) -> None:
    v = w.pick(lambda v: v.rank <= 4)
    labels, out = LETTERS[: v.rank], w.size()
    summed = w.choice(v.own)
    shared = [i for i in v.own if i != summed and w.chance(0.3)]
    axes = [(labels[summed], v.sizes[summed]), ("z", out), *((labels[i], v.sizes[i]) for i in shared)]
    w.random.shuffle(axes)
    m = w.parameter(*(size for _, size in axes))
    result = labels.replace(labels[summed], "z")
    equation = f"{labels},{''.join(label for label, _ in axes)}->{result}"
    sizes = list(v.sizes)
    sizes[summed] = out
    w.emit(f'torch.einsum("{equation}", {v.name}, {m})', v, sizes=tuple(sizes))


def raw(w: Writer) -> None:
    """A parameter that is broadcast: positions, scales, shifts."""
    v = w.pick()
    p = w.parameter(*w.broadcast(v))
    how = w.choice(["{v} + {p}", "{v} * {p}", "{p} - {v}", "{v} / ({p} ** 2 + 1)", "torch.maximum({v}, {p})"])
    w.emit(how.format(v=v.name, p=w.choice([p, p, f"torch.tanh({p})", f"({p} * 2)"])), v)


def token(w: Writer) -> None:
    """A class token: `cat` along an axis of its own with copies of a parameter."""
    v = w.pick(lambda v: v.rank >= 2 and v.plain)
    axis = w.choice(v.own)
    sizes = [1 if i in (axis, v.axis) else size for i, size in enumerate(v.sizes)]
    shape = ", ".join("n" if i == v.axis else "-1" for i in range(v.rank))
    copies = f"{w.parameter(*sizes)}.expand({shape})"
    sizes = list(v.sizes)
    sizes[axis] += 1
    w.emit(f"torch.cat([{w.choice([f'{copies}, {v.name}', f'{v.name}, {copies}'])}], {axis})", v, sizes=tuple(sizes))


def norm(w: Writer) -> None:
    v = w.pick(lambda v: v.rank > v.axis + 1)
    count = w.choice(range(1, v.rank - v.axis))
    w.emit(f"{w.layer(f'nn.LayerNorm({list(v.sizes[-count:])})')}({v.name})", v)


def channels(w: Writer) -> None:
    """Layers with one parameter per channel."""
    v = w.pick(lambda v: v.axis == 0 and v.rank >= 3)
    c = v.sizes[1]
    groups = w.choice([g for g in range(1, c + 1) if c % g == 0])
    texts = [f"nn.GroupNorm({groups}, {c})", f"nn.PReLU({c})", "nn.PReLU()"]
    texts += [f"nn.BatchNorm1d({c}).eval()"] if v.rank == 3 else []
    if v.rank == 3 and v.sizes[2] > 1:
        texts.append(f"nn.InstanceNorm1d({c}, affine=True)")
    w.emit(f"{w.layer(w.choice(texts))}({v.name})", v)


def convolution(w: Writer) -> None:
    rank = w.choice([1, 1, 2])
    v = w.pick_image(rank + 2)
    c, lengths = v.sizes[1], v.sizes[2:]
    kernel, stride, padding = w.choice([1, 2, 3]), w.choice([1, 1, 2]), w.choice([0, 1])
    groups = w.choice([1, 1, c])
    out = groups * w.choice([1, 2]) if groups > 1 else w.size()
    after = tuple((length + 2 * padding - kernel) // stride + 1 for length in lengths)
    if min(after) < 1 or (padding >= min(lengths)):
        raise DoesNotFitError
    options = f"stride={stride}, padding={padding}, groups={groups}{w.choice(['', ', bias=False'])}"
    mode = w.choice(["", "", ', padding_mode="circular"', ', padding_mode="replicate"']) if padding else ""
    layer = w.layer(f"nn.Conv{rank}d({c}, {out}, {kernel}, {options}{mode})")
    w.emit(f"{layer}({v.name})", v, sizes=(v.sizes[0], out, *after))


def transposed_convolution(w: Writer) -> None:
    rank = w.choice([1, 1, 2])
    v = w.pick_image(rank + 2)
    c, out, kernel, stride = v.sizes[1], w.size(), w.choice([1, 2, 3]), w.choice([1, 2])
    after = tuple((length - 1) * stride + kernel for length in v.sizes[2:])
    layer = w.layer(f"nn.ConvTranspose{rank}d({c}, {out}, {kernel}, stride={stride})")
    w.emit(f"{layer}({v.name})", v, sizes=(v.sizes[0], out, *after))


def bilinear(w: Writer) -> None:
    v = w.pick(lambda v: v.axis != v.rank - 1 and v.sizes[-1] <= 6)
    out = w.size()
    layer = w.layer(f"nn.Bilinear({v.sizes[-1]}, {v.sizes[-1]}, {out})")
    w.emit(f"{layer}({v.name}, {w.partner(v)})", v, sizes=(*v.sizes[:-1], out))


def recurrent(w: Writer) -> None:
    v = w.pick(lambda v: v.rank == 3 and v.axis in (0, 1) and v.plain)
    hidden = w.choice([2, 3])
    kind = w.choice(["LSTM", "GRU", "RNN"])
    first = f"batch_first={v.axis == 0}"
    options = w.choice(["", ", num_layers=2", ", bidirectional=True"])
    layer = w.layer(f"nn.{kind}({v.sizes[2]}, {hidden}, {first}{options})")
    w.emit(f"{layer}({v.name})[0]", v, sizes=(*v.sizes[:2], hidden * (2 if "bid" in options else 1)))


def attention(w: Writer) -> None:
    v = w.pick(lambda v: v.rank == 3 and v.axis in (0, 1) and v.plain)
    d, first = v.sizes[2], f"batch_first={v.axis == 0}"
    heads = w.choice([h for h in (1, 2, 3) if d % h == 0])
    if w.chance(0.5):
        layer = w.layer(f"nn.MultiheadAttention({d}, {heads}, {first})")
        options = w.choice(["", ", need_weights=False"])
        w.emit(f"{layer}({v.name}, {v.name}, {w.partner(v)}{options})[0]", v)
    else:
        options = f"dim_feedforward=4, dropout=0.0, {first}{w.choice(['', ', norm_first=True'])}"
        w.emit(f"{w.layer(f'nn.TransformerEncoderLayer({d}, {heads}, {options})')}({v.name})", v)


def into_unfolded(w: Writer) -> None:
    """A matrix for every entry of an axis of its own: `[n, t, i] x [t, i, o]`."""
    v = w.pick(lambda v: v.images(3))
    _, t, i = v.sizes
    out = w.size()
    how = f"({v.name}.unsqueeze(2) @ {w.parameter(t, i, out)}).squeeze(2)"
    w.emit(how, v, sizes=(v.sizes[0], t, out))


def again(w: Writer) -> None:
    """A weight that there is already, wherever it fits: as matrix, transposed, or added."""
    v = w.pick(lambda v: v.axis != v.rank - 1)
    d = v.sizes[-1]
    name, shape = w.choice([(name, shape) for name, shape in w.weights if len(shape) == 2 and d in shape])
    out = shape[0] if shape[1] == d else shape[1]
    if shape[1] == d and w.chance(0.6):
        hows = [f"F.linear({v.name}, {name})", f"{v.name} @ {name}.t()", f"{v.name} @ {name}.T.tanh()"]
    elif shape[0] == d:
        out = shape[1]
        hows = [
            f"{v.name} @ {name}",
            f"F.linear({v.name}, {name}.t())",
            f'torch.einsum("...i,io->...o", {v.name}, {name})',
        ]
    else:
        out = d
        hows = [f"{v.name} + {name}[0]", f"{v.name} * {name}.mean(0)", f"{v.name} - {name}[-1] * {name}[0]"]
    w.emit(w.choice(hows), v, sizes=(*v.sizes[:-1], out))


def whole(w: Writer) -> None:
    """A matrix over all that an example has, or over an axis in front of the examples."""
    v = w.pick(lambda v: v.axis == 0 and v.plain)
    d, out = math.prod(v.sizes[1:]), w.size()
    if d * out > 100 or v.rank < 2:
        raise DoesNotFitError
    how = w.choice([f"{v.name}.flatten(1)", f"{v.name}.reshape(-1, {d})", f"{v.name}.view(n, -1)"])
    w.emit(f"F.linear({how.replace('.view', '.contiguous().view')}, {matrix(w, out, d)})", v, sizes=(1, out))


def embedding(w: Writer) -> None:
    """Ids of their own, looked up in a table that may be used elsewhere too."""
    ids = [at for at, given in enumerate(w.inputs) if given.kind == "ids"]
    at, d = w.choice(ids), w.size()
    sizes = w.inputs[at].sizes
    if math.prod(sizes) * d > 100:
        raise DoesNotFitError
    x = f"x{at}" if w.chance(0.7) else f"(x{at} + {w.choice(range(3))}) % 5"
    tables = [name for name, shape in w.weights if shape == (5, d)]
    if tables and w.chance(0.5):
        how = w.choice([f"F.embedding({x}, {w.choice(tables)})", f"{w.choice(tables)}[{x}]"])
    else:
        padding = w.choice(["", ", padding_idx=1"])
        how = f"{w.layer(f'nn.Embedding(5, {d}{padding})', weight=(5, d))}({x})"
    axis = w.batch_dim
    shape = (*sizes[:axis], 1, *sizes[axis:], d)
    w.emit(how, Value("", shape, axis))


PARAMETERS: dict[Step, int] = {
    linear: 5,
    f_linear: 5,
    product: 4,
    raw: 5,
    einsum: 2,
    added_product: 2,
    batched_product: 1,
    parametrized: 1,
    token: 1,
    norm: 2,
    channels: 2,
    convolution: 3,
    transposed_convolution: 1,
    bilinear: 1,
    recurrent: 1,
    attention: 2,
    into_unfolded: 1,
    embedding: 2,
    again: 4,
    whole: 2,
}
