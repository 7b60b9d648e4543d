"""Texts that tests tokenize do not go to the user's cache; tests run side by side, so each has one thread."""

import os
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
os.environ.setdefault("OMP_NUM_THREADS", "1")
