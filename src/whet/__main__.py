"""`python -m whet`: the command line."""

import sys

from whet.cli.main import main

sys.exit(main())
