"""The brain: turns time, messages and completions into plans. Pure; `Scheduler` is the one owner of every Request."""
