"""Throughput of a model on a device, learnt from its batches. No I/O."""

#: Half-life of earlier batches in the mean, in seconds of work.
_HALF_LIFE_SECONDS = 10.0
#: Weight of the initial rate, in seconds of work.
_KNOWN_SECONDS = 1.0


class Pace:
    """Decaying mean of tokens per second, starting from a rate that is known beforehand."""

    def __init__(self, tokens_per_second: float) -> None:
        self._tokens, self._seconds = tokens_per_second * _KNOWN_SECONDS, _KNOWN_SECONDS

    def learn(self, tokens: int, seconds: float) -> None:
        """Add a batch of `tokens` that took `seconds`."""
        kept = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._tokens, self._seconds = kept * self._tokens + tokens, kept * self._seconds + seconds

    def seconds(self, tokens: float) -> float:
        """Return the time that `tokens` would take."""
        return tokens * self._seconds / max(self._tokens, 1e-9)
