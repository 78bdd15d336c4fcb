"""``python -m continuar``."""

import sys

from continuar.cli.main import main

sys.exit(main())
