"""Identity of a text: a hash of all that decides its vector within a vector space."""

import hashlib
import json

from pipeline.core.options import KeptOptions, OnLong


class TextIdentity:
    """Hasher of a job's texts. Texts of equal hash have equal vectors, in equally many passages, of the same type."""

    def __init__(self, options: KeptOptions) -> None:
        passages = (options.split, options.overlap, options.split_by) if options.splits else None
        decisive = (options.dtype, options.precision, options.on_long is OnLong.REJECT, passages)
        self._begun = hashlib.blake2b(json.dumps(decisive).encode(), digest_size=16)

    def of(self, title: bytes, text: bytes) -> bytes:
        """Return the hash of a text in UTF-8, which the model reads with the title before it: 16 bytes."""
        hasher = self._begun.copy()
        hasher.update(b"%d:" % len(title))
        hasher.update(title)
        hasher.update(text)
        return hasher.digest()
