"""The directory on the path for `contrastive_cases`, which spawned workers import too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
