"""A reward for the run that is kept here."""


def odd(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """The share of odd tokens."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
