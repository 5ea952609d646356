"""A Wan2.2 small enough to ship, trained from nothing on a drawn world of moving shapes. ``train.py`` runs it all."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
for _folder in (ROOT / "scripts", ROOT):  # from a clone; a pack of ComfyUI is not an installed package
    if str(_folder) not in sys.path and "wan_fp8" not in sys.modules:
        sys.path.insert(0, str(_folder))
