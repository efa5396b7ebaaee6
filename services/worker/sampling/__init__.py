"""How each slot samples, and the sampling of a step's rows."""
