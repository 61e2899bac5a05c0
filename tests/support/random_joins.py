"""Steps of random models that join a value with others, with inputs, and with constants."""

from __future__ import annotations

from tests.support.random_layers import Step
from tests.support.random_moves import without
from tests.support.random_writer import Writer


def each_with_each(w: Writer) -> None:
    """Products between what an example has: attention, inner products."""
    v = w.pick(lambda v: v.images(3) and v.plain)
    u, (_, t, d) = w.partner(v), v.sizes
    ways = [
        (f"torch.softmax({v.name} @ {u}.transpose(-1, -2), -1) @ {v.name}", v.sizes),
        (f"F.scaled_dot_product_attention({v.name}, {u}, {v.name})", v.sizes),
        (f"F.scaled_dot_product_attention({v.name}, {u}, {v.name}, is_causal=True)", v.sizes),
        (f"torch.bmm({v.name}, {u}.mT)", (1, t, t)),
        (f'torch.einsum("nti,ntj->nij", {v.name}, {u})', (1, d, d)),
    ]
    how, sizes = w.choice(ways)
    w.emit(how, v, sizes=sizes)


def scalar_per_example(w: Writer) -> None:
    """A weight per example, brought into place."""
    given = w.choice([at for at, given in enumerate(w.inputs) if given.kind == "float" and not given.sizes])
    v = w.pick(lambda v: v.plain)
    shape = ", ".join("-1" if i == v.axis else "1" for i in range(v.rank))
    ones = ", ".join(":" if i == v.axis else "None" for i in range(v.rank))
    weight = w.choice([f"x{given}.view({shape})", f"x{given}[{ones}]", f"x{given}.reshape({shape})"])
    w.emit(w.choice([f"{v.name} * {weight}", f"{weight} + {v.name}"]), v)


def masked(w: Writer) -> None:
    """By a mask or by lengths of the inputs; what an example's own number picks."""
    at = w.choice([at for at, given in enumerate(w.inputs) if given.kind in ("mask", "lengths")])
    given = w.inputs[at]
    if given.kind == "mask":
        v = w.pick(lambda v: v.plain and v.axis == 0 and v.rank >= 2 and v.sizes[1] == given.sizes[0])
        mask = f"x{at}.view({', '.join([f'{v.name}.shape[0]', str(v.sizes[1]), *['1'] * (v.rank - 2)])})"
        w.emit(w.choice([f"{v.name} * {mask}", f"{v.name}.masked_fill({mask}, -1.0)"]), v)
        return
    v = w.pick(lambda v: v.plain and v.axis == 0 and v.rank >= 2 and v.sizes[1] == given.limit)
    ones = ", 1" * (v.rank - 2)
    if w.chance(0.5):
        index = f"x{at}.view(-1, 1{ones}).expand(n, 1, {', '.join(map(str, v.sizes[2:])) or ''})".replace(", )", ")")
        w.emit(f"{v.name}.gather(1, {index}).squeeze(1)", v, **without(v, 1))
    elif w.chance(0.5):
        w.emit(f"{v.name}[torch.arange(n), x{at}]", v, **without(v, 1))
    else:
        mask = f"(torch.arange({given.limit}) < x{at}[:, None]).view(n, {given.limit}{ones})"
        w.emit(f"{v.name} * {mask}", v)


def constants(w: Writer) -> None:
    """Tensors made in the forward, some of them by the number of examples."""
    v = w.pick(lambda v: v.plain)
    table = w.broadcast(v)
    rows = ", ".join("n" if i == v.axis else "1" for i in range(v.rank))
    made = [f"torch.ones({rows}, dtype={v.name}.dtype)", f"{v.name}.new_zeros({rows})", f"torch.zeros_like({v.name})"]
    made += [w.buffer(f"torch.rand({list(table)})"), f"torch.full(({rows},), 0.5, dtype={v.name}.dtype)"]
    if v.own and v.axis != v.rank - 1:
        made += [f"torch.arange({v.sizes[-1]}, dtype={v.name}.dtype)", f"torch.linspace(0, 1, {v.sizes[-1]})"]
    w.emit(f"{v.name} {w.choice('+*')} {w.choice(made)}", v)


