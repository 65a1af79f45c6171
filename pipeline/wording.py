"""Numbers with their nouns, for the facts of errors, verdicts and summaries alike."""


def counted(count: int, noun: str) -> str:
    """Return ``1 row``, ``1,200 rows``, ``2 indexes``, ``3 passes``, ``4 retries``, ``5 searches``."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith(('x', 's', 'ch', 'sh')) else 's'}"
