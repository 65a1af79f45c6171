"""Scenes: how contenders meet the servers. Figures are held against others of the same scene."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from testbed import Testbed


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Legacy warm or cold; the servers reached directly, or by a proxy ``latency_ms`` of round trip away."""

    cold: bool = False
    latency_ms: float | None = None

    @property
    def suffix(self) -> str:
        """Return what a contender's name ends with in this scene; nothing where legacy is warm and near."""
        if self.latency_ms is not None:
            return f"@{self.latency_ms:g}ms"
        return "@cold" if self.cold else ""

    @property
    def title(self) -> str:
        """Return the scene in words."""
        if self.latency_ms is not None:
            return f"Both servers by a proxy, {self.latency_ms:g} ms away"
        return "Legacy cold" if self.cold else "Legacy warm"

    @contextmanager
    def of(self, bed: Testbed) -> Iterator[Testbed]:
        """Yield the testbed as contenders meet it here."""
        if self.latency_ms is None:
            yield bed
        else:
            with bed.at_distance(self.latency_ms) as far:
                yield far
