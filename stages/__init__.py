"""What runs next to a GPU: models, attention, KV cache, weights, the stage server. Modules without torch say so."""
