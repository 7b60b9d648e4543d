"""Tests use no network and not the user's cache of texts; they run side by side, so each has one thread."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
os.environ.setdefault("OMP_NUM_THREADS", "1")
