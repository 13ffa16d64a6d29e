"""How rows travel between ranks: in how many chunks."""
from __future__ import annotations

MAX_CHUNKS = 64
