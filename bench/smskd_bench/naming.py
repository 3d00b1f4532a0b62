"""Names of rows and cells: ``fitnet>kd`` is a sequence, ``fitnet+kd`` one joint stage."""

from __future__ import annotations

from smskd_bench.matrix import RowSection


def row_name(row: RowSection) -> str:
    """The row's own name, or its stages written as a sequence."""
    return row.name or ">".join("+".join(stage.method) for stage in row.stages)


def cell_name(pair: str, row: str, seed: int) -> str:
    """``teacher>student/row/s0``; what ``--only`` and ``--cell`` match against."""
    return f"{pair}/{row}/s{seed}"
