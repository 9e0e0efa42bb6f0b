"""`python -m metal_flash_attn`: what works here, and what would serve a call."""

import sys

from ._cli import main

sys.exit(main())
