"""What runs next to a GPU: models, attention, KV cache, weights, the stage server. Modules without torch say so."""

import os

# Tensors from 2 MiB on lie in huge pages (docs/decisions/0012). torch reads this when it first allocates; 0 switches it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
