"""The router: one address in front of many servers, alone or in pairs of prefill and decode.

A request goes through the files in this order: `relay` takes it and passes the answer on as it comes, `body` looks at
what routing needs of it, `dispatch` chooses workers (`policy`) and tries again when they fail, `attempt` sends it to
one of them or to a pair, `upstream` talks to one. `health` watches the workers in `workers` meanwhile.
"""
