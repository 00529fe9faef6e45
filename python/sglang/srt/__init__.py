"""SGLang's runtime: the modules that other programs import by name."""
