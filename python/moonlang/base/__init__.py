"""Ground floor: errors, clock, log, registry, wakeup, memory of other processes. Imports nothing else of MoonLang."""
