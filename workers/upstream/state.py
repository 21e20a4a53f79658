"""State of an upstream's model, as a child process has learnt it, kept from claim to claim."""

import time
from dataclasses import dataclass
from math import inf

from pipeline.core.openai_client import CHARACTERS_PER_TOKEN

#: Maximum time between canary checks, since an upstream may change its model at any time.
_PROOF_SECONDS = 600.0
#: Minimum backoff of a chunk that is given back; doubled each time while nothing comes through.
_BACK_OFF_SECONDS = 4.0
_MOST_BACK_OFF_SECONDS = 60.0


@dataclass(slots=True)
class UpstreamState:
    """Learnt sizes, backoff and canary checks of an upstream's model. For one thread."""

    #: Moving average, from the token counts of replies.
    characters_per_token: float = CHARACTERS_PER_TOKEN
    #: Size of the largest request that came through after a larger one was refused.
    most_inputs: float = inf
    most_tokens: float = inf
    _given_back: int = 0
    _proven_at: float = -inf
    _proven_opened: float = 0.0

    def answered(self, characters: int, tokens: int | None) -> None:
        """Record texts that came through, by their characters and the tokens that the reply counts."""
        self._given_back = 0
        if tokens and characters:
            self.characters_per_token = max(0.25, 0.8 * self.characters_per_token + 0.2 * characters / tokens)

    def back_off_seconds(self) -> float:
        """Count a chunk that is given back, and return its minimum backoff."""
        self._given_back += 1
        return min(_MOST_BACK_OFF_SECONDS, _BACK_OFF_SECONDS * 2.0 ** min(self._given_back - 1, 10))

    def prove(self, opened: float) -> None:
        """Record that the canary came out right. `opened`: time at which the breaker last opened."""
        self._proven_at, self._proven_opened = time.monotonic(), opened

    def doubt(self) -> None:
        """Require a new canary check: another model may be behind the upstream from now on."""
        self._proven_at = -inf

    def proves(self, opened: float) -> bool:
        """Return True if the last canary check is still valid: recent, and the breaker hasn't opened since."""
        return time.monotonic() - self._proven_at < _PROOF_SECONDS and opened == self._proven_opened

    def learn_size(self, *, refused_inputs: int, inputs: int, tokens: int) -> None:
        """Learn a limit from a request of `refused_inputs` inputs that was refused, although both halves came through,
        the larger one with `inputs` and `tokens`. It had too many inputs, or, if by the known limit it hadn't, too many
        tokens."""
        if refused_inputs <= self.most_inputs < inf:
            self.most_tokens = tokens
        elif self.most_inputs == inf or inputs > self.most_inputs:
            self.most_inputs = inputs
