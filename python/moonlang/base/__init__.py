"""Ground floor: errors, clock, log, registry, units. Imports nothing else of MoonLang."""
