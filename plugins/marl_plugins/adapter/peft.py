"""Any other kind of PEFT's that a base with several roles can hold."""

from __future__ import annotations
