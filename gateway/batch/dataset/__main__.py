"""`python -m gateway.batch.dataset`."""

import sys

from gateway.batch.dataset.command import main

sys.exit(main())
