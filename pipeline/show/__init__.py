"""For people: what the engine's events and results look like on a terminal, in a log, as JSON."""
