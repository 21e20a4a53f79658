"""The rate at which a model goes through a device, learnt from its batches. No I/O."""

#: After so many seconds of work what was learnt before counts half.
_HALF_LIFE_SECONDS = 10.0
#: How much work the rate stands for that is known beforehand.
_KNOWN_SECONDS = 1.0


class Pace:
    """A decaying mean of tokens a second, from a rate that is known beforehand."""

    def __init__(self, tokens_per_second: float) -> None:
        self._tokens, self._seconds = tokens_per_second * _KNOWN_SECONDS, _KNOWN_SECONDS

    def learn(self, tokens: int, seconds: float) -> None:
        """Note that so many tokens took so long."""
        kept = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._tokens, self._seconds = kept * self._tokens + tokens, kept * self._seconds + seconds

    def seconds(self, tokens: float) -> float:
        """Return how long so many tokens would take."""
        return tokens * self._seconds / max(self._tokens, 1e-9)
