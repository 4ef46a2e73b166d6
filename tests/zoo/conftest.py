"""The zoo's own modules, found by name: its table, its judge and its checks are used by a script too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
