"""Runs the command line by ``python -m kvcoll``."""

import sys

from .cli import main

sys.exit(main())
