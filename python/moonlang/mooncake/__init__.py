"""Mooncake: transfer engine, and what MoonLang builds on it. Only `lib` imports the vendor's package, at first use."""
