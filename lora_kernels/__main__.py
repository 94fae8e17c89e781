"""``python -m lora_kernels``."""

from .cli import main

raise SystemExit(main())
