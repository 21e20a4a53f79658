"""State of a gateway's model, as a child has learnt it, kept from claim to claim."""

import time
from dataclasses import dataclass
from math import inf

from pipeline.core.openai import CHARACTERS_PER_TOKEN

#: A gateway may change what is behind it at any time; its vectors are held against the canary's so often at least.
_PROOF_SECONDS = 600.0
#: A chunk that is given back waits so long at least; doubled each time, while nothing comes through.
_BACK_OFF_SECONDS = 4.0
_MOST_BACK_OFF_SECONDS = 60.0


@dataclass(slots=True)
class UpstreamState:
    """One thread uses it."""

    #: By what replies meter.
    characters_per_token: float = CHARACTERS_PER_TOKEN
    #: Of the largest request that went through where a larger one had been refused.
    most_inputs: float = inf
    most_tokens: float = inf
    _given_back: int = 0
    _proven_at: float = -inf
    _proven_opened: float = 0.0

    def answered(self, characters: int, tokens: int | None) -> None:
        """Texts of so many characters came through, and were so many tokens."""
        self._given_back = 0
        if tokens and characters:
            self.characters_per_token = max(0.25, 0.8 * self.characters_per_token + 0.2 * characters / tokens)

    def back_off_seconds(self) -> float:
        """A chunk is given back: for how long at least nobody takes it."""
        self._given_back += 1
        return min(_MOST_BACK_OFF_SECONDS, _BACK_OFF_SECONDS * 2.0 ** min(self._given_back - 1, 10))

    def prove(self, opened: float) -> None:
        """The canary came out right. `opened`: when the breaker had last opened."""
        self._proven_at, self._proven_opened = time.monotonic(), opened

    def doubt(self) -> None:
        """Something else may be behind the gateway from now on."""
        self._proven_at = -inf

    def proves(self, opened: float) -> bool:
        """Whether the canary's last vector still tells: neither long ago, nor before the breaker was open."""
        return time.monotonic() - self._proven_at < _PROOF_SECONDS and opened == self._proven_opened

    def learn_size(self, *, refused_inputs: int, inputs: int, tokens: int) -> None:
        """A request of so many inputs was refused, and its halves, the larger one with `inputs` and `tokens`, both
        went through. It had too many inputs; or, where it hadn't by what is known, too many tokens."""
        if refused_inputs <= self.most_inputs < inf:
            self.most_tokens = tokens
        elif self.most_inputs == inf or inputs > self.most_inputs:
            self.most_inputs = inputs
