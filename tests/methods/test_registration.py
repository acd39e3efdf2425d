"""A pattern, a method or a tail is one class: what a class from outside gets by registering, and its options."""

import dataclasses
import importlib.util
import json
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from efficient_attn import MultiheadAttention, attention, parse, patterns, replace_attention
from efficient_attn.backends import BACKENDS, EXPERIMENTAL
from efficient_attn.errors import InputError, InputTypeError
from efficient_attn.methods import METHODS, TAILS, Hybrid, Sparse, from_json, methods_table
from efficient_attn.options import read_spec, write
from efficient_attn.patterns import Pattern

ROOT = Path(__file__).resolve().parents[2]
FILE = """
from dataclasses import dataclass

from efficient_attn.methods import CentroidTail, Method, register
from efficient_attn.options import check_range
from efficient_attn.patterns import Pattern


@register
@dataclass(frozen=True)
class EveryOther(Pattern):
    name = "toy_every"
    formula, paper, complexity = "softmax(QK^T)V over j = i mod step", "toy paper", "n^2 d / step"

    step: int = 2
    offsets: tuple[int, ...] = (0,)

    def check(self):
        check_range(self, "step", 1)

    def visible(self, i, j, q_len, kv_len, head=0):
        return sum((i - j) % self.step == offset for offset in self.offsets) > 0


@register
@dataclass(frozen=True)
class MeanOfAll(Method):
    name = "toy_mean"
    formula, paper, complexity = "c mean(V)", "toy paper", "n d"

    factor: float = 1.0

    def attend(self, query, key, value, **options):
        return (self.factor * value.mean(dim=2, keepdim=True)).expand(-1, -1, query.shape[2], -1), None


@register
@dataclass(frozen=True)
class Coarse(CentroidTail):
    name = "toy_tail"

    block: int = 32
"""
TOYS = ["toy_every:step=3,offsets=0x1", "toy_mean:factor=0.5", "toy_every+toy_tail:block=16"]


@pytest.fixture
def toys(tmp_path):
    """The suites, which have loaded the toys from a file as `efficient-attn bench --load FILE` does."""
    suites = pytest.importorskip("efficient_attn.benchmarks.suites")
    place = tmp_path / "toys.py"
    place.write_text(FILE)
    suites.load(place)
    yield suites
    suites._loaded.remove(str(place.resolve()))
    for registry, name in ((patterns.PATTERNS, "toy_every"), (METHODS, "toy_mean"), (TAILS, "toy_tail")):
        del registry[name]


def test_one_class_is_all_that_a_new_one_takes(toys):
    for spec in TOYS:
        method = parse(spec)
        assert str(method) == spec and parse(str(method)) == method == from_json(method.to_json())
        assert json.loads(method.to_json())["method"] == method.name
    assert parse(TOYS[0]) == Sparse(METHODS["toy_every"](3, (0, 1)))
    assert parse("toy_every & causal").pattern == METHODS["toy_every"]() & patterns.Causal()
    with pytest.raises(InputError, match="step must be >= 1"):
        parse("toy_every:step=0")

    rows = {row["name"]: row for row in methods_table()}
    assert rows["toy_every"]["parameters"] == "step=2, offsets=0" and rows["toy_every"]["exact"] == "yes"
    assert rows["toy_mean"]["paper"] == "toy paper" and "...+toy_tail" in rows
    assert toys.Options().specs(("dense",))[-2:] == ("toy_every", "toy_mean")


def test_one_class_is_in_the_documentation(toys):
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    for table in (readme.short_table(), readme.full_table()):
        assert all(f"`{name}`" in table for name in ("toy_every", "toy_mean", "...+toy_tail"))


def test_one_class_attends_wherever_a_spec_is_taken(toys):
    torch.manual_seed(0)
    x = torch.randn(2, 40, 16)
    for spec in TOYS:
        module = MultiheadAttention(16, 2, batch_first=True, attention=spec)
        out = module(x, x, x, need_weights=False)[0]
        plain = nn.MultiheadAttention(16, 2, batch_first=True)
        plain.load_state_dict({name: t for name, t in module.state_dict().items() if "method_state" not in name})
        model = nn.ModuleList([plain])
        replace_attention(model, attention=parse(spec))
        torch.testing.assert_close(model[0](x, x, x, need_weights=False)[0], out)
        assert model[0].attention == module.attention == parse(spec)
    pattern = METHODS["toy_every"](step=3)
    q = torch.randn(1, 2, 40, 8)
    i = torch.arange(40)
    dense = attention(q, q, q, mask=(i[:, None] - i) % 3 == 0)
    compiled = torch.compile(lambda q: attention(q, q, q, mask=pattern), backend="eager", fullgraph=True)
    for out in (attention(q, q, q, mask=pattern), parse(pattern).attend(q, q, q)[0], compiled(q)):
        torch.testing.assert_close(out, dense)


# --- options of every class ---

