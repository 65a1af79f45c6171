"""Turns: contenders one after the other, round by round, and what they left compared."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from contenders import Contender
from content import Content
from measure import BenchError, Measurement, measure
from testbed import Testbed


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn(Measurement):
    """What one turn took, and how many checkpoints main began during it."""

    checkpoints: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A contender with all its turns, in order, and what main held after the last.

    ``slices`` is into how many the pipeline cut the table, 0 where it did not run.
    """

    contender: Contender
    turns: tuple[Turn, ...]
    left: Content
    slices: int

    @property
    def seconds(self) -> float:
        """Return the median of the wall seconds."""
        return statistics.median(one.seconds for one in self.turns)

    @property
    def cpu_seconds(self) -> float:
        """Return the median of the CPU seconds."""
        return statistics.median(one.cpu_seconds for one in self.turns)

    @property
    def peak_bytes(self) -> int:
        """Return the highest peak of all rounds."""
        return max(one.peak_bytes for one in self.turns)

    def base(self, results: "Sequence[Result]") -> "Result | None":
        """Return the one it is held against: the fastest of those that its contender names, None where none ran."""
        named = [one for one in results if one.contender.name in self.contender.against]
        return min(named, key=lambda one: one.seconds, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How turns are taken: so many rounds, each with legacy cold or as warm as the turn before left it."""

    rounds: int
    tell: Callable[[str], None]
    cold: bool = False

    def take_all(self, bed: Testbed, contenders: Sequence[Contender]) -> list[Result]:
        """Let each contender have a turn per round, and compare what it left after its last one.

        Raises BenchError where one fails. One that is not ours to mend (``optional``) is left out instead.
        """
        taken: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
        results = {}
        for number in range(self.rounds):
            for contender in in_turn(contenders, number):
                if contender.name not in taken:
                    continue
                try:
                    one = self.take(bed, contender)
                    taken[contender.name].append(one)
                    self.tell(f"round {number + 1} of {self.rounds}  {contender.name:<14} {one.seconds:8.2f} s")
                    if number + 1 == self.rounds:
                        results[contender.name] = Result(
                            contender=contender,
                            turns=tuple(taken[contender.name]),
                            left=bed.check(contender.name, with_index=contender.kind == "index"),
                            slices=bed.slices()[0],
                        )
                except BenchError as error:
                    if not contender.optional:
                        raise
                    del taken[contender.name]
                    self.tell(f"{contender.name} is left out: {error.fact}\n{error.hint}")
        return [results[contender.name] for contender in contenders if contender.name in results]

    def take(self, bed: Testbed, contender: Contender) -> Turn:
        """Let one contender have one turn. Raises BenchError with its name where it fails."""
        if contender.kind != "check":
            # The pipeline finds the index and defers it; by hand it is made after the load.
            bed.reset(with_index=contender.finds_index)
        if self.cold:
            bed.cool()
        before = bed.checkpoints()
        try:
            measured = measure(contender.steps, bed.environment, bed.folder)
        except BenchError as error:
            raise BenchError(f"{contender.name}: {error.fact}", error.hint) from error
        return Turn(**asdict(measured), checkpoints=bed.checkpoints() - before)


def in_turn(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """Return a round's order: each begins with another one, and every second goes backwards.

    So none is first every time, and none always follows the same one.
    """
    first = number % len(contenders) if contenders else 0
    order = [*contenders[first:], *contenders[:first]]
    return order[:1] + order[:0:-1] if number % 2 else order
