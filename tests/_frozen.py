"""Leave what a server of processes has imported out of the garbage collections of all that it starts.

Every collection would go through it, and copy its pages. The server imports this last. A collection after freezing
tells the collector how little there is to go through: else it would wait for a quarter of what had been there.
"""

import gc

gc.collect()
gc.freeze()
gc.collect()
