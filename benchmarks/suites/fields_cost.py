"""Suite `fields_cost`: what a step of the models of the suite `fields` takes, in time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .. import learning
from . import Column, Options, Suite, fields, grid


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `learning.cost`. `config`: field, method, batch, budget_s, threads, seed."""
    field = fields.FIELDS[config["field"]]
    return learning.cost(field.make, field.splits(config["seed"]), config)


def configs(options: Options) -> Iterable[dict[str, Any]]:
    for name, field in fields.FIELDS.items():
        batch = fields.QUICK_BATCH if options.quick else field.batch
        yield from grid(field=name, method=field.trained(options.methods), batch=batch, **options.common())


SUITE = Suite(
    name="fields_cost",
    about="A step (forward and backward of a batch) of each model of the suite fields, in one alternation with the "
    "same model under exact attention. MiB: its peak memory above what the model and the batch take.",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("field", "field", "text"),
        Column("method", "method", "text"),
        Column("batch", "batch", "integer"),
    ),
    columns=(
        Column("tokens", "tokens", "integer"),
        Column("step ms", "ms", "ms"),
        Column("vs dense", "speedup_dense", "times"),
        Column("forward ms", "forward_ms", "ms"),
        Column("MiB", "peak_bytes", "mib"),
    ),
    default=False,
)
