"""Tests of the runtime, all without a GPU; skipped as a whole where torch is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("cuda", "cuda/csrc", "tests/runtime", "tests/python")]
