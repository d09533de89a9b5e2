"""One scheduler on each machine of a Ray cluster, and fronts that send each request to where it is served soonest.

Ray knows the machines, starts one actor on each, and starts it again where it dies. Requests, answers and leases go
over HTTP. It needs the extras `ray` and `server`; only what runs inside Ray imports Ray.
"""
