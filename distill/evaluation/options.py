"""The options of `distill bench` and of a recipe's `benchmark:` block; without torch, as `distill.cli` reads them."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

EVAL_OPTIONS = "eval takes --task, --label_map and --data.<option>"

PositiveInt = Annotated[int, Field(ge=1)]
Price = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class BenchmarkOptions:
    """The `benchmark:` block of a recipe, and the options of `distill bench`."""

    sequence_length: PositiveInt = field(default=128, metadata={"help": "Tokens of a row, none of them padding."})
    latency_batch_size: PositiveInt = field(default=1, metadata={"help": "Rows of a call whose latency is measured."})
    throughput_batch_size: PositiveInt = field(default=32, metadata={"help": "Rows of a call for the throughput."})
    rounds: PositiveInt = field(
        default=5,
        metadata={"help": "Rounds; in each one every model has its turn: 8 calls for latency, 1 for throughput."},
    )


@dataclass
class ReportOptions:
    """The `report:` block of a recipe."""

    slices: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns of the scored rows; models are compared on the rows of each of their values too."},
    )
    price_per_hour: Price | None = field(
        default=None,
        metadata={"help": "Of the machine, in any currency: what a million predictions cost is told of every model."},
    )
    fleet: PositiveInt | None = field(
        default=None, metadata={"help": "Devices that a model is sent to: the bytes of it are told of every model."}
    )
