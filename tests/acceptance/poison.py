"""Texts that harm a brittle model, each as a bug in a native library would, and the reject codes they must get."""

from enum import StrEnum


class Poison(StrEnum):
    """Beginning of a harmful text."""

    KILLS = "kill the process that reads this"
    HANGS = "stand still over this for ever"
    RAISES = "raise an error at these words"
    MAKES_NAN = "make no number of these words"
    BREAKS = "break the device under these words"

    @property
    def code(self) -> str:
        """Reject code that the text must get."""
        match self:
            case Poison.RAISES:
                return "encode_failed"
            case Poison.MAKES_NAN:
                return "bad_vector"
            case _:
                return "crashed_worker"
