"""Reads and writes a block cache that other processes use too: `python cache_user.py FOLDER BYTES SEED`."""

from __future__ import annotations

import sys

import numpy as np

from internlm_trainer.data.block_cache import BlockCache

cache = BlockCache(sys.argv[1], int(sys.argv[2]))
for number in np.random.RandomState(int(sys.argv[3])).randint(0, 3000, 1000).tolist():
    block = cache.get(str(number))
    assert block is None or block == str(number).encode() * 300
    cache.put(str(number), str(number).encode() * 300)
