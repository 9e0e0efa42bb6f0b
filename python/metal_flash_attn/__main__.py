"""`python -m metal_flash_attn`: what would serve a call, and by which kernel text."""

import sys

from ._cli import main

sys.exit(main())
