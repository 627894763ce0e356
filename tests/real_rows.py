"""Real rows in their published shapes. They are not part of the project: tests that want them skip where they are absent."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent.parent / "shared" / "data"
FILES = {"pubmedqa": "pubmedqa_pqal_250.json", "medical-o1": "medical_o1_60.json", "healthcaremagic": "chatdoctor_500.json"}


def real_path(shape: str) -> Path:
    path = FOLDER / FILES[shape]
    if not path.exists():
        pytest.skip(f"real rows are not here: {path.name} in ../shared/data")
    return path
