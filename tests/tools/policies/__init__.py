"""`python -m tests.tools.policies`: which model to evict, judged on generated traffic and on a user's own.

`workload` draws traces, `bound` computes what no policy can beat, `world` replays a trace through the core, and
`report` prints and draws how they compare.
"""
