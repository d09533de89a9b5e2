"""`python -m tests.tools.cluster_simulation`: which node of a cluster a request is sent to, on virtual time.

`workload` draws traffic for many nodes, `nodes` are the real decision core and Ray Serve's multiplexed replica,
`fronts` are the ways to choose a node, `world` runs them, and `report` prints how they compare.
"""
