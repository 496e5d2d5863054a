"""What tests share: models, helpers and references. No file here is a test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # the folder that holds surgery/, rules/, tests/ and docs/