CLASSES = [*METHODS.values(), *TAILS.values(), patterns.Combined, patterns.PerHead]
OPTIONS = [
    pytest.param(cls, option, id=f"{cls.name}-{option}") for cls in CLASSES for option in cls.kinds if option != "parts"
]
WORDS = (
    *("top_left", "bottom_right", "both", "local", "summary", "rows", "columns", "mean", "first", "minmax"),
    *("bidirectional", "unidirectional", "none", "diagonal", "full", "headwise", "kv", "layerwise", "pool", "normal"),
    *("softmax", "relu", "and", "or"),
)
CONSTRAINED = ("chunk", "num_different_global_patterns")  # other values than the default need another option


def make(cls, **options):
    return cls(parts=(patterns.Dense(),), **options) if cls is patterns.Combined else cls(**options)


def values_of(kind, default):
    """Values that an option of this kind may have, most of which a class takes."""
    values = [default]
    values += [None] if types.NoneType in kind.types else []
    values += [True, False] if bool in kind.types else []
    values += [16, 32, 2, 3, 1, 1000] if int in kind.types else []
    values += [0.25, 1.0] if float in kind.types else []
    values += WORDS if str in kind.types else ()
    if kind.element is not None:
        items = values_of(kind.element, 4 if int in kind.element.types else True)
        values += [(item,) for item in items] + [(items[0], items[1]), (items[1], items[0])]
    return values


@pytest.mark.parametrize(("cls", "option"), OPTIONS)
def test_constructors_text_and_json_take_the_same_values(cls, option):
    default = next(field.default for field in dataclasses.fields(cls) if field.name == option)
    taken = set()
    for value in values_of(cls.kinds[option], default):
        try:
            made = make(cls, **{option: value})
        except InputError:
            continue
        taken.add(value)
        listed = json.loads(json.dumps(value))
        assert made == make(cls, **{option: listed}) == cls.from_json(made.to_json())
        if cls.name in cls.registry:
            assert read_spec(f"{cls.name}:{option}={write(value)}", cls) == made == read_spec(str(made), cls)
            assert cls.from_json({"method": cls.name, option: listed}) == made
        if isinstance(value, tuple) and len(value) == 1:
            assert made == cls(**{option: value[0]}) == cls.from_json({"method": cls.name, option: value[0]})
        if isinstance(value, float) and value.is_integer():
            assert made == cls(**{option: int(value)})
    assert default in taken and (len(taken) >= 2 or option in CONSTRAINED)


@pytest.mark.parametrize(("cls", "option"), OPTIONS)
def test_constructors_and_json_refuse_values_of_another_type(cls, option):
    kind = cls.kinds[option]
    fitting = kind.types if kind.element is None else (*kind.types, *kind.element.types)
    for value in (object(), {}, [[1]], 1.5, True, 1, "1", None):
        if type(value) in fitting or (float in fitting and type(value) is int):
            continue
        for build in (lambda v: make(cls, **{option: v}), lambda v: cls.from_json({"method": cls.name, option: v})):
            with pytest.raises(InputTypeError, match=f"{cls.name}: {option}=.* is not"):
                build(value)


def test_what_holds_others_takes_them_as_json_has_them():
    window, tail = patterns.SlidingWindow(left=3), TAILS["centroid"](block=16)
    both = patterns.Combined("or", (window, patterns.Dense()))
    for parts in ([window, patterns.Dense()], [{"method": "sliding_window", "left": 3}, {"method": "dense"}]):
        assert patterns.Combined("or", parts) == both and patterns.PerHead(parts) == patterns.per_head(both.parts)
        assert Pattern.from_json({"method": "combined", "operator": "or", "parts": parts}) == both
    for sparse in (window, Sparse(window), json.loads(window.to_json())):
        for last in (tail, json.loads(tail.to_json())):
            assert Hybrid(sparse, last) == parse("sliding_window:left=3+centroid:block=16")
    for name in ("hybrid", "nystrom", "centroid"):
        with pytest.raises(InputError, match="there is no pattern"):
            Pattern.from_json({"method": name})
    assert Pattern.from_json({"pattern": "sliding_window", "left": 3}) == window  # as older files have it


def test_neighborhood_says_its_kernel_in_one_number():
    one = patterns.Neighborhood(kernel=7)
    assert one == parse("neighborhood:kernel=7").pattern == patterns.Neighborhood(kernel=(7,))
    assert one == Pattern.from_json({"method": "neighborhood", "kernel": 7}) and one.kernel == (7,)
    assert parse("neighborhood:size=none") == parse("neighborhood")


def test_every_method_is_served_by_the_same_backends():
    """One rule: each backend has both operators that methods are made of; those taken only by name are left out."""
    served = ", ".join(name for name in BACKENDS if name not in EXPERIMENTAL)
    assert {row["backends"] for row in methods_table()} == {served}
    for backend in BACKENDS.values():
        assert backend.attention.attention_forward and backend.linear_attention.linear_attention_forward
