"""Are the further parts of a split model there, and do they belong to its first one?

A split model is `STEM-00001-of-0000N.gguf` and so on.  The engine is given the first part and
opens the others by their names, so they are checked with it: each one's header, its number, and
that all of them have the tensors that the first one counts.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines import gguf_tables
from arriero.engines.gguf_tables import Tables, integer
from arriero.engines.gguf_types import PARAMETERS_MAX, PARTS_MAX, TENSORS_MAX
from arriero.engines.gguf_window import Budget
from arriero.engines.model_file import shown_name

_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_NUMBER: Final = "split.no"
_COUNT: Final = "split.count"
_TENSORS: Final = "split.tensors.count"


@dataclass(frozen=True, slots=True)
class Parts:
    """How many files the model is, and what those after the first add."""

    count: int
    size_bytes: int = 0
    parameters: int = 0


def check(first: Path, tables: Tables, budget: Budget) -> Parts:
    """Check the parts of a model after its first, whose tables are given; the bad one is named.

    Raises MODEL_CORRUPTED, and INVALID_MODEL_PATH if one is not there.
    """
    name = shown_name(first)
    count, number = _split_of(name, tables)
    if number != 0:
        _corrupted(name, f"part {number + 1} of {count} of a model: give its first part")
    if count <= 1:
        return Parts(1)
    match = _NAME.fullmatch(first.name)
    if match is None or int(match["number"]) != 1 or int(match["count"]) != count:
        _corrupted(name, f"the first of {count} parts, and not called NAME-00001-of-{count:05}.gguf")
    names = {tensor.name for tensor in tables.tensors}
    size_bytes = parameters = 0
    for part in range(2, count + 1):
        path = first.with_name(f"{match['stem']}-{part:05}-of-{count:05}.gguf")
        with gguf_tables.opened(path, budget) as window:
            further = gguf_tables.read(window)
        told = _split_of(window.name, further)
        if told != (count, part - 1) and told != (0, part - 1):
            _corrupted(window.name, f"says that it is part {told[1] + 1} of {told[0]}, not {part} of {count}")
        for tensor in further.tensors:
            if tensor.name in names:
                _corrupted(window.name, f"tensor {tensor.name} occurs in an earlier part, too")
            names.add(tensor.name)
        if len(names) > TENSORS_MAX:
            _corrupted(window.name, f"more than {TENSORS_MAX} tensors in all parts up to this")
        size_bytes += window.size
        parameters += sum(tensor.elements for tensor in further.tensors)
    expected = integer(tables.values.get(_TENSORS, len(names)))
    if expected != len(names):
        _corrupted(name, f"counts {expected} tensors in all parts, they have {len(names)}")
    return Parts(count, size_bytes, min(parameters, PARAMETERS_MAX + 1))


def _split_of(name: str, tables: Tables) -> tuple[int, int]:
    """Return how many parts there are (0: it does not say) and the number of this one, from 0."""
    count = integer(tables.values.get(_COUNT, 0))
    number = integer(tables.values.get(_NUMBER, 0))
    if count is None or number is None or not 0 <= count <= PARTS_MAX or not 0 <= number <= PARTS_MAX:
        _corrupted(name, f"{_COUNT} and {_NUMBER} are not numbers of parts up to {PARTS_MAX}")
    return count, number


def _corrupted(name: str, message: str) -> NoReturn:
    raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{name}: {message}", file=name)
