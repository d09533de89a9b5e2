"""One scheduler on each of several machines, and fronts that send each request to the node that serves it soonest."""
