"""What all tests share: an offline run with its own folder for things that can be made again."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # builders.py

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
