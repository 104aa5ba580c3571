"""How a launch divides a matrix of rows and channels among its programs."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """Tiles of block_rows x block_cols; each program has one split's `turns` tiles of a block of columns.

    The bits of a result depend on it, so whoever makes one makes it from the shape alone.
    """

    block_rows: int
    block_cols: int
    turns: int
    splits: int


def cut(rows: int, block_rows: int, block_cols: int, splits: int) -> Plan:
    """Up to so many splits of so many rows, at least one each, none of them without a row."""
    turns = -(-rows // (block_rows * splits))
    return Plan(block_rows, block_cols, turns, -(-rows // (block_rows * turns)))


def splits_for(programs: int, channels: int, groups: int, block_cols: int) -> int:
    """Into how many splits each group's rows are cut, so that there are about so many programs."""
    return max(1, programs // (-(-channels // block_cols) * groups))
