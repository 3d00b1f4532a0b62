"""What has become of every stage run of a plan, and which ones can still be run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from smskd_bench.executors.observing import Observer, Status
from smskd_bench.plan import Plan
from smskd_bench.spec import StageSpec
from smskd_bench.store import Store


@dataclass(frozen=True)
class Outcome:
    """What became of one stage run, and why it failed.

    Its status is "cached" if another process had finished it, "busy" if another process has it now,
    and "put_back" if it is to begin again when there is more room.
    """

    key: str
    status: Status | Literal["cached", "busy", "put_back"]
    reason: str = ""


@dataclass
class Summary:
    """What an execution did: keys by what became of them, each in plan order."""

    trained: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def and_trained(self, keys: Collection[str]) -> Summary:
        """The same with these, which it found done, counted as trained by the same run."""
        found = [key for key in self.cached if key in keys]
        cached = [key for key in self.cached if key not in keys]
        return replace(self, trained=[*found, *self.trained], cached=cached)


def missing(plan: Plan, store: Store) -> list[str]:
    """Keys of the plan without a result, in dependency order."""
    return [key for key in plan.nodes if not store.is_done(key)]


class Ledger:
    """Keeps the outcomes of one execution; dependants of what failed are refused here."""

    def __init__(self, plan: Plan, store: Store, observer: Observer) -> None:
        self.plan = plan
        self.store = store
        self.observer = observer
        self._outcomes: dict[str, Outcome] = {}
        self._failed: dict[str, str] = {}

    def is_ready(self, spec: StageSpec) -> bool:
        """Whether everything it depends on is over, well or not."""
        return all(key in self._outcomes for key in spec.depends_on)

    def is_settled(self, key: str) -> bool:
        """Whether it is known what became of a stage run."""
        return key in self._outcomes

    def settle(self, outcome: Outcome) -> None:
        """Note what became of a stage run."""
        self._outcomes[outcome.key] = outcome
        if outcome.status not in ("done", "cached"):
            self._failed[outcome.key] = f"{outcome.status}: {outcome.reason}"

    def settle_unrun(self, spec: StageSpec) -> bool:
        """Settle a stage run that is ready and need not or cannot run; False if it has to."""
        if self.store.is_done(spec.key):
            self.settle(Outcome(spec.key, "cached"))
            return True
        return self.settle_blocked(spec)

    def settle_blocked(self, spec: StageSpec) -> bool:
        """Settle a stage run that something it depends on has made impossible; False if none."""
        broken = next((key for key in spec.depends_on if key in self._failed), None)
        if broken is None:
            return False
        cause = f"{self.plan.nodes[broken].label} {self._failed[broken]}"
        self.settle(Outcome(spec.key, "blocked", cause))
        self.observer.skip(spec, self._failed[spec.key])
        return True

    def summary(self) -> Summary:
        """What was settled so far, in plan order however it came."""
        status = {key: self._outcomes[key].status for key in self.plan.nodes}
        return Summary(
            trained=[key for key in status if status[key] == "done"],
            cached=[key for key in status if status[key] == "cached"],
            failed={key: self._failed[key] for key in status if key in self._failed},
        )
