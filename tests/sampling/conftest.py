"""Makes the toy models of this folder importable: `from toy import ...`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
