"""What a stored reference log-prob depends on, and nothing else.

Learning rate, β, objective, masks and output folder do not change a log-prob, so a sweep over them computes the
reference once.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.core.files import fingerprint

# Raised by hand whenever the way log-probs are computed changes their values: old stores are then not read.
NUMERICS = 3


@dataclass(frozen=True, slots=True)
class Context:
    """weights: fingerprint of the reference's weights and config. adapter: `none`, or `active` where adapter weights are part of them.

    dtype: of the forward pass (`float32`, `bfloat16`, `autocast-bfloat16`). attention: form and kernel of the pass.
    """

    weights: str
    adapter: str
    dtype: str
    attention: str

    def name(self) -> str:
        """Folder name of this context's store."""
        return fingerprint(asdict(self) | {"numerics": NUMERICS})


def row_key(prompt: NDArray[np.int32], reply: NDArray[np.int32]) -> bytes:
    """16 bytes naming a prompt and a reply by their token ids. Their lengths are part of it, so no two cuts collide."""
    digest = hashlib.sha256(len(prompt).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(reply, dtype="<i4").tobytes())
    return digest.digest()[:16]
