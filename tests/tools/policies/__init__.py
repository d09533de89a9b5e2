"""`python -m tests.tools.policies`: which model to give up, judged on generated traffic and on a user's own.

`workload` draws traces, `bound` says what no policy can do better than, `world` replays a trace through the core, and
`report` tells and draws how they compare.
"""
