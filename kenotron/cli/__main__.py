"""``python -m kenotron.cli`` is ``kenotron``."""

import sys

from kenotron.cli import main

sys.exit(main())
