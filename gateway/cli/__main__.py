"""`python -m gateway.cli` is `stageline`."""

import sys

from gateway.cli import main

sys.exit(main())
