"""`moonlang up`: a router, servers and their store as one tree of supervised processes.

`command` reads the flags (`args`) and runs a `supervisor`. That keeps `unit`s alive, each a process with its log, its
notices and its `restarts`; `plan` says what they are started with, and `member` is what they start as. `membership`
keeps the router's list of servers in line, `control` answers the other commands (`status`, `down`, `logs`, `switch`),
which find clusters by `directory`. `screen` shows it all.
"""
