"""`python -m scheduler.cli` is the command `loadmaster`."""

import sys

from scheduler.cli.main import main

sys.exit(main())
