"""Loops over a step's rows, compiled by numba: on a CPU each takes the place of many small operators of torch.

They work on torch's memory and on the threads of its OpenMP pool: a second pool would make both sleep at barriers
(docs/decisions/0010).
"""

UNROLL = 4
"""Positions that attention multiplies at once; a block has a multiple of them."""
