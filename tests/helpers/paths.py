"""Where the project, its recorded figures and the references of its development are."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SHARED = ROOT.parent / "shared"  # official references and real images; tests that need it skip where it is absent
