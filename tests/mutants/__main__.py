"""python tests/mutants: see README.md."""

import sys
from pathlib import Path

# The folder itself comes first where a folder is run; its modules are a package's.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from mutants.run import main  # noqa: E402

sys.exit(main())
