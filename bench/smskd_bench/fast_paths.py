"""The shortcuts a run takes, and the one switch that takes none.

None of them changes what is trained, only how it is rounded: a table in half precision, seeds in
one network, compiled kernels, another number of threads. Which are taken depends on the matrix and
on measured speeds, so the same stage run may end in other bits in another matrix. ``--exact`` takes
none of them: bits then depend on the specification, the device and the versions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smskd.errors import ConfigError
from smskd_bench.folds import FoldChoice
from smskd_bench.parallel import Wanted
from smskd_bench.plan import Plan, make_plan
from smskd_bench.table_shelf import TableChoice
from smskd_bench.tables import TableKey, TablePlan, plan_tables


@dataclass(frozen=True)
class FastPaths:
    """What is allowed.

    Attributes:
        teacher_table: Outputs of frozen networks from tables ("auto": where the plan says that it
            pays, in fp16).
        fold_seeds: Seeds of a cell as one network ("auto": where that was measured to be faster).
        compile: Networks compiled.
        workers: Stage runs at once.
        exact: No shortcut at all.
    """

    teacher_table: TableChoice = "auto"
    fold_seeds: FoldChoice = "auto"
    compile: bool = False
    workers: Wanted = "auto"
    exact: bool = False

    @classmethod
    def choose(cls, exact: bool, **wanted: Any) -> FastPaths:
        """From the command line.

        Raises:
            ConfigError: ``exact`` together with a choice that it makes itself.
        """
        paths = cls(**wanted)
        if not exact:
            return paths
        default, none = cls(), cls("off", "off", False, 1, exact=True)
        given = [name for name in wanted if getattr(paths, name) != getattr(default, name)]
        against = [n for n in given if getattr(paths, n) != getattr(none, n)]
        if against:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in against)
            raise ConfigError(f"--exact takes no shortcuts, but {options} asks for one", "drop one")
        return none

    def tables(self, plan: Plan, only: str | None) -> dict[TableKey, TablePlan]:
        """The tables that are worth making, decided for the whole matrix even if a part is run."""
        return {place: t for place, t in self.possible_tables(plan, only).items() if t.pays}

    def possible_tables(self, plan: Plan, only: str | None) -> dict[TableKey, TablePlan]:
        """All tables that could be made, worth it or not."""
        if self.teacher_table == "off":
            return {}
        whole = make_plan(plan.loaded) if only else plan
        return plan_tables(whole, "fp32" if self.teacher_table == "fp32" else "fp16")