def stopped(w: Writer) -> None:
    v = w.pick()
    if w.chance(0.5):
        w.emit(f"{v.name} * {w.partner(v)}.detach()", v)
        return
    name = f"h{len(w.lines)}"
    w.line(f"with torch.no_grad():\n            {name} = {w.choice(['{} * 2', 'torch.tanh({})']).format(v.name)}")
    w.emit(f"{v.name} + {name}", v)


def combined(w: Writer) -> None:
    v = w.pick()
    a, b = v.name, w.partner(v)
    how = ["{} + {}", "{} * {}", "torch.where({0} > 0, {0}, {1})", "torch.maximum({}, {})", "{}.lerp({}, 0.3)"]
    w.emit(w.choice([*how, "{0}.masked_fill({1} > 0, 0.5)"]).format(a, b), v)


def with_merged_copies(w: Writer) -> None:
    """Rows of a table beside merged rows, in their order."""
    v = w.pick(lambda v: not v.plain and v.axis == 0 and v.rank >= 2 and 1 in (v.before, v.after))
    k, rest = max(v.before, v.after), v.sizes[1:]
    p, sizes = w.parameter(k, *rest), ", ".join(map(str, rest))
    if v.before == 1:
        hows = [f"{p}.repeat(n{', 1' * len(rest)})", f"{p}.expand(n, {k}, {sizes}).reshape(n * {k}, {sizes})"]
    else:
        hows = [f"{p}.repeat_interleave(n, 0)", f"{p}[:, None].expand({k}, n, {sizes}).flatten(0, 1)"]
    w.emit(f"{v.name} {w.choice('+*-')} {w.choice(hows)}", v)


def by_own_ids(w: Writer) -> None:
    """What an example picks by ids of its own, along its own axes or from a table."""
    at = w.choice([at for at, given in enumerate(w.inputs) if given.kind in ("ids", "lengths")])
    v = w.pick(lambda v: v.plain and v.axis == 0 and v.rank >= 2)
    size, tail = v.sizes[1], v.sizes[2:]
    first = f"(x{at}.reshape(n, -1)[:, :1] % {size})"
    rows = f"{first}.view(n, 1{', 1' * len(tail)}).expand(n, 1, {', '.join(map(str, tail))})".replace(", )", ")")
    ways = [
        (f"{v.name}.gather(1, {rows})", (1, 1, *tail)),
        (f"{v.name}[torch.arange(n)[:, None], {first}]", (1, 1, *tail)),
        (f"torch.zeros_like({v.name}).scatter_add(1, {rows}, {v.name})", v.sizes),
        (f"{v.name}.scatter(1, {rows}, 0.5)", v.sizes),
        (f"torch.take_along_dim({v.name}, {rows}, 1)", (1, 1, *tail)),
    ]
    if not tail:
        ways += [(f"{v.name} * F.one_hot({first}[:, 0], {size})", v.sizes)]
    how, sizes = w.choice(ways)
    w.emit(how, v, sizes=sizes)


def written_weight(w: Writer) -> None:
    """An expression of parameters that is written in place, perhaps through a view and after it was used."""
    v = w.pick(lambda v: v.axis != v.rank - 1)
    d, name = v.sizes[-1], f"m{len(w.lines)}"
    w.line(f"{name} = {w.parameter(d, d)}{w.choice([' * 2', '.tanh()', '.clone()'])}")
    used = f"F.linear({v.name}, {name})"
    if w.chance(0.3):
        v = w.emit(used, v)
    w.line(w.choice([f"{name}[:1].mul_(3)", f"{name} += 1", f"{name}.tanh_()", f"{name}.view(-1).clamp_(min=0)"]))
    w.emit(used, v)


JOINS: dict[Step, int] = {
    written_weight: 1,
    with_merged_copies: 3,
    by_own_ids: 3,
    combined: 4,
    each_with_each: 2,
    scalar_per_example: 3,
    masked: 3,
    constants: 3,
    stopped: 1,
}
