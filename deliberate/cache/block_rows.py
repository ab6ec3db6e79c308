"""One row of a cache in blocks, and the copies that its writes need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class BlockCopy(NamedTuple):
    """All that `source` holds in the layers of a group must be copied to `target`."""

    group: int
    source: int
    target: int


@dataclass(slots=True, eq=False)
class BlockRow:
    """What `BlockTables` knows of one row.

    Attributes:
        lengths: tokens that each layer holds.
        tables: blocks of each layer group, in the order of positions.
        root: where the chain of its keys begins.
        tokens: that it is known to hold, from the first on.
        keys: of its first blocks, published or matched.
        lossy_from: first position whose keys and values are not exact; None: all are.
        owner: whose growth blocks are set aside for.
        version: another for every state of any row's tables.
    """

    lengths: list[int]
    tables: list[list[int]]
    root: bytes
    tokens: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    lossy_from: int | None = None
    owner: int = 0
    version: int = 0
