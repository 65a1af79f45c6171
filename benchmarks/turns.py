"""Turns: contenders one after the other, round by round, and what they left compared."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contenders import Contender
from content import Content
from measure import BenchError, Measurement, measure
from testbed import Testbed


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A contender with the measurements of all its rounds, in order, and what main held after the last.

    ``slices`` is into how many the pipeline cut the table, 0 where it did not run.
    """

    contender: Contender
    measurements: tuple[Measurement, ...]
    left: Content
    slices: int

    @property
    def seconds(self) -> float:
        """Return the median of the wall seconds."""
        return statistics.median(one.seconds for one in self.measurements)

    @property
    def cpu_seconds(self) -> float:
        """Return the median of the CPU seconds."""
        return statistics.median(one.cpu_seconds for one in self.measurements)

    @property
    def peak_bytes(self) -> int:
        """Return the highest peak of all rounds."""
        return max(one.peak_bytes for one in self.measurements)

    def base(self, results: "Sequence[Result]") -> "Result":
        """Return the one it is held against: the fastest of those that its contender names."""
        return min(
            (one for one in results if one.contender.name in self.contender.against), key=lambda one: one.seconds
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How turns are taken: so many rounds, each with legacy cold or as warm as the turn before left it."""

    rounds: int
    cold: bool
    tell: Callable[[str], None]

    def take_all(self, bed: Testbed, contenders: Sequence[Contender]) -> list[Result]:
        """Let each contender have a turn per round, and compare what it left after its last one.

        Every round begins with another contender, so that none always follows the same one.
        """
        measured: dict[str, list[Measurement]] = {contender.name: [] for contender in contenders}
        left: dict[str, tuple[Content, int]] = {}
        for number in range(self.rounds):
            first = number % len(contenders) if contenders else 0
            for contender in (*contenders[first:], *contenders[:first]):
                one = self.take(bed, contender)
                measured[contender.name].append(one)
                self.tell(f"round {number + 1} of {self.rounds}  {contender.name:<14} {one.seconds:8.2f} s")
                if number + 1 == self.rounds:
                    content = bed.check(contender.name, with_index=contender.kind == "index")
                    left[contender.name] = (content, bed.slices())
        return [
            Result(
                contender=one,
                measurements=tuple(measured[one.name]),
                left=left[one.name][0],
                slices=left[one.name][1],
            )
            for one in contenders
        ]

    def take(self, bed: Testbed, contender: Contender) -> Measurement:
        """Let one contender have one turn. Raises BenchError with its name where it fails."""
        if contender.kind != "check":
            # The pipeline finds the index and defers it; by hand it is made after the load.
            bed.reset(with_index=contender.finds_index)
        if self.cold:
            bed.cool()
        try:
            return measure(contender.steps, bed.environment, bed.folder)
        except BenchError as error:
            raise BenchError(f"{contender.name}: {error.fact}", error.hint) from error
